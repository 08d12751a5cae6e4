"""Norms and softmax: what they take statistics over is reduced, the rest is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fmecompile.kernels.group_norm import GROUP_NORM_MOMENTS
from fmecompile.operators.registry import Call, Operand, Result, axis_rule, tensor
from fmecompile.runtime.norms import group_norm_moments, group_norm_statistics

aten = torch.ops.aten


@axis_rule(
    aten.group_norm.default,
    samples=((tensor(4, 8, 6, 5), 2, tensor(8), tensor(8)), (tensor(3, 8, 5), 4)),
)
def group_norm(call: Call, x: Operand, num_groups: int, *_: Any) -> Result:
    """(N, C, *) -> same. Keeps N; statistics bar the rest (the two-pass-norm pass lifts that for *)."""
    call.keep(x, [0])
    return call.result([x.axes[0]] + [None] * (x.ndim - 1), f"GroupNorm({num_groups}) takes statistics over it")


@axis_rule(
    group_norm_moments,
    GROUP_NORM_MOMENTS,
    samples=((tensor(4, 8, 6, 5), 2), (tensor(3, 8, 5), 4), (tensor(1, 8, 3, 4, 5), 4)),
)
def moments(call: Call, x: Operand, *_: Any) -> Result:
    """(N, C, D1, ..., Dk) -> (2, N, G, D1, ..., Dk-1). Keeps N and D1 to Dk-1."""
    call.keep(x, [0, *range(2, x.ndim - 1)])
    return call.result([None, x.axes[0], None, *x.axes[2:-1]], "GroupNorm takes statistics over it")


@axis_rule(group_norm_statistics, samples=((tensor(2, 4, 8, 6), 1e-5), (tensor(2, 3, 8), 1e-6)))
def statistics(call: Call, moments: Operand, *_: Any) -> Result:
    """(2, N, G, *) -> (2, N, G). Keeps N, reduces the rest."""
    call.keep(moments, [1])
    return call.result([None, moments.axes[1], None], "GroupNorm takes statistics over it")


@axis_rule(
    aten.layer_norm.default,
    samples=((tensor(4, 6, 8), [8], tensor(8), tensor(8)), (tensor(4, 6, 8), [6, 8])),
)
def layer_norm(call: Call, x: Operand, normalized_shape: Sequence[int], *_: Any) -> Result:
    """(*, normalized) -> same. Keeps *."""
    free = x.ndim - len(normalized_shape)
    call.keep(x, range(free))
    return call.result([*x.axes[:free], *[None] * len(normalized_shape)], "LayerNorm takes statistics over it")


axis_rule(aten.rms_norm.default, samples=((tensor(4, 6, 8), [8], tensor(8)),))(layer_norm)


@axis_rule(
    aten.softmax.int,
    aten.log_softmax.int,
    samples=((tensor(4, 6, 5), -1), (tensor(4, 6, 5), 1)),
)
def softmax(call: Call, x: Operand, dim: int, *_: Any, **__: Any) -> Result:
    """Same shape; keeps every axis but ``dim``."""
    dim %= x.ndim
    call.keep(x, [d for d in range(x.ndim) if d != dim])
    return call.result([None if d == dim else axis for d, axis in enumerate(x.axes)], "softmax sums over it")


@axis_rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    samples=((tensor(4, 6, 5), [1]), (tensor(4, 6, 5), [-1, 0], True), (tensor(4, 6, 5), [])),
)
def reduce(call: Call, x: Operand, dims: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Result:
    """Reduces ``dims``; keeps the rest."""
    gone = {d % x.ndim for d in dims} if dims else set(range(x.ndim))
    call.keep(x, [d for d in range(x.ndim) if d not in gone])
    if keepdim:
        return call.result([() if d in gone else axis for d, axis in enumerate(x.axes)])
    return call.result([axis for d, axis in enumerate(x.axes) if d not in gone])
