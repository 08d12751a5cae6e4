"""Operators that compute every element from the elements at the same place: all axes are kept."""

from __future__ import annotations

from typing import Any

import torch

from fmecompile.kernels.blend import BLEND
from fmecompile.kernels.geglu import GEGLU
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY
from fmecompile.operators.registry import Axis, Call, Operand, Result, axis_rule, tensor
from fmecompile.runtime.host import to_device, to_host
from fmecompile.runtime.norms import group_norm_apply

aten = torch.ops.aten


def broadcast(call: Call, operands: list[Operand]) -> list[Axis | None]:
    """Unify the axes of ``operands`` against the result under broadcasting (aligned right, size 1 stretches)."""
    axes: list[Axis | None] = []
    for dim, size in enumerate(call.shape):
        back = len(call.shape) - dim
        carriers = [(o, o.ndim - back) for o in operands if o.ndim >= back and o.shape[o.ndim - back] == size]
        if size == 1 or not carriers:
            axes.append(() if size == 1 else call.fresh(size))
            continue
        first = carriers[0][0].axes[carriers[0][1]]
        if all(call.same(first, o.axes[d]) for o, d in carriers[1:]):
            for operand, d in carriers:
                call.keep(operand, [d])
            axes.append(first)
        else:
            axes.append(None)
    return axes


def pointwise_rule(call: Call, *_: Any, **__: Any) -> Result:
    """Same shape in and out, up to broadcasting. Keeps every axis."""
    return call.result(broadcast(call, call.operands), "operands cut this axis in different places")


_ONE = ((tensor(4, 6, 5),),)
_TWO = ((tensor(4, 6, 5), tensor(4, 6, 5)), (tensor(4, 6, 5), tensor(6, 1)), (tensor(4, 6, 5), 2.0))
_OUTER = ((tensor(4, 1), tensor(1, 6)), (tensor(5), tensor(4, 1, 1)))
_SCALAR = ((tensor(4, 6, 5), 2.0),)


def pointwise(*targets: Any, samples: Any = _ONE) -> None:
    axis_rule(*targets, samples=samples)(pointwise_rule)


pointwise(
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.exp.default,
    aten.sin.default,
    aten.cos.default,
    aten.neg.default,
    aten.abs.default,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.log.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.elu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.reciprocal.default,
    aten.square.default,
    aten.zeros_like.default,
    aten.ones_like.default,
)
pointwise(to_host, samples=_ONE)
pointwise(to_device, samples=((tensor(4, 6, 5), torch.device("cpu")),))
pointwise(aten.alias.default, aten.detach.default)
pointwise(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, samples=_TWO + _OUTER)
pointwise(aten.maximum.default, aten.minimum.default, samples=_TWO[:2])
pointwise(
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.rsub.Scalar,
    aten.pow.Tensor_Scalar,
    aten.clamp_min.default,
    aten.clamp_max.default,
    samples=_SCALAR,
)
pointwise(aten.clamp.default, samples=((tensor(4, 6, 5), -0.5, 0.5),))
pointwise(
    aten.lt.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.ge.Scalar, aten.eq.Scalar, aten.ne.Scalar, samples=_SCALAR
)
pointwise(aten.lt.Tensor, aten.gt.Tensor, aten.le.Tensor, aten.ge.Tensor, aten.eq.Tensor, samples=_TWO[:2])
pointwise(aten.to.dtype, samples=((tensor(4, 6, 5), torch.float32),))
pointwise(aten._to_copy.default, samples=((tensor(4, 6, 5), {"dtype": torch.float32}),))
pointwise(aten.where.self, samples=((tensor(4, 6, 5, dtype=torch.bool), tensor(6, 1), tensor(4, 6, 5)),))
pointwise(aten.addcmul.default, samples=((tensor(6, 1), tensor(4, 6, 5), tensor(6, 1)),))
pointwise(aten.lerp.Scalar, samples=((tensor(4, 6, 5), tensor(4, 6, 5), 0.25),))
pointwise(aten.lerp.Tensor, samples=((tensor(4, 6, 5), tensor(4, 6, 5), tensor(6, 1)),))
pointwise(
    BLEND,
    samples=(
        (tensor(4, 1, 1), tensor(4, 6, 5), tensor(4, 6, 5), tensor(4, 6, 5)),
        (tensor(1), tensor(4, 6, 5), tensor(6, 5)),
    ),
)


@axis_rule(GEGLU, samples=((tensor(4, 6, 10),), (tensor(4, 10), True)))
def geglu(call: Call, x: Operand, *_: Any) -> Result:
    """(*, 2n) -> (*, n). Keeps *; an element of the result reads one of either half."""
    call.keep(x, range(x.ndim - 1))
    return call.result([*x.axes[:-1], None], "its two halves are joined")


_APPLIED = (
    (tensor(3, 8, 4, 6), tensor(2, 3, 2), tensor(8), tensor(8)),
    (tensor(3, 8, 5), tensor(2, 3, 4), None, None),
    (tensor(1, 8, 5), tensor(2, 1, 4), tensor(8), None),
)


@axis_rule(GROUP_NORM_APPLY, samples=(*_APPLIED, (tensor(3, 8, 4, 6), tensor(2, 3, 2), None, tensor(8), True)))
@axis_rule(group_norm_apply, samples=_APPLIED)
def apply_rule(
    call: Call, x: Operand, statistics: Operand, weight: Operand | None = None, bias: Operand | None = None, *_: Any
) -> Result:
    """(N, C, *), (2, N, G) -> (N, C, *). Keeps N and *; channels stay whole, as they are matched to groups."""
    del weight, bias
    call.keep(x, [0, *range(2, x.ndim)])
    if x.shape[0] != 1 and call.same(x.axes[0], statistics.axes[1]):
        call.keep(statistics, [1])
        batch: Axis | None = x.axes[0]
    else:
        batch = () if x.shape[0] == 1 else None
        x.kept.discard(0)
    return call.result([batch, None, *x.axes[2:]], "channels are matched to their groups' statistics")
