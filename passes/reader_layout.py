"""reader-layout: in the body of a loop, a sum is laid out as what reads it permuted wants it.

    before  y = add(h, e);  p = permute(y, [1, 0, 2]);  n = layer_norm(p, [320])       a copy, within the norm
    after   m = new_empty_strided(h, [14, 512, 320], [320, 4480, 1]);  y = add(h, e, out=m);  ...

So a body goes from the layout of spatial layers to that of sequences without a copy. The whole tensor has no such
layout where frames and clips are one dimension, so that this waits until the body of a trip is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.overwrites import INTO
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.program import compute_nodes
from fmecompile.graph.specs import tensor_spec

aten = torch.ops.aten

_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.permute.default)
_COPYING = (aten.layer_norm.default, aten.linear.default)
"""Calls that copy an operand whose rows do not lie one behind the other."""


@dataclass(frozen=True)
class ReaderLayout:
    """Rewrite the bodies of ``groups``."""

    groups: Sequence[Group]

    def apply(self, facts: FactTable) -> tuple[list[Group], str]:
        """The groups with bodies that copy less, and how many values that takes."""
        moved, groups = 0, []
        for group in self.groups:
            bodies = tuple(edit.copied(body) for body in group.bodies)
            moved += sum([_lay_out(body, facts) for body in bodies])
            groups.append(replace(group, bodies=bodies))
        return groups, f"{moved} values laid out as they are read"


def _lay_out(body: fx.Graph, facts: FactTable) -> int:
    found = [(node, strides) for node in compute_nodes(body) if (strides := wanted_strides(node)) is not None]
    for node, strides in found:
        spec = tensor_spec(node)
        args = (node.all_input_nodes[0], list(spec.shape), strides)
        into = edit.insert_before(node, aten.new_empty_strided.default, args, like=node)
        edit.retarget(node, INTO[node.target], node.args, {**node.kwargs, "out": into})
    if found:
        edit.annotate(compute_nodes(body), facts)
    return len(found)


def wanted_strides(node: fx.Node) -> list[int] | None:
    """The strides of ``node`` with which what is read of it is contiguous; None where no reader copies it."""
    if node.target not in INTO or tensor_spec(node.all_input_nodes[0]).dtype != tensor_spec(node).dtype:
        return None
    chain = [node]
    while len(chain[-1].users) == 1 and (reader := next(iter(chain[-1].users))).target in _VIEWS:
        chain.append(reader)
    read = tensor_spec(chain[-1])
    memory = torch.empty(read.shape, device="meta")
    is_copied = any(reader.target in _COPYING and reader.args[0] is chain[-1] for reader in chain[-1].users)
    if not is_copied or memory.stride() == read.stride:
        return None
    return _undone(memory, chain)


def _undone(memory: torch.Tensor, chain: Sequence[fx.Node]) -> list[int] | None:
    """The strides that the first of ``chain`` has where the last, a view of it, is ``memory``."""
    for view, operand in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
        if view.target is aten.permute.default:
            order = [d % memory.ndim for d in view.args[1]]  # type: ignore[union-attr]
            memory = memory.permute([order.index(d) for d in range(memory.ndim)])
            continue
        try:
            memory = memory.view(tensor_spec(operand).shape)
        except RuntimeError:  # no strides reach these elements in this order
            return None
    return list(memory.stride())
