"""two-pass-norm: split GroupNorm into moments, statistics and apply, so that loops may cut what it normalises over.

    before  y = group_norm(x, 32, w, b, 1e-6)
    after   m = group_norm_moments(x, 32);  s = group_norm_statistics(m, 1e-6);  y = group_norm_apply(x, s, w, b)

    before  y = group_norm(x, 32, w, b, 1e-6);  p = permute(y, [0, 2, 3, 1])
    after   ...;  y = group_norm_apply(x, s, w, b, [0, 2, 3, 1]);  p = permute(y, [0, 2, 3, 1])

What every reader permutes is laid out so to begin with. The partition then decides; ``fuse-norm`` joins again every
three that it left together, so a GroupNorm stays split only where a loop begins or ends between its two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import tensor_spec
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

aten = torch.ops.aten

_DEFAULTS = (None, None, 1e-5)  # weight, bias, eps


@dataclass(frozen=True)
class TwoPassNorm:
    """Split every GroupNorm that has an axis to gain (anything behind its channels)."""

    def apply(self, program: Program, facts: FactTable) -> str:
        split = 0
        for node in compute_nodes(program.graph):
            if node.target is not aten.group_norm.default or len(tensor_spec(node).shape) < 3:  # type: ignore[arg-type]
                continue
            x, groups, *rest = node.args
            weight, bias, eps = (*rest, *_DEFAULTS[len(rest) :])[:3]
            moments = edit.insert_before(node, group_norm_moments, (x, groups), like=node)
            statistics = edit.insert_before(node, group_norm_statistics, (moments, eps), like=node)
            order = _wanted_order(node)
            laid_out = () if order is None else (order,)
            edit.retarget(node, group_norm_apply, (x, statistics, weight, bias, *laid_out), {})
            edit.annotate([moments, statistics, node], facts)
            split += 1
        return f"{split} group norms split" if split else "no group norm to split"


def _wanted_order(node: fx.Node) -> list[int] | None:
    """The order of dimensions that all readers of ``node`` permute it to."""
    wanted = {tuple(reader.args[1]) if reader.target is aten.permute.default else None for reader in node.users}  # type: ignore[arg-type]
    order = wanted.pop() if len(wanted) == 1 else None
    return None if order is None else [d % len(order) for d in order]  # type: ignore[operator]
