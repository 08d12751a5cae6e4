"""two-pass-norm: split GroupNorm into moments, statistics and apply, so that loops may cut what it normalises over.

    before  y = group_norm(x, 32, w, b, 1e-6)
    after   m = group_norm_moments(x, 32);  s = group_norm_statistics(m, 1e-6);  y = group_norm_apply(x, s, w, b)

The partition then decides; ``fuse-norm`` joins again every three that it left together, so a GroupNorm stays split only
where a loop begins or ends between its two passes over ``x``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
            edit.retarget(node, group_norm_apply, (x, statistics, weight, bias), {})
            edit.annotate([moments, statistics, node], facts)
            split += 1
        return f"{split} group norms split" if split else "no group norm to split"
