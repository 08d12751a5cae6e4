"""write-through: the body of a loop writes its slice of an output itself, where its last call can.

    before  body(x, w):        h = linear(x, w);  y = add(h, x);             return (y,)     and the loop copies y
    after   body(x, w, into):  h = linear(x, w);  y = add(h, x, out=into);   return (None,)

An output that takes over the storage of an operand is written so where nothing reads that storage afterwards, and where
the call itself reads of it just the elements that it writes, each in its place. The call then reads ``into``: torch
refuses to write over what a call reads by another name unless the strides are equal, also those of single rows, which
mean nothing and may differ when the loop runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.overwrites import INTO, is_laid_out_like
from fmecompile.analysis.storages import storages
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, tensor_spec
from fmecompile.runtime.chunk_loop import Output

_WRITING = {*INTO, *INTO.values()}


@dataclass(frozen=True)
class WriteThrough:
    """Rewrite the bodies of ``groups``, which are those of a program before its loops are in place."""

    groups: Sequence[Group]

    def apply(self, program: Program, facts: FactTable) -> tuple[list[Group], str]:
        """The groups with bodies that write, and what that saves."""
        roots = storages(compute_nodes(program.graph), program.outputs, facts).roots
        written = [_written(group, roots, facts) for group in self.groups]
        outputs = [o for group in written for o in group.spec.outputs if o.is_written]
        nbytes = sum(torch.Size(o.shape).numel() * o.dtype.itemsize for o in outputs)
        note = f"{len(outputs)} outputs written by bodies, {nbytes >> 20} MiB not copied"
        return written, note if outputs else "no body can write its output"


def _written(group: Group, roots: dict[fx.Node, fx.Node], facts: FactTable) -> Group:
    sharing = [_sharing(group, output, roots) for output in group.spec.outputs]
    chosen = [
        k
        for k, output in enumerate(group.spec.outputs)
        if all(_can_write(body, k, output, sharing[k], facts) for body in group.bodies)
    ]
    if not chosen:
        return group
    outputs = tuple(replace(o, is_written=k in chosen) for k, o in enumerate(group.spec.outputs))
    bodies = tuple(_writing(body, {k: sharing[k] for k in chosen}, outputs, facts) for body in group.bodies)
    return replace(group, spec=replace(group.spec, outputs=outputs), bodies=bodies)


def _sharing(group: Group, output: Output, roots: dict[fx.Node, fx.Node]) -> set[int]:
    """The operands that lie in the storage which ``output`` takes over."""
    if output.takes is None:
        return set()
    taken = group.operands[output.takes]
    return {i for i, node in enumerate(group.operands) if roots.get(node, node) is roots.get(taken, taken)}


def _can_write(body: fx.Graph, k: int, output: Output, sharing: set[int], facts: FactTable) -> bool:
    value = _values(body)[k]
    if output.host_of is not None or output.slicing.shape is not None or value.target not in _WRITING:
        return False
    if len(value.users) > 1 or tensor_spec(value).dtype != output.dtype:
        return False
    return not sharing or _is_last(body, value, output, sharing, facts)


def _is_last(body: fx.Graph, value: fx.Node, output: Output, sharing: set[int], facts: FactTable) -> bool:
    """Whether ``value`` reads the storage that it is to overwrite last, and element by element."""
    nodes = compute_nodes(body)
    inside = _inside(body, sharing, facts)
    readers = [node for node in nodes if inside.intersection(node.all_input_nodes)]
    if nodes.index(value) < max(map(nodes.index, readers), default=0):
        return False
    into = _target(value, output)
    return all(is_laid_out_like(tensor_spec(n), into) for n in inside.intersection(value.all_input_nodes))


def _inside(body: fx.Graph, sharing: set[int], facts: FactTable) -> set[fx.Node]:
    """What lies in the storage of the operands ``sharing``."""
    nodes = compute_nodes(body)
    roots = storages(nodes, _values(body), facts).roots
    places = [place for i, place in enumerate(_places(body)) if i in sharing]
    return {n for n in (*places, *nodes) if roots.get(n, n) in places}


def _target(value: fx.Node, output: Output) -> TensorSpec:
    """What the body for ``value`` is given to write to."""
    made = tensor_spec(value)
    return TensorSpec(made.shape, output.stride, made.dtype, made.device)


def _writing(body: fx.Graph, chosen: dict[int, set[int]], outputs: Sequence[Output], facts: FactTable) -> fx.Graph:
    """A copy of ``body`` with an operand more for each output in ``chosen``, which it writes and, where it lies over
    what operands hold, reads instead of them."""
    graph = edit.copied(body)
    values: list[Any] = list(_values(graph))
    inside = {k: _inside(graph, sharing, facts) for k, sharing in chosen.items()}
    for k in chosen:
        value = values[k]
        into = edit.add_operand(graph, f"into_{k}", _target(value, outputs[k]))
        for read in inside[k].intersection(value.all_input_nodes):
            edit.read_instead(value, read, into)
        edit.retarget(value, INTO.get(value.target, value.target), value.args, {**value.kwargs, "out": into})
        values[k] = None
    edit.return_values(graph, tuple(values))
    edit.drop_dead(graph)
    return graph


def _places(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _values(graph: fx.Graph) -> tuple[fx.Node, ...]:
    return next(iter(reversed(graph.nodes))).args[0]  # type: ignore[return-value]
