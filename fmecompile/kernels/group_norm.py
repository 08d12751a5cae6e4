"""The two passes of a split GroupNorm over its operand: moments of rows, and apply with SiLU behind it.

What lies between them, joining the moments of all rows and chunks, is small and stays
:func:`fmecompile.runtime.norms.group_norm_statistics`.
"""

# pyright: reportInvalidTypeForm=false
# Without Triton its annotations are a stand-in.

import torch
from torch.nn import functional as F

from fmecompile.kernels.registry import jit, register, require, tl
from fmecompile.kernels.strides import BLOCK, computed_in, is_wide, joined, offsets, places, programs
from fmecompile.runtime import norms

_MAX_DIMS = 5


def group_norm_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(N, C, D1, ..., Dk) -> (2, N, G, D1, ..., Dk-1): mean and variance over C/G and Dk, in float32 or wider.

    Args:
        x: floating point, in any layout.

    Raises:
        OptionError: nothing behind the channels, or channels that ``num_groups`` does not divide.
    """
    return norms.group_norm_moments(x, num_groups)


def group_norm_apply(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    order: list[int] | None = None,
) -> torch.Tensor:
    """(N, C, *), (2, N, G) -> (N, C, *): ``(x - mean) * scale * weight + bias``, then SiLU where it is asked for.

    Args:
        x: floating point, in any layout.
        statistics: the mean and 1/sqrt(var + eps) of each group.
        order: the dimensions of the result from the outermost to the innermost in memory.

    Returns:
        A tensor of the dtype of ``x``, laid out as ``x`` where no order is given.

    Raises:
        OptionError: statistics of another batch, or of groups that do not divide the channels; no order of dimensions.
    """
    result = norms.group_norm_apply(x, statistics, weight, bias, order)
    return F.silu(result) if silu else result


def _empty_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    fits = x.ndim > 2 and num_groups > 0 and x.shape[1] % num_groups == 0
    next_step = "give it (N, C, D1, ...), and a number of groups that divides C"
    require(fits, f"moments of {num_groups} groups of {tuple(x.shape)}", next_step)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, x.shape[0], num_groups, *x.shape[2:-1]), dtype=wide)


def _empty_apply(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    order: list[int] | None = None,
) -> torch.Tensor:
    del weight, bias, silu
    shape = tuple(statistics.shape)
    fits = x.ndim > 1 and len(shape) == 3 and shape[:2] == (2, x.shape[0]) and x.shape[1] % max(shape[2], 1) == 0
    next_step = "give statistics (2, N, G) of a batch of N, and a G that divides C"
    require(fits, f"statistics {shape} for a norm of {tuple(x.shape)}", next_step)
    if order is None:
        return torch.empty_like(x)
    is_order = sorted(order) == list(range(x.ndim))
    require(is_order, f"an order {order} of {x.ndim} dimensions", "name each of them once")
    return norms.empty_in(x, order)


def _has_few_dims(x: torch.Tensor, *_: object) -> bool:
    return x.ndim <= _MAX_DIMS


def _launch_moments(out: torch.Tensor, x: torch.Tensor, num_groups: int) -> None:
    while x.ndim < _MAX_DIMS:
        x = x.unsqueeze(2)
    n, c, rows, columns, last = x.shape
    of_n, of_c, of_row, of_column, of_last = x.stride()
    per_group = c // num_groups
    parts = ((per_group, of_c), (last, of_last))
    (outer, of_outer), (inner, of_inner) = parts if of_last <= of_c else reversed(parts)
    _moments[(n * num_groups * rows * columns,)](
        out,
        x,
        out[0].numel(),
        (num_groups, rows, columns),
        (of_n, per_group * of_c, of_row, of_column),
        (outer, inner),
        (of_outer, of_inner),
        computed_in(x.dtype),
        is_wide(out, x),
        BLOCK,
    )


@jit
def _moments(
    out,
    x,
    count,
    sizes,
    strides,
    part,
    part_strides,
    WORK: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One group of one row: its share is read a block at a time, and the moments of the blocks are joined (Chan)."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    column, rest = program % sizes[2], program // sizes[2]
    row, rest = rest % sizes[1], rest // sizes[1]
    start = (rest // sizes[0]) * strides[0] + (rest % sizes[0]) * strides[1] + row * strides[2] + column * strides[3]
    total = part[0] * part[1]
    mean = tl.zeros((), WORK)
    squares = tl.zeros((), WORK)
    for seen in range(0, total, SIZE):
        place = seen + tl.arange(0, SIZE)
        inside = place < total
        address = x + start + (place // part[1]) * part_strides[0] + (place % part[1]) * part_strides[1]
        values = tl.load(address, inside, 0).to(WORK)
        size = tl.minimum(total - seen, SIZE).to(WORK)
        own = tl.sum(values, 0) / size
        centred = tl.where(inside, values - own, 0)
        share = size / (seen + size)
        apart = own - mean
        mean += apart * share
        squares += tl.sum(centred * centred, 0) + apart * apart * share * seen
    tl.store(out + program, mean)
    tl.store(out + count + program, squares / total)


def _launch_apply(
    out: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    order: list[int] | None = None,
) -> None:
    del order  # the result has it
    groups = statistics.shape[2]
    one, other = [0] * x.ndim, [0] * x.ndim
    one[0], other[1] = 1, 1
    sizes, (to, at, samples, channels) = joined(x.shape, out.stride(), x.stride(), one, other)
    _apply[programs(x.numel())](
        out,
        x,
        statistics.contiguous(),
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        x.numel(),
        groups,
        x.shape[1] // groups,
        x.shape[0] * groups,
        sizes,
        to,
        at,
        samples,
        channels,
        weight is not None,
        bias is not None,
        silu,
        computed_in(x.dtype),
        is_wide(out, x),
        BLOCK,
    )


@jit
def _apply(
    out,
    x,
    statistics,
    weight,
    bias,
    count,
    groups,
    per_group,
    scales,
    sizes,
    to,
    at,
    samples,
    channels,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    WORK: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
):
    place = places(WIDE, SIZE)
    inside = place < count
    channel = offsets(place, sizes, channels)
    group = offsets(place, sizes, samples) * groups + channel // per_group
    scale = tl.load(statistics + scales + group, inside).to(WORK)
    if WEIGHT:
        scale *= tl.load(weight + channel, inside).to(WORK)
    y = (tl.load(x + offsets(place, sizes, at), inside).to(WORK) - tl.load(statistics + group, inside)) * scale
    if BIAS:
        y += tl.load(bias + channel, inside).to(WORK)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out + offsets(place, sizes, to), y, inside)


GROUP_NORM_MOMENTS = register(group_norm_moments, _empty_moments, _launch_moments, _has_few_dims)
GROUP_NORM_APPLY = register(group_norm_apply, _empty_apply, _launch_apply)
