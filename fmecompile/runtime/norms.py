"""The two halves of a two-pass GroupNorm: statistics, then apply.

Statistics are accumulated in float32 or wider from the mean and the centred sum of squares of each slice, joined by
the formula of Chan, Golub and LeVeque (1983) for parts of weight ``w_i``: ``mean = sum(w_i mean_i)``,
``var = sum(w_i (var_i + (mean_i - mean)^2))``; so no large sum is ever subtracted from another.
"""

from __future__ import annotations

import torch

_PIECES = 16
"""A tensor is read in about this many pieces, so that statistics hold about a sixteenth of it at a time."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_norm_statistics(x: torch.Tensor, num_groups: int, eps: float) -> torch.Tensor:
    """(N, C, *) -> (2, N, num_groups): mean and 1/sqrt(var + eps) of each group, in float32 or wider.

    Reads ``x`` in whatever layout it has, a piece at a time along its outermost dimensions in memory.
    """
    grouped = x.unflatten(1, (num_groups, x.shape[1] // num_groups))
    rows = -(-x.shape[0] // _PIECES)
    batch = [_moments(part, -(-_PIECES * rows // x.shape[0])) for part in grouped.split(rows)]
    means, variances = (torch.cat(parts) for parts in zip(*batch, strict=True))
    return torch.stack([means, torch.rsqrt(variances + eps)])


def _moments(x: torch.Tensor, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, G, C/G, *) -> mean and population variance, each (N, G), joined over ``pieces`` along outer dimensions."""
    along = max(range(2, x.ndim), key=lambda d: (x.shape[d] > 1, x.stride(d), x.shape[d]))
    if pieces == 1 or x.shape[along] == 1:
        return _centred_moments(x)
    parts = x.split(-(-x.shape[along] // pieces), along)
    moments = [_moments(part, -(-pieces // len(parts))) for part in parts]
    means, variances = (torch.stack(m) for m in zip(*moments, strict=True))
    weights = means.new_tensor([p.shape[along] / x.shape[along] for p in parts]).view(-1, 1, 1)
    mean = means[0] + ((means - means[0]) * weights).sum(0)
    return mean, ((variances + (means - mean).square()) * weights).sum(0)


def _centred_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(_wide(x.dtype))
    dims = tuple(range(2, x.ndim))
    mean = x.mean(dims, keepdim=True)
    norm = torch.linalg.vector_norm(x - mean, dim=dims)
    return mean.flatten(1), norm.square() / x[0, 0].numel()


def group_norm_apply(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N, C, *), (2, N, G) -> (N, C, *): normalise with statistics from :func:`group_norm_statistics`."""
    per_group = x.shape[1] // statistics.shape[2]
    mean, scale = statistics.repeat_interleave(per_group, 2)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    spatial = (1,) * (x.ndim - 2)
    result = torch.addcmul(shift.view(*shift.shape, *spatial), x, scale.view(*scale.shape, *spatial))
    return result.to(x.dtype)
