"""GEGLU: the halves of a projection to ``value * gelu(gate)``, without anything in between."""

# pyright: reportInvalidTypeForm=false
# Without Triton its annotations are a stand-in.

import math

import torch
from torch.nn import functional as F

from fmecompile.kernels.registry import jit, register, require, tl
from fmecompile.kernels.strides import BLOCK, computed_in, is_wide, joined, offsets, places, programs


def geglu(x: torch.Tensor, approximate: bool = False) -> torch.Tensor:
    """(*, 2n) -> (*, n), contiguous: the first half of the last dimension times gelu of the second.

    Args:
        x: floating point, in any layout.
        approximate: gelu by tanh, not by erf.

    Raises:
        OptionError: the last dimension has no two halves.
    """
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate, approximate="tanh" if approximate else "none")


def _empty(x: torch.Tensor, approximate: bool = False) -> torch.Tensor:
    del approximate
    is_even = x.ndim > 0 and x.shape[-1] % 2 == 0
    require(is_even, f"geglu of {tuple(x.shape)}", "give it a last dimension that has two halves")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _launch(out: torch.Tensor, x: torch.Tensor, approximate: bool = False) -> None:
    value, gate = x.chunk(2, -1)
    sizes, (to, at) = joined(out.shape, out.stride(), value.stride())
    _kernel[programs(out.numel())](
        out, value, gate, out.numel(), sizes, to, at, approximate, computed_in(x.dtype), is_wide(out, x), BLOCK
    )


@jit
def _kernel(
    out,
    value,
    gate,
    count,
    sizes,
    to,
    at,
    TANH: tl.constexpr,
    WORK: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
):
    place = places(WIDE, SIZE)
    inside = place < count
    read = offsets(place, sizes, at)
    v = tl.load(value + read, inside).to(WORK)
    g = tl.load(gate + read, inside).to(WORK)
    if TANH:  # (1 + tanh(z)) / 2 is the sigmoid of 2 z
        gated = g * tl.sigmoid((g + g * g * g * TANH_CUBE) * TANH_SCALE)
    else:
        gated = g * 0.5 * (1 + tl.erf(g * SQRT_HALF))
    tl.store(out + offsets(place, sizes, to), v * gated, inside)


SQRT_HALF = tl.constexpr(math.sqrt(0.5))
TANH_SCALE, TANH_CUBE = tl.constexpr(2 * math.sqrt(2 / math.pi)), tl.constexpr(0.044715)

GEGLU = register(geglu, _empty, _launch)
