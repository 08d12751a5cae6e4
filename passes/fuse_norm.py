"""fuse-norm: join the parts of a GroupNorm that the partition left together.

    before  m = group_norm_moments(x, 32);  s = group_norm_statistics(m, 1e-6);  y = group_norm_apply(x, s, w, b)
    after   y = group_norm(x, 32, w, b, 1e-6)

It works on the body of every loop and on the graph around them, so that a GroupNorm stays in parts only where one of
them runs in another loop.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

aten = torch.ops.aten


def norm_call(apply: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of the GroupNorm that ends in ``apply``; None when its parts do not belong together."""
    if apply.target is not group_norm_apply:
        return None
    x, statistics, weight, bias = apply.args
    if not isinstance(statistics, fx.Node) or statistics.target is not group_norm_statistics:
        return None
    moments, eps = statistics.args
    if not isinstance(moments, fx.Node) or moments.target is not group_norm_moments or moments.args[0] is not x:
        return None
    return (x, moments.args[1], weight, bias, eps)


def fuse_norms(graph: fx.Graph, facts: FactTable, names: Collection[str] | None = None) -> int:
    """Join every three in ``graph``, or those whose last part is in ``names``; the number joined."""
    joined = 0
    for node in compute_nodes(graph):
        call = norm_call(node)
        if call is None or (names is not None and node.name not in names):
            continue
        statistics = node.args[1]
        moments = statistics.args[0]  # type: ignore[union-attr]
        edit.retarget(node, aten.group_norm.default, call, {})
        edit.annotate([node], facts)
        for part in (statistics, moments):
            if not part.users:  # type: ignore[union-attr]
                edit.erase([part])  # type: ignore[list-item]
        joined += 1
    return joined


@dataclass(frozen=True)
class FuseNorm:
    """Join the parts of GroupNorms around the loops (bodies are joined as they are built), all or those ``names``."""

    names: Collection[str] | None = None

    def apply(self, program: Program, facts: FactTable) -> str:
        joined = fuse_norms(program.graph, facts, self.names)
        return f"{joined} group norms joined outside loops" if joined else "no parts to join"
