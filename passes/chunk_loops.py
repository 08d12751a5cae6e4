"""chunk-loops: replace each group of the plan by one call of a chunk loop.

    before  n = layer_norm(x, w);  h = linear(n, w1);  g = gelu(h);  y = linear(g, w2)
    after   loop = chunk_loop_3(x, w, w1, w2);  y = loop[0]

Hoisted invariants stay in front of the loop, views of its results move behind it. Bodies of equal structure are one
module, since weights are operands.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import common_module
from fmecompile.graph.program import Program
from fmecompile.graph.specs import node_spec
from fmecompile.graph.structure import structure
from fmecompile.runtime.chunk_loop import ChunkLoop
from fmecompile.runtime.watch import Label


@dataclass(frozen=True)
class ChunkLoops:
    """Rewrite ``program`` by ``groups``, in order; returns the loop modules by name."""

    groups: Sequence[Group]

    def apply(self, program: Program) -> dict[str, ChunkLoop]:
        moved: dict[fx.Node, fx.Node] = {}
        bodies: dict[Any, fx.GraphModule] = {}
        loops: dict[str, ChunkLoop] = {}
        for k, group in enumerate(self.groups):
            name = f"chunk_loop_{k}"
            label = Label(name, common_module(group.inside), group.working_bytes)
            loops[name] = ChunkLoop(group.spec, [intern(bodies, body) for body in group.bodies], label)
            _replace(program, group, name, moved)
        return loops


def _replace(program: Program, group: Group, name: str, moved: dict[fx.Node, fx.Node]) -> None:
    stop = max((*group.inside[-1:], *group.hoisted[-1:])).next  # what is hoisted may read what an output is laid over
    operands = tuple(moved.get(node, node) for node in group.operands)
    loop = edit.insert_loop(stop, name, operands, like=group.inside[0])
    edit.set_spec(loop, tuple(node_spec(node) for node in group.results))
    gone = set(group.inside) - set(group.outside) - set(group.behind)
    for k, result in enumerate(group.results):
        value = edit.insert_before(stop, operator.getitem, (loop, k), like=result)
        edit.set_spec(value, node_spec(result))
        moved[result] = value
        for user in [u for u in result.users if u not in gone]:
            edit.read_instead(user, result, value)
    for node in group.inside:
        if node in group.behind:
            edit.move_before(node, stop)
    edit.erase(node for node in group.inside if node in gone)


def intern(bodies: dict[Any, fx.GraphModule], graph: fx.Graph) -> fx.GraphModule:
    """One module for all graphs of equal structure."""
    key = structure(graph)
    if key not in bodies:
        bodies[key] = fx.GraphModule(torch.nn.Module(), graph, class_name="ChunkBody")
    return bodies[key]
