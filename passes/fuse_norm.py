"""fuse-norm: join the two passes of a GroupNorm that the partition left together.

    before  s = group_norm_statistics(x, 32, 1e-6);  y = group_norm_apply(x, s, w, b)
    after   y = group_norm(x, 32, w, b, 1e-6)

It works on the body of every loop and on the graph around them, so that a GroupNorm stays in two passes only where the
first runs outside the loop of the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.runtime.norms import group_norm_apply, group_norm_statistics

aten = torch.ops.aten


def fuse_norms(graph: fx.Graph, facts: FactTable) -> int:
    """Join every pair in ``graph``; the number joined."""
    joined = 0
    for node in compute_nodes(graph):
        if node.target is not group_norm_apply:
            continue
        x, statistics, weight, bias = node.args
        assert isinstance(statistics, fx.Node)
        if statistics.target is not group_norm_statistics or statistics.args[0] is not x:
            continue
        _, groups, eps = statistics.args
        edit.retarget(node, aten.group_norm.default, (x, groups, weight, bias, eps), {})
        edit.annotate([node], facts)
        if not statistics.users:
            edit.erase([statistics])
        joined += 1
    return joined


@dataclass(frozen=True)
class FuseNorm:
    """Join the halves of GroupNorms around the loops (bodies are joined as they are built)."""

    def apply(self, program: Program, facts: FactTable) -> str:
        joined = fuse_norms(program.graph, facts)
        return f"{joined} group norms joined outside loops" if joined else "no pair to join"
