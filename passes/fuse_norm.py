"""fuse-norm: join the parts of a GroupNorm that the partition left together.

    before  m = group_norm_moments(x, 32);  s = group_norm_statistics(m, 1e-6);  y = group_norm_apply(x, s, w, b)
    after   y = group_norm(x, 32, w, b, 1e-6)

    before  m = group_norm_moments(x, 32);  s = ...;  y = group_norm_apply(x, s, w, b);  p = permute(y, [0, 2, 3, 1])
    after   y = group_norm_laid_out(x, 32, w, b, 1e-6, [0, 2, 3, 1]);  p = permute(y, [0, 2, 3, 1])

The second is for a CPU, where the library's norm would copy an operand of another layout, or have its result copied by
what permutes it: two passes in any layout are faster than that.

It works on the body of every loop and on the graph around them, so that a GroupNorm stays in parts only where one of
them runs in another loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, tensor_spec
from fmecompile.runtime.norms import (
    group_norm_apply,
    group_norm_laid_out,
    group_norm_moments,
    group_norm_statistics,
)

aten = torch.ops.aten


def norm_call(apply: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of the GroupNorm that ends in ``apply``; None when its parts do not belong together."""
    if apply.target is not group_norm_apply:
        return None
    x, statistics, weight, bias = apply.args[:4]
    if not isinstance(statistics, fx.Node) or statistics.target is not group_norm_statistics:
        return None
    moments, eps = statistics.args
    if not isinstance(moments, fx.Node) or moments.target is not group_norm_moments or moments.args[0] is not x:
        return None
    return (x, moments.args[1], weight, bias, eps)


def fused(apply: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The call that ``apply`` and the parts before it are joined to; None where they do not belong together."""
    call = norm_call(apply)
    if call is None:
        return None
    order = _order(apply, call[0])
    return (aten.group_norm.default, call) if order is None else (group_norm_laid_out, (*call, order))


def fuse_norms(graph: fx.Graph, facts: FactTable, names: Collection[str] | None = None) -> int:
    """Join every three in ``graph``, or those whose last part is in ``names``; the number joined."""
    joined = 0
    for node in compute_nodes(graph):
        call = fused(node)
        if call is None or (names is not None and node.name not in names):
            continue
        statistics = node.args[1]
        moments = statistics.args[0]  # type: ignore[union-attr]
        edit.retarget(node, *call, {})
        edit.annotate([node] if node.target is aten.group_norm.default else compute_nodes(graph), facts)
        for part in (statistics, moments):
            if not part.users:  # type: ignore[union-attr]
                edit.erase([part])  # type: ignore[list-item]
        joined += 1
    return joined


def _order(node: fx.Node, x: fx.Node) -> list[int] | None:
    """The dimensions of a norm of ``x`` as its readers want them in memory; None where the library's norm leaves
    nothing to copy."""
    spec = tensor_spec(x)
    order: Any = node.args[4] if len(node.args) > 4 else None
    if spec.device.type != "cpu" or (order is None and is_dense(spec)):
        return None
    return order or list(range(len(spec.shape)))


def is_dense(spec: TensorSpec) -> bool:
    """Whether a library's norm reads it in place: contiguous, or channels last."""
    x = torch.empty_strided(spec.shape, spec.stride, device="meta")
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return x.is_contiguous() or x.is_contiguous(memory_format=channels_last)


@dataclass(frozen=True)
class FuseNorm:
    """Join the parts of GroupNorms around the loops (bodies are joined as they are built), all or those ``names``."""

    names: Collection[str] | None = None

    def apply(self, program: Program, facts: FactTable) -> str:
        joined = fuse_norms(program.graph, facts, self.names)
        return f"{joined} group norms joined outside loops" if joined else "no parts to join"
