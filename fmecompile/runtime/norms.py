"""The passes of a split GroupNorm: moments of rows, statistics of groups, then apply.

Moments are the mean and the population variance of a group's share of each row, in float32 or wider. They keep every
axis but channels and the last, so a loop may make them slice by slice; joining them is cheap. Parts of equal weight
join by the formula of Chan, Golub and LeVeque (1983): ``mean = mean(mean_i)`` and
``var = mean(var_i + (mean_i - mean)^2)``; so no large sum is ever subtracted from another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

_PIECE_BYTES, _MAX_PIECES = 16 << 20, 64
"""A large tensor is read in pieces of about so many bytes once in wide numbers, which is what moments hold twice."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_norm_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(N, C, D1, ..., Dk) -> (2, N, G, D1, ..., Dk-1): mean and variance over C/G and Dk, in float32 or wider.

    Reads ``x`` in whatever layout it has, a piece at a time along its outermost dimensions in memory.
    """
    pieces = -(-x.numel() * _wide(x.dtype).itemsize // _PIECE_BYTES)
    x = x.unflatten(1, (num_groups, x.shape[1] // num_groups))
    moments = x.new_empty((2, *x.shape[:2], *x.shape[3:-1]), dtype=_wide(x.dtype))
    seen: set[torch.Size] = set()
    for part, target in _pieces(x, moments, min(pieces, _MAX_PIECES)):
        if isinstance(x, FakeTensor) and part.shape in seen:
            continue  # without values one part of each shape tells all
        seen.add(part.shape)
        target.copy_(_row_moments(part))
    return moments


def _pieces(x: torch.Tensor, moments: torch.Tensor, pieces: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of (N, G, C/G, D1, ..., Dk), each with its place in (2, N, G, D1, ..., Dk-1)."""
    kept = [d for d in (0, *range(3, x.ndim - 1)) if x.shape[d] > 1]
    if pieces <= 1 or not kept:
        yield x, moments
        return
    along = max(kept, key=lambda d: (x.stride(d), x.shape[d]))
    rows = -(-x.shape[along] // pieces)
    parts = x.split(rows, along)
    for part, target in zip(parts, moments.split(rows, along or 1), strict=True):
        yield from _pieces(part, target, -(-pieces // len(parts)))


def _row_moments(x: torch.Tensor) -> torch.Tensor:
    """Moments over the last dimension, joined over C/G. Reduced in the order of memory: with channels innermost a row
    is a sum of vectors, which takes a tenth of the time of sums of strided numbers."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = [order.index(d) for d in range(x.ndim)]
    x, row = x.to(_wide(x.dtype)).permute(order), back[-1]
    means = x.mean(row, keepdim=True)
    variances = _squares(x - means, row) / x.shape[row]
    return torch.stack(_joined(means.permute(back).squeeze(-1), variances.permute(back).squeeze(-1), 2))


def _squares(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum of squares along ``dim``, which is kept. ``x`` may be written over."""
    if dim == x.ndim - 1:
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True).square()
    return x.square_().sum(dim, keepdim=True)


def _joined(means: torch.Tensor, variances: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the moments of parts of equal weight along ``dim``."""
    first = means.narrow(dim, 0, 1)
    mean = first + (means - first).mean(dim, keepdim=True)
    return mean.squeeze(dim), (variances + (means - mean).square()).mean(dim)


def group_norm_statistics(moments: torch.Tensor, eps: float) -> torch.Tensor:
    """(2, N, G, *) from :func:`group_norm_moments` -> (2, N, G): mean and 1/sqrt(var + eps) of each group."""
    means, variances = (m.flatten(2) if m.ndim > 2 else m.unsqueeze(2) for m in moments)
    mean, variance = _joined(means, variances, 2)
    return torch.stack([mean, torch.rsqrt(variance + eps)])


def group_norm_apply(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    order: Sequence[int] | None = None,
) -> torch.Tensor:
    """(N, C, *), (2, N, G) -> (N, C, *): normalise with statistics from :func:`group_norm_statistics`.

    The result is laid out as ``x``; or ``order`` has its dimensions from the outermost to the innermost in memory.
    """
    if order is not None:
        return _apply_into(empty_in(x, order), x, statistics, weight, bias)
    shift, scale = _affine(x, statistics, weight, bias)
    return torch.addcmul(shift, x, scale).to(x.dtype)


def empty_in(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Memory for a tensor like ``x``, its dimensions in ``order`` from the outermost to the innermost."""
    return x.new_empty([x.shape[d] for d in order]).permute([list(order).index(d) for d in range(x.ndim)])


def _apply_into(
    result: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Write :func:`group_norm_apply` to ``result``, in pieces where that is narrower than what it is computed in."""
    is_wide = statistics.dtype == x.dtype
    row_bytes = x[:1, :, :1].numel() * statistics.dtype.itemsize
    rows = x.shape[2] if is_wide else max(_PIECE_BYTES // row_bytes, 1)
    for n in range(1 if is_wide else x.shape[0]):
        samples = slice(None) if is_wide else slice(n, n + 1)
        shift, scale = _affine(x[samples], statistics[:, samples], weight, bias)
        for part, target in zip(x[samples].split(rows, 2), result[samples].split(rows, 2), strict=True):
            if is_wide:
                torch.addcmul(shift, part, scale, out=target)
            else:
                target.copy_(torch.addcmul(shift, part, scale))
    return result


def _affine(
    x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each channel of ``x`` is shifted by once it is scaled, and its scale."""
    mean, scale = statistics.repeat_interleave(x.shape[1] // statistics.shape[2], 2)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    spatial = (1,) * (x.ndim - 2)
    return shift.view(*shift.shape, *spatial), scale.view(*scale.shape, *spatial)


def group_norm_laid_out(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    order: Sequence[int],
) -> torch.Tensor:
    """A GroupNorm of (N, C, *) in any layout, without a copy of it; ``order`` has the dimensions of the result from the
    outermost to the innermost in memory."""
    statistics = group_norm_statistics(group_norm_moments(x, num_groups), eps)
    return _apply_into(empty_in(x, order), x, statistics, weight, bias)
