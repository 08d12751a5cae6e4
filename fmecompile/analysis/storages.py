"""Storages of a straight-line graph: who allocates each, how large it is, and how long it lives.

Views share their operand's storage and cost nothing. A storage lives from the call that allocates it to the last call
that reads any of its aliases; graph inputs exist before the first call and are never counted.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from fmecompile.analysis.facts import CallFacts, FactTable
from fmecompile.graph.specs import TensorSpec, node_spec, specs_in

_Owner = TypeVar("_Owner")


@dataclass(frozen=True)
class Storages:
    """Per node of ``nodes`` (in execution order), by position.

    ``roots`` maps every node to the node that owns its storage (itself, or a graph input). ``nbytes`` is what a
    position allocates, ``hidden`` what it holds while it runs beyond operands and results, ``last`` the last position
    that reads the storage of a root: ``len(nodes)`` for graph outputs, its own position when nothing reads it.
    """

    nodes: tuple[fx.Node, ...]
    roots: dict[fx.Node, fx.Node]
    nbytes: tuple[int, ...]
    hidden: tuple[int, ...]
    last: dict[fx.Node, int]
    position: dict[fx.Node, int]

    def live_bytes(self) -> list[int]:
        """Bytes that live across each boundary: entry ``p`` counts what was allocated before position ``p`` and is
        read at ``p`` or later."""
        change = [0] * (len(self.nodes) + 2)
        for node, at in self.position.items():
            last = self.last.get(node)
            if last is not None and last > at:
                change[at + 1] += self.nbytes[at]
                change[last + 1] -= self.nbytes[at]
        live, total = [], 0
        for p in range(len(self.nodes) + 1):
            total += change[p]
            live.append(total)
        return live


def storages(nodes: Sequence[fx.Node], outputs: Sequence[object], facts: FactTable) -> Storages:
    """Storages of ``nodes`` run in order; ``outputs`` are read after the last."""
    roots: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, list[fx.Node]] = {}
    nbytes, hidden = [], []
    last: dict[fx.Node, int] = {}
    for at, node in enumerate(nodes):
        call = facts(node.target, specs_in(node.args), specs_in(node.kwargs))  # type: ignore[arg-type]
        shared = [roots.get(operand, operand) for operand in tensor_operands(node)]
        parts[node] = owners_of_parts(node, call, shared)
        source = part_of(node)
        owner = parts[source[0]][source[1]] if source else node if node in parts[node] else parts[node][0]
        roots[node] = owner
        last.setdefault(owner, at)
        for held in parts[source[0]] if source else (owner,):  # what holds one part holds them all
            last[held] = at
        nbytes.append(sum(call.nbytes))
        hidden.append(call.hidden_bytes)
        for operand in node.all_input_nodes:
            last[roots.get(operand, operand)] = at
    for value in outputs:
        if isinstance(value, fx.Node):
            last[roots.get(value, value)] = len(nodes)
    position = {node: at for at, node in enumerate(nodes)}
    return Storages(tuple(nodes), roots, tuple(nbytes), tuple(hidden), last, position)


def owners_of_parts(node: fx.Node, call: CallFacts, shared: Sequence[_Owner]) -> list[fx.Node | _Owner]:
    """Of each part that a call returns, what owns its storage: the call itself, or one of ``shared``, the owners of its
    tensor operands. A call may return views of several operands (``broadcast_tensors``)."""
    parts = [call.result] if isinstance(call.result, TensorSpec) else call.result
    aliases = iter(call.alias)
    found = [next(aliases) if isinstance(part, TensorSpec) else None for part in parts] if parts else []
    return [node if alias is None else shared[alias] for alias in found] or [node]


def part_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The call and the place among what it returns, of a node that takes one part of it."""
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, fx.Node) or isinstance(node_spec(source), TensorSpec):
        return None
    return source, int(str(node.args[1]))


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in the order in which the fact table meets them, repeats included."""
    found: list[fx.Node] = []

    def visit(n: fx.Node) -> fx.Node:
        spec = node_spec(n)
        parts = spec if isinstance(spec, tuple) and not isinstance(spec, TensorSpec) else (spec,)
        found.extend(n for part in parts if isinstance(part, TensorSpec))
        return n

    fx.map_arg(node.args, visit)
    fx.map_arg(node.kwargs, visit)
    return found
