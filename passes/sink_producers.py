"""sink-producers: compute a value just before its first reader when that shortens live ranges.

    before  context = expand-and-copy(c);  ... a whole spatial block ...;  k = linear(context, w)
    after   ... a whole spatial block ...;  context = expand-and-copy(c);  k = linear(context, w)

A producer moves down when the bytes its result would hold on the way exceed the bytes of the operands that would have
to wait instead. A view holds nothing, so it always moves. Calls that draw random numbers stay in order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import Storages, storages
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes


@dataclass(frozen=True)
class SinkProducers:
    """Move each producer down to its first reader when its result is larger than the operands it frees."""

    def apply(self, program: Program, facts: FactTable) -> str:
        nodes = compute_nodes(program.graph)
        held = storages(nodes, program.outputs, facts)
        aliases: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            aliases[held.roots[node]].append(node)
        moved = 0
        for node in reversed(nodes):
            first = min(node.users, default=None)
            if first is None or node.next is first or not _may_move(node) or not _is_worth(node, held, aliases):
                continue
            edit.move_before(node, first)
            moved += 1
        return f"{moved} producers moved" if moved else "every value is computed where it is read"


def _may_move(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_worth(node: fx.Node, held: Storages, aliases: dict[fx.Node, list[fx.Node]]) -> bool:
    if held.roots[node] is not node:
        return True
    waiting = 0
    for root in {held.roots.get(operand, operand) for operand in node.all_input_nodes}:
        allocated = root in held.position
        if allocated and all(user <= node for alias in aliases[root] for user in alias.users):
            waiting += held.nbytes[held.position[root]]
    return waiting < held.nbytes[held.position[node]]
