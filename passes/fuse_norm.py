"""fuse-norm: join the parts of a GroupNorm that the partition left together.

    before  m = group_norm_moments(x, 32);  s = group_norm_statistics(m, 1e-6);  y = group_norm_apply(x, s, w, b)
    after   y = group_norm(x, 32, w, b, 1e-6)

It works on the body of every loop and on the graph around them, so that a GroupNorm stays in parts only where one of
them runs in another loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

aten = torch.ops.aten


def fuse_norms(graph: fx.Graph, facts: FactTable) -> int:
    """Join every three in ``graph``; the number joined."""
    joined = 0
    for node in compute_nodes(graph):
        if node.target is not group_norm_apply:
            continue
        x, statistics, weight, bias = node.args
        assert isinstance(statistics, fx.Node)
        if statistics.target is not group_norm_statistics:
            continue
        moments, eps = statistics.args
        assert isinstance(moments, fx.Node)
        if moments.target is not group_norm_moments or moments.args[0] is not x:
            continue
        edit.retarget(node, aten.group_norm.default, (x, moments.args[1], weight, bias, eps), {})
        edit.annotate([node], facts)
        for part in (statistics, moments):
            if not part.users:
                edit.erase([part])
        joined += 1
    return joined


@dataclass(frozen=True)
class FuseNorm:
    """Join the parts of GroupNorms around the loops (bodies are joined as they are built)."""

    def apply(self, program: Program, facts: FactTable) -> str:
        joined = fuse_norms(program.graph, facts)
        return f"{joined} group norms joined outside loops" if joined else "no parts to join"
