"""sink-producers: compute a value just before its first reader when that shortens live ranges.

    before  context = expand-and-copy(c);  ... a whole spatial block ...;  k = linear(context, w)
    after   ... a whole spatial block ...;  context = expand-and-copy(c);  k = linear(context, w)

A producer moves down when the bytes its result would hold on the way exceed the bytes of the operands that would have
to wait instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec


@dataclass(frozen=True)
class SinkProducers:
    """Move each producer down to its first reader when its result is larger than the operands it frees."""

    def apply(self, program: Program, facts: FactTable) -> str:
        nodes = compute_nodes(program.graph)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        position = {node: float(i) for node, i in order.items()}
        moved = 0
        for node in reversed(nodes):
            first = min(node.users, key=lambda user: position[user], default=None)
            if first is None or node.next is first or not _worth_moving(node, position, position[first]):
                continue
            edit.move_before(node, first)
            position[node] = (position[first.prev.prev] + position[first]) / 2
            moved += 1
        return f"{moved} producers moved" if moved else "every value is computed where it is read"


def _worth_moving(node: fx.Node, position: dict[fx.Node, float], target: float) -> bool:
    waiting = sum(
        _nbytes(operand)
        for operand in node.all_input_nodes
        if operand.op != "placeholder" and max(position[user] for user in operand.users) <= position[node]
    )
    del target
    return waiting < _nbytes(node)


def _nbytes(node: fx.Node) -> int:
    spec = node_spec(node)
    return spec.numel * spec.dtype.itemsize if isinstance(spec, TensorSpec) else 0
