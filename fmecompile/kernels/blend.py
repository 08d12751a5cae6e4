"""The blend of a spatial and a temporal branch, with the temporal branch's residual added on the way."""

# pyright: reportInvalidTypeForm=false
# Without Triton its annotations are a stand-in.

import torch

from fmecompile.kernels.registry import jit, register, require, tl
from fmecompile.kernels.strides import BLOCK, computed_in, is_wide, joined, offsets, places, programs


def blend(
    alpha: torch.Tensor, spatial: torch.Tensor, temporal: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``alpha * spatial + (1 - alpha) * (temporal + residual)``, all broadcast to the shape of ``spatial``.

    Returns:
        A tensor laid out as ``spatial``.

    Raises:
        OptionError: shapes that do not broadcast to that of ``spatial``, or more than one type of numbers.
    """
    branch = temporal if residual is None else temporal + residual
    return alpha * spatial + (1 - alpha) * branch


def _empty(
    alpha: torch.Tensor, spatial: torch.Tensor, temporal: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    operands = [t for t in (alpha, spatial, temporal, residual) if t is not None]
    shapes = [tuple(t.shape) for t in operands]
    fits = all(_broadcasts(t.shape, spatial.shape) for t in operands)
    require(fits, f"a blend of {shapes}", "give operands that broadcast to the second, the spatial branch")
    dtypes = {t.dtype for t in operands}
    require(len(dtypes) == 1, f"a blend of {', '.join(map(str, dtypes))}", "cast all operands to one type")
    return torch.empty_like(spatial)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _launch(
    out: torch.Tensor,
    alpha: torch.Tensor,
    spatial: torch.Tensor,
    temporal: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    added = temporal if residual is None else residual
    operands = [t.expand(out.shape) for t in (alpha, spatial, temporal, added)]
    sizes, strides = joined(out.shape, out.stride(), *(t.stride() for t in operands))
    _kernel[programs(out.numel())](
        out,
        *operands,
        out.numel(),
        sizes,
        *strides,
        residual is not None,
        computed_in(out.dtype),
        is_wide(out, *operands),
        BLOCK,
    )


@jit
def _kernel(
    out,
    alpha,
    spatial,
    temporal,
    residual,
    count,
    sizes,
    to,
    alpha_at,
    spatial_at,
    temporal_at,
    residual_at,
    ADDED: tl.constexpr,
    WORK: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
):
    place = places(WIDE, SIZE)
    inside = place < count
    a = tl.load(alpha + offsets(place, sizes, alpha_at), inside).to(WORK)
    s = tl.load(spatial + offsets(place, sizes, spatial_at), inside).to(WORK)
    t = tl.load(temporal + offsets(place, sizes, temporal_at), inside).to(WORK)
    if ADDED:
        t += tl.load(residual + offsets(place, sizes, residual_at), inside).to(WORK)
    tl.store(out + offsets(place, sizes, to), a * s + (1 - a) * t, inside)


BLEND = register(blend, _empty, _launch)
