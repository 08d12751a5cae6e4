"""How far a value moved since another step, and how far its frames move: one number each, told to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PART = 2**22
"""Numbers that are compared at a time."""

MOTION_STRIDES = (1,)
"""Distances between the frames that are compared; the released AdaCache compares neighbours."""


@dataclass(frozen=True)
class Frames:
    """Where a tensor has its frames: dimension ``dim`` is (outer, ``count``, inner) with the frames in the middle."""

    dim: int
    outer: int
    count: int
    inner: int

    def first(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` with the frames alone in dimension 0; a view where strides allow it."""
        shape = (*value.shape[: self.dim], self.outer, self.count, self.inner, *value.shape[self.dim + 1 :])
        return value.reshape(shape).movedim(self.dim + 1, 0)


def changes(now: Sequence[torch.Tensor], then: Sequence[torch.Tensor], least: float = 0.0) -> torch.Tensor:
    """mean|v - v_ref| / mean|v_ref|, averaged over the values: a 0-d tensor on their device.

    ``least``: only tokens whose own change is more than that count, all of them where none is. Tokens are what is left
    without the channels: dimension 1 of four or five, else the last.
    """
    found = [_change(value, reference, least) for value, reference in zip(now, then, strict=True)]
    return torch.stack(found).mean()


def _change(value: torch.Tensor, reference: torch.Tensor, least: float) -> torch.Tensor:
    """Both sums over all tokens and over those that count, a few rows at a time so that next to nothing is held."""
    rows = max(1, PART * value.shape[0] // max(value.numel(), 1))
    channels = 1 if value.dim() > 3 else -1
    sums = torch.zeros(4, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32, device=value.device)
    for now, then in zip(value.split(rows), reference.split(rows), strict=True):
        moved, size = ((now - then).abs_(), then.abs())
        moved, size = (part.sum(channels, dtype=sums.dtype) for part in (moved, size))
        counts = moved > least * size
        sums += torch.stack([(moved * counts).sum(), (size * counts).sum(), moved.sum(), size.sum()])
    if not least:
        return sums[2] / sums[3]
    return torch.where(sums[1] > 0, sums[0] / sums[1], sums[2] / sums[3])


def motion(values: Sequence[torch.Tensor], frames: Sequence[Frames]) -> torch.Tensor:
    """The mean over values and strides s of |v[s:] - v[:-s]|_1 / (|v[s:]|_1 + |v[:-s]|_1) along frames: a 0-d tensor.
    Not finite where there are no two frames."""
    found = [
        _motion(placed.first(value), stride)
        for value, placed in zip(values, frames, strict=True)
        for stride in MOTION_STRIDES
        if stride < placed.count
    ]
    return torch.stack(found).mean() if found else torch.tensor(float("nan"))


def _motion(value: torch.Tensor, stride: int) -> torch.Tensor:
    pairs = [(_norm(now - then), _norm(now) + _norm(then)) for now, then in zip(value[stride:], value, strict=False)]
    moved, size = map(torch.stack, zip(*pairs, strict=True))
    return moved.sum() / size.sum()


def _norm(value: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(value, 1, dtype=torch.promote_types(value.dtype, torch.float32))
