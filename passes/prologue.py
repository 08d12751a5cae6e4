"""prologue: compute once per generation what depends on nothing that changes between steps.

before    k = linear(text);  y = attention(q(x, t), k)          at every step
prologue  k = linear(text)                                      at the first step, and kept
after     y = attention(q(x, t), k')                            k' is what was kept

What is kept lives all through a generation, so little of it is: values that save most work for their bytes, up to a
small share of the largest storage. Exact: the same calls run on the same operands, only earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import storages
from fmecompile.graph import edit
from fmecompile.graph.program import Input, Kept, Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.contraction import all_products

NAME = "prologue"


@dataclass(frozen=True)
class Prologue:
    """``varying`` are the input leaves that may change at every step. What is kept takes at most ``share`` of the bytes
    of the program's largest storage."""

    varying: frozenset[int]
    share: float = 0.01

    def apply(self, program: Program, facts: FactTable) -> str:
        fixed = self._fixed(program)
        held = storages(compute_nodes(program.graph), program.outputs, facts)
        limit = int(self.share * max(held.nbytes, default=0))
        chosen = list(_chosen(program, fixed, limit))
        if not chosen or program.prologue is not None:
            return "nothing is the same at every step"
        program.prologue = _prologue(program, [node.name for node in chosen])
        for k, node in enumerate(chosen):
            kept = edit.add_placeholder(program, f"{NAME}_{k}", Kept(f"{NAME}:{k}"), node_spec(node))
            for user in [user for user in node.users if user not in fixed]:
                edit.read_instead(user, node, kept)
        erased = edit.drop_unused(program)
        size = kept_bytes(program.prologue) / 2**20
        return f"{len(chosen)} values are made once per generation, {size:.2f} MiB; {erased} calls fewer a step"

    def _fixed(self, program: Program) -> set[fx.Node]:
        """Calls that no varying input reaches."""
        bound = zip(program.placeholders, program.bindings, strict=True)
        changing = {n for n, b in bound if isinstance(b, Input) and b.leaf in self.varying}
        for node in compute_nodes(program.graph):
            if changing.intersection(node.all_input_nodes):
                changing.add(node)
        return {node for node in compute_nodes(program.graph) if node not in changing}


def _chosen(program: Program, fixed: set[fx.Node], limit_bytes: int) -> Iterator[fx.Node]:
    """Fixed values that steps read and that take work, the most work for their bytes first, within a limit."""
    read = [node for node in fixed if any(user not in fixed for user in node.users)]
    worth = {node: _work_behind(node, fixed) / max(_nbytes(node), 1) for node in read if _is_tensor(node)}
    left = limit_bytes
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    for node in sorted(worth, key=lambda n: (-worth[n], order[n])):
        if worth[node] > 0 and _nbytes(node) <= left:
            left -= _nbytes(node)
            yield node


def _work_behind(node: fx.Node, fixed: set[fx.Node]) -> int:
    """Products of the fixed calls that lead to ``node``."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand in fixed and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return sum(map(all_products, found))


def _prologue(program: Program, names: list[str]) -> Program:
    """The program that makes the values of these names and returns nothing else."""
    made = program.copy()
    nodes = {node.name: node for node in made.graph.nodes}
    edit.return_nothing(made)
    for k, name in enumerate(names):
        edit.return_also(made, f"{NAME}:{k}", nodes[name])
    edit.drop_unused(made)
    return made


def kept_bytes(prologue: Program) -> int:
    """Bytes of what a prologue makes."""
    return sum(map(_nbytes, prologue.outputs))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node_spec(node), TensorSpec)


def _nbytes(node: fx.Node) -> int:
    spec = node_spec(node)
    return spec.numel * spec.dtype.itemsize if isinstance(spec, TensorSpec) else 0
