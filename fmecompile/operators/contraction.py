"""Matrix products, convolutions and attention: batch-like axes are kept, contracted ones reduced."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from fmecompile.graph.specs import node_spec
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION
from fmecompile.operators.pointwise import broadcast
from fmecompile.operators.registry import Axis, Call, Halo, Operand, Result, axis_rule, tensor

aten = torch.ops.aten


@axis_rule(
    aten.linear.default,
    samples=((tensor(4, 6, 5), tensor(7, 5), tensor(7)), (tensor(6, 5), tensor(3, 5)), (tensor(5), tensor(3, 5))),
)
def linear(call: Call, x: Operand, *_: Any) -> Result:
    """(*, in) -> (*, out). Keeps *, reduces in; the weight stays whole."""
    call.keep(x, range(x.ndim - 1))
    return call.result([*x.axes[:-1], None][: len(call.shape)], "linear mixes features")


@axis_rule(aten.bmm.default, samples=((tensor(4, 3, 5), tensor(4, 5, 6)),))
def bmm(call: Call, x: Operand, y: Operand) -> Result:
    """(B, M, K), (B, K, N) -> (B, M, N). Keeps B and M; y stays whole per batch."""
    call.keep(x, [1])
    batch: Axis | None = None
    if call.same(x.axes[0], y.axes[0]):
        batch = x.axes[0]
        call.keep(x, [0])
        call.keep(y, [0])
    return call.result([batch, x.axes[1], None], "the right operand of a matrix product stays whole")


@axis_rule(
    aten.matmul.default,
    samples=(
        (tensor(4, 3, 5), tensor(4, 5, 6)),
        (tensor(2, 4, 3, 5), tensor(5, 6)),
        (tensor(4, 3, 5), tensor(1, 5, 6)),
        (tensor(3, 5), tensor(4, 5, 6)),
        (tensor(5), tensor(4, 5, 6)),
    ),
)
def matmul(call: Call, x: Operand, y: Operand) -> Result:
    """(*, M, K), (*, K, N) -> (*, M, N). Keeps * and M; y stays whole in its last two."""
    if x.ndim < 2 or y.ndim < 2:
        return call.result([None] * len(call.shape), "a vector in a matrix product")
    axes = _batch_axes(call, [x, y])
    call.keep(x, [x.ndim - 2])
    return call.result([*axes, x.axes[-2], None], "the right operand of a matrix product stays whole")


@axis_rule(
    aten.addmm.default,
    samples=(
        (tensor(6), tensor(4, 5), tensor(5, 6)),
        (tensor(1, 6), tensor(4, 5), tensor(5, 6)),
        (tensor(4, 6), tensor(4, 5), tensor(5, 6)),
    ),
)
def addmm(call: Call, bias: Operand, x: Operand, y: Operand, **_: Any) -> Result:
    """(N), (M, K), (K, N) -> (M, N). Keeps M."""
    del y
    if bias.ndim > 1 and bias.shape[0] != 1:
        return call.result([None, None], "addmm with a full matrix to add")
    call.keep(x, [0])
    return call.result([x.axes[0], None], "the right operand of a matrix product stays whole")


def _batch_axes(call: Call, operands: Sequence[Operand]) -> list[Axis | None]:
    """Broadcast the leading dimensions of matrices; their last two are left alone."""
    leading = Call(call._table, [_leading(o) for o in operands], call.shape[:-2])
    axes = broadcast(leading, leading.operands)
    for operand, part in zip(operands, leading.operands, strict=True):
        call.keep(operand, part.kept)
    return axes


def _leading(operand: Operand) -> Operand:
    return Operand(operand.node, operand.spec.resized(operand.shape[:-2]), operand.axes[:-2])


@axis_rule(
    aten.scaled_dot_product_attention.default,
    samples=(
        (tensor(4, 2, 6, 8), tensor(4, 2, 5, 8), tensor(4, 2, 5, 8)),
        (tensor(4, 2, 6, 8), tensor(4, 2, 6, 8), tensor(4, 2, 6, 8), tensor(4, 1, 6, 6)),
        (tensor(3, 6, 8), tensor(3, 6, 8), tensor(3, 6, 8), None, 0.0, True),
        (tensor(4, 2, 6, 8), tensor(1, 2, 5, 8), tensor(1, 2, 5, 8), tensor(6, 5)),
        (tensor(4, 2, 6, 8), tensor(4, 2, 5, 8), tensor(4, 2, 5, 8), tensor(2, 6, 5)),
        (tensor(4, 2, 6, 8), tensor(4, 2, 5, 8), tensor(4, 2, 5, 8), tensor(4, 1, 1, 5, dtype=torch.bool)),
        (tensor(4, 4, 6, 8), tensor(4, 2, 6, 8), tensor(4, 2, 6, 8), {"enable_gqa": True}),
    ),
)
def attention(
    call: Call,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Operand | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    **kwargs: Any,
) -> Result:
    """(*, L, E), (*, S, E), (*, S, V) -> (*, L, V). Keeps batch, heads and queries; keys and values whole in S."""
    if dropout or kwargs.get("enable_gqa"):
        return call.result([None] * len(call.shape), "attention with dropout or grouped heads")
    axes = _batch_axes(call, [query, key, value] + ([mask] if mask is not None and mask.ndim > 2 else []))
    rows: Axis | None = query.axes[-2]
    if causal:
        rows = None
    elif mask is not None and mask.ndim >= 2 and mask.shape[-2] != 1:
        if call.same(query.axes[-2], mask.axes[-2]):
            call.keep(mask, [mask.ndim - 2])
        else:
            rows = None
    if rows is not None:
        call.keep(query, [query.ndim - 2])
    return call.result([*axes, rows, None], "attention mixes it")


@axis_rule(
    TEMPORAL_ATTENTION,
    samples=(
        (tensor(2, 4, 3, 2, 5), tensor(2, 4, 3, 2, 5), tensor(2, 4, 3, 2, 5)),
        (tensor(2, 3, 4, 1, 5), tensor(2, 6, 4, 1, 5), tensor(2, 6, 4, 1, 5), 0.5),
    ),
)
def temporal_attention(call: Call, query: Operand, key: Operand, value: Operand, *_: Any) -> Result:
    """(B, T, S, H, D), (B, K, S, H, D) twice -> (B, T, S, H, D). Keeps B, T, S and H; keys and values whole in K."""
    axes: list[Axis | None] = []
    for d, axis in enumerate(query.axes[:-1]):
        shared = [] if d == 1 else [key, value]
        if not all(call.same(axis, operand.axes[d]) for operand in shared):
            axes.append(None)
            continue
        for operand in (query, *shared):
            call.keep(operand, [d])
        axes.append(axis)
    return call.result([*axes, None], "attention mixes it")


def products(node: fx.Node) -> int:
    """How many products a convolution, or a matrix product with a weight, sums up; 0 for other calls."""
    if node.target not in _WEIGHTED:
        return 0
    spec, weight = node_spec(node), node_spec(node.args[1])  # type: ignore[arg-type]
    return spec.numel * prod(weight.shape[1:])


def all_products(node: fx.Node) -> int:
    """:func:`products`, and those of attention and of products of two activations."""
    if node.target in _KEYS:
        query, key, value = (node_spec(n) for n in node.args[:3])  # type: ignore[arg-type]
        return prod(query.shape[:-1]) * key.shape[_KEYS[node.target]] * (query.shape[-1] + value.shape[-1])
    if node.target in _OF_ACTIVATIONS:
        return node_spec(node).numel * node_spec(node.args[-2]).shape[-1]  # type: ignore[arg-type]
    return products(node)


_KEYS = {aten.scaled_dot_product_attention.default: -2, TEMPORAL_ATTENTION: 1}
"""Attentions, and the dimension that the keys lie along."""

_OF_ACTIVATIONS = (aten.bmm.default, aten.matmul.default, aten.addmm.default)
_WEIGHTED = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def _at(option: int | Sequence[int], dim: int) -> int:
    if isinstance(option, int):
        return option
    return option[dim] if len(option) > 1 else option[0]


def convolution(
    call: Call,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *_: Any,
) -> Result:
    """(N, C, *) -> (N, C', *). Keeps N, and each spatial dimension with the halo its kernel reaches over."""
    del bias
    kernel = weight.shape[2:]
    if x.ndim != len(kernel) + 2:
        return call.result([None] * len(call.shape), "convolution without a batch dimension")
    call.keep(x, [0])
    axes: list[Axis | None] = [x.axes[0], None]
    for d, size in enumerate(kernel):
        pad = None if isinstance(padding, str) else _at(padding, d)
        axes.append(_windowed(call, x, d + 2, _at(dilation, d) * (size - 1) + 1, _at(stride, d), pad))
    return call.result(axes, "a convolution mixes channels, and its kernel does not keep this axis")


def _windowed(call: Call, x: Operand, dim: int, reach: int, stride: int, padding: int | None) -> Axis | None:
    """The axis of a convolution's result whose row r reads ``reach`` rows from ``r * stride - padding``; None where the
    rows of both do not match up."""
    after = reach - stride - (padding or 0)
    if padding is None or after < 0 or x.shape[dim] != stride * call.shape[dim]:
        return None
    parts = call.split(x.axes[dim], [call.shape[dim], stride])
    if parts is None:
        return None
    call.keep_with_halo(x, dim, padding, after)
    return parts[0]


def zeros_at_borders(args: tuple[Any, ...], missing: dict[int, Halo]) -> tuple[list[int], tuple[Any, ...]]:
    """A convolution of a slice pads with zeros only where the whole tensor ends, unlike the one of the whole."""
    filled: tuple[Any, ...] = (*args, *_CONVOLUTION_DEFAULTS[len(args) :])
    x, weight, _, stride, padding, *rest = filled
    pads = [_at(padding, d) for d in range(len(weight.shape) - 2)]
    amounts = [0] * (2 * len(pads))
    for dim, (before, after) in missing.items():
        pads[dim - 2] = before if before == after else 0
        if before != after:
            back = len(x.shape) - 1 - dim
            amounts[2 * back : 2 * back + 2] = [before, after]
    return amounts, (stride, pads, *rest)


_CONVOLUTION_DEFAULTS = (None, None, None, [1], [0], [1], 1)  # input, weight, bias, stride, padding, dilation, groups

axis_rule(
    aten.conv1d.default,
    samples=(
        (tensor(4, 3, 8), tensor(5, 3, 3), tensor(5), [1], [1]),
        (tensor(2, 3, 12), tensor(5, 3, 5), None, [1], [4], [2]),
    ),
    at_borders=zeros_at_borders,
)(convolution)
axis_rule(
    aten.conv2d.default,
    samples=(
        (tensor(4, 3, 6, 5), tensor(5, 3, 3, 3), tensor(5), [1, 1], [1, 1]),
        (tensor(4, 3, 6, 5), tensor(5, 3, 1, 1), tensor(5)),
        (tensor(4, 3, 6, 5), tensor(5, 3, 1, 1), tensor(5), [1, 1], [1, 0]),
        (tensor(3, 6, 5), tensor(5, 3, 3, 3)),
        (tensor(4, 4, 6, 4), tensor(4, 2, 1, 3), None, [1, 2], [0, 1], [1, 1], 2),
        (tensor(2, 3, 8, 6), tensor(4, 3, 3, 3), None, [2, 2], [1, 1]),
        (tensor(2, 3, 8, 6), tensor(4, 3, 2, 3), None, [2, 1], [0, 0]),
    ),
    at_borders=zeros_at_borders,
)(convolution)
axis_rule(
    aten.conv3d.default,
    samples=(
        (tensor(2, 3, 5, 4, 6), tensor(4, 3, 3, 1, 1), tensor(4), [1, 1, 1], [1, 0, 0]),
        (tensor(3, 2, 4, 4, 3), tensor(4, 2, 3, 3, 3), None, [1, 1, 1], [1, 1, 1]),
    ),
    at_borders=zeros_at_borders,
)(convolution)
