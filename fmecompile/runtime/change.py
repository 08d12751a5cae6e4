"""How far a value moved since another step, and how far its frames move: one number each, told to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    difference = _wide(value - reference).abs_()
    size = _wide(reference).abs()
    if least:
        channels = 1 if value.dim() > 3 else -1
        by_token, of_token = difference.mean(channels), size.mean(channels)
        counts = by_token > least * of_token
        counts |= ~counts.any()
        return (by_token * counts).sum() / (of_token * counts).sum()
    return difference.mean() / size.mean()


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
    later, earlier = value[stride:], value[:-stride]
    return _norm(later - earlier) / (_norm(later) + _norm(earlier))


def _norm(value: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(value, 1, dtype=torch.promote_types(value.dtype, torch.float32))


def _wide(value: torch.Tensor) -> torch.Tensor:
    """In a dtype that holds the sum of a clip."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
