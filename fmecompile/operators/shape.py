"""Operators that move, cut, join and repeat axes without arithmetic.

Literal sizes in their arguments (``view(x, [28, -1, 5, 64])``) hold for whole tensors; ``localise`` rewrites them for a
chunk from the shape its result has there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fmecompile.operators.registry import Axes, Axis, Call, Operand, Result, axis_rule, tensor

aten = torch.ops.aten


def _sizes_from_result(args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    return (args[0], list(shape), *args[2:])


def _parts_from_result(args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    x, dim, parts = args[:3]
    dim %= len(x.shape)
    return (x, dim, list(shape[dim : dim + len(parts)]))


def regroup(call: Call, x: Operand, shape: Sequence[int]) -> list[Axis | None]:
    """Axes of ``x`` viewed as ``shape``: matched block by block, where a block is the least run of dimensions of equal
    extent. A block whose atoms cannot be cut that way is reduced and produced whole."""
    axes: list[Axis | None] = []
    for ins, outs in blocks(x.shape, shape):
        flat = tuple(atom for d in ins for atom in x.axes[d])
        parts = call.split(flat, [shape[d] for d in outs])
        if parts is None:
            axes.extend([None] * len(outs))
        else:
            call.keep(x, ins)
            axes.extend(parts)
    return axes


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Least runs of dimensions of equal extent: ``(2, 14, 8) -> (28, 4, 2)``: ``[0, 1]:[0]`` and ``[2]:[1, 2]``."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = [], []
        if i < len(before):
            ins, i = [i], i + 1
        if j < len(after):
            outs, j = [j], j + 1
        while (left := prod(before[d] for d in ins)) != (right := prod(after[d] for d in outs)):
            if left < right:
                ins, i = [*ins, i], i + 1
            else:
                outs, j = [*outs, j], j + 1
        found.append((ins, outs))
    return found


@axis_rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    samples=(
        (tensor(4, 6, 5), [24, 5]),
        (tensor(24, 5), [2, 2, 6, 5]),
        (tensor(4, 6, 5), [2, 12, -1]),
        (tensor(1, 4, 6), [2, 2, 1, 6]),
    ),
    localise=_sizes_from_result,
)
def view(call: Call, x: Operand, *_: Any) -> Result:
    """Any shape of the same number of elements. Keeps every axis that the new shape does not cut across."""
    if 0 in call.shape:
        return call.result([None] * len(call.shape), "an empty tensor")
    return call.result(regroup(call, x, call.shape), "the new shape cuts across this axis")


@axis_rule(aten.squeeze.dim, samples=((tensor(4, 1, 5), 1), (tensor(4, 6), 1)))
def squeeze(call: Call, x: Operand, dim: int) -> Result:
    """Drops ``dim`` when its size is 1; else the dimension stays, and whole, as a chunk of one row would lose it."""
    if x.ndim == len(call.shape):
        return _all_but(call, x, dim, "squeeze would drop it from a chunk of one row")
    return view(call, x)


axis_rule(aten.flatten.using_ints, samples=((tensor(4, 6, 5), 0, 1),))(view)
axis_rule(aten.unsqueeze.default, samples=((tensor(4, 6), 1), (tensor(4, 6), -1)))(view)
axis_rule(
    aten.unflatten.int,
    samples=((tensor(4, 6), 1, [2, 3]), (tensor(4, 6), -1, [2, -1]), (tensor(4, 6), -2, [2, 2])),
    localise=_parts_from_result,
)(view)


def _moved(call: Call, x: Operand, order: Sequence[int]) -> Result:
    call.keep(x, range(x.ndim))
    return call.result([x.axes[d] for d in order])


@axis_rule(aten.permute.default, samples=((tensor(4, 6, 5), [2, 0, 1]), (tensor(4, 6, 5), [0, -1, 1])))
def permute(call: Call, x: Operand, order: Sequence[int]) -> Result:
    """Moves every axis."""
    return _moved(call, x, [d % x.ndim for d in order])


@axis_rule(aten.transpose.int, samples=((tensor(4, 6, 5), 1, -1),))
def transpose(call: Call, x: Operand, first: int, second: int) -> Result:
    """Swaps two axes."""
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return _moved(call, x, order)


@axis_rule(aten.t.default, samples=((tensor(4, 6),),))
def matrix_transpose(call: Call, x: Operand) -> Result:
    """Swaps the two axes of a matrix."""
    return _moved(call, x, list(range(x.ndim))[::-1])


def _all_but(call: Call, x: Operand, dim: int, reason: str) -> Result:
    dim %= x.ndim
    call.keep(x, [d for d in range(x.ndim) if d != dim])
    return call.result([None if d == dim else axis for d, axis in enumerate(x.axes)], reason)


@axis_rule(
    aten.slice.Tensor,
    samples=((tensor(4, 6, 5), 1, 2, 5), (tensor(4, 6, 5), -1, 0, 9223372036854775807), (tensor(4, 6, 5), 1, 0, 6, 2)),
)
def slice_(call: Call, x: Operand, dim: int = 0, *_: Any) -> Result:
    """Keeps every axis but ``dim``; ``dim`` too when all of it is taken."""
    if x.shape == call.shape:
        call.keep(x, range(x.ndim))
        return call.result(x.axes)
    return _all_but(call, x, dim, "a part is cut out of it")


@axis_rule(aten.select.int, samples=((tensor(4, 6, 5), 1, 2), (tensor(4, 6, 5), 0, -1)))
def select(call: Call, x: Operand, dim: int, *_: Any) -> Result:
    """Keeps every axis but ``dim``, which goes."""
    dim %= x.ndim
    call.keep(x, [d for d in range(x.ndim) if d != dim])
    return call.result([axis for d, axis in enumerate(x.axes) if d != dim])


@axis_rule(aten.flip.default, samples=((tensor(4, 6, 5), [1]),))
def flip(call: Call, x: Operand, dims: Sequence[int]) -> Result:
    """Keeps every axis that is not flipped."""
    gone = {d % x.ndim for d in dims}
    call.keep(x, [d for d in range(x.ndim) if d not in gone])
    return call.result([None if d in gone else axis for d, axis in enumerate(x.axes)], "its order is reversed")


@axis_rule(
    aten.cat.default,
    samples=(
        ([tensor(4, 3, 5), tensor(4, 2, 5)], 1),
        ([tensor(4, 3), tensor(4, 3)], -1),
        ([tensor(2, 3), tensor(4, 3)],),
    ),
)
def cat(call: Call, tensors: Sequence[Operand], dim: int = 0) -> Result:
    """Keeps every axis but ``dim``."""
    dim %= len(call.shape)
    return _joined(call, [(t, t.axes) for t in tensors if t.ndim == len(call.shape)], dim)


def _joined(call: Call, parts: list[tuple[Operand, Axes]], dim: int) -> Result:
    axes: list[Axis | None] = []
    for d in range(len(call.shape)):
        first = parts[0][1][d]
        if d == dim or not all(call.same(first, axis[d]) for _, axis in parts[1:]):
            axes.append(None)
            continue
        for operand, _ in parts:
            call.keep(operand, [d])
        axes.append(first)
    return call.result(axes, "tensors are joined along it")


@axis_rule(
    aten.expand.default,
    aten.broadcast_to.default,
    samples=((tensor(4, 1, 5), [4, 6, 5]), (tensor(6, 1), [4, -1, 5]), (tensor(1, 6), [3, 6])),
    localise=_sizes_from_result,
)
def expand(call: Call, x: Operand, *_: Any) -> Result:
    """Keeps every axis; stretched and new dimensions are fresh axes that may be sliced at will."""
    lead = len(call.shape) - x.ndim
    axes: list[Axis | None] = []
    for d, size in enumerate(call.shape):
        held = d >= lead and x.shape[d - lead] == size
        axes.append(x.axes[d - lead] if held else call.fresh(size))
    call.keep(x, [d for d in range(x.ndim) if x.shape[d] == call.shape[d + lead]])
    return call.result(axes)


def _repeats_from_result(args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    x = args[0]
    lead = (1,) * (len(shape) - len(x.shape))
    return (x, [size // old for size, old in zip(shape, (*lead, *x.shape), strict=True)])


@axis_rule(
    aten.repeat.default,
    samples=((tensor(4, 6), [3, 1]), (tensor(4), [2, 2]), (tensor(4, 6), [1, 1])),
    localise=_repeats_from_result,
)
def repeat(call: Call, x: Operand, *_: Any) -> Result:
    """Tiling: each dimension becomes [repeats, old], repeats fresh and free."""
    lead = len(call.shape) - x.ndim
    call.keep(x, range(x.ndim))
    axes: list[Axis | None] = [call.fresh(size) for size in call.shape[:lead]]
    for d in range(x.ndim):
        axes.append(call.fresh(call.shape[d + lead] // x.shape[d]) + x.axes[d] if x.shape[d] else None)
    return call.result(axes)


def _interleave_from_result(args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    x, dim = args[0], args[2] if len(args) > 2 else None
    if dim is None:
        return (x, prod(shape) // max(prod(x.shape), 1), *args[2:])
    return (x, shape[dim] // x.shape[dim], *args[2:])


@axis_rule(
    aten.repeat_interleave.self_int,
    samples=((tensor(4, 6), 3, 0), (tensor(4, 6), 2, -1), (tensor(4, 6), 2)),
    localise=_interleave_from_result,
)
def repeat_interleave(call: Call, x: Operand, repeats: int, dim: int | None = None, **_: Any) -> Result:
    """Each row ``repeats`` times: ``dim`` becomes [old, repeats], repeats fresh and free."""
    if dim is None:
        return call.result([None], "repeat_interleave over a flattened tensor")
    dim %= max(x.ndim, 1)
    call.keep(x, range(x.ndim))
    return call.result([axis + call.fresh(repeats) if d == dim else axis for d, axis in enumerate(x.axes)])


def _is_repeated(factors: Sequence[float] | None) -> bool:
    """Whether every row is repeated equally often; other factors are not the ratio of the sizes, where that is cut."""
    return factors is None or all(float(factor).is_integer() for factor in factors)


def _upsampled_size(args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    return (args[0], list(shape[2:]), None) if _is_repeated(args[2]) else args


@axis_rule(
    aten.upsample_nearest2d.vec,
    samples=(
        (tensor(4, 3, 6, 5), None, [2.0, 2.0]),
        (tensor(2, 3, 6, 4), [24, 8], None),
        (tensor(4, 3, 6, 5), [9, 7], None),
        (tensor(4, 3, 6, 5), [12, 7], None),
        (tensor(4, 3, 6, 5), None, [1.7, 4.3]),
    ),
    localise=_upsampled_size,
)
def upsample_nearest(
    call: Call, x: Operand, size: Sequence[int] | None = None, factors: Sequence[float] | None = None
) -> Result:
    """(N, C, H, W) -> (N, C, H', W'). Keeps N and C; a dimension stretched by a power of two becomes [old, ratio]."""
    del size
    call.keep(x, [0, 1])
    axes: list[Axis | None] = [x.axes[0], x.axes[1]]
    for d in range(2, x.ndim):
        ratio, rest = divmod(call.shape[d], x.shape[d])
        if rest or ratio & (ratio - 1) or not _is_repeated(factors):
            axes.append(None)
            continue
        call.keep(x, [d])
        axes.append(x.axes[d] + call.fresh(ratio))
    return call.result(axes, "resampling by this ratio reaches over neighbours")


def resample(call: Call, x: Operand, *_: Any) -> Result:
    """(N, C, H, W) -> (N, C, H', W'). Keeps N and C."""
    call.keep(x, [0, 1])
    return call.result([x.axes[0], x.axes[1], *[None] * (x.ndim - 2)], "resampling reaches over neighbours")


axis_rule(aten.upsample_bilinear2d.vec, samples=((tensor(4, 3, 6, 5), [9, 7], False, None),))(resample)


@axis_rule(
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    samples=((tensor(4, 3, 6, 4), [2, 2]), (tensor(3, 6, 4), [3, 3], [1, 1], [1, 1])),
)
def pool(call: Call, x: Operand, *_: Any) -> Result:
    """(*, H, W) -> (*, H', W'). Keeps *."""
    call.keep(x, range(x.ndim - 2))
    return call.result([*x.axes[:-2], None, None], "pooling reaches over neighbours")


@axis_rule(
    aten.pad.default, aten.constant_pad_nd.default, samples=((tensor(4, 6, 5), [1, 2]), (tensor(4, 6, 5), [0, 0, 1, 0]))
)
def pad(call: Call, x: Operand, amounts: Sequence[int], *_: Any) -> Result:
    """Keeps every axis that is not padded. Amounts come in pairs, the last dimension's first."""
    padded = {x.ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    same = [d for d in range(x.ndim) if d not in padded]
    call.keep(x, same)
    return call.result([x.axes[d] if d in same else None for d in range(x.ndim)], "it is padded")
