"""The values that one place of a model takes over the steps of a generation, compared with one another.

Values go to host memory. The latest few are kept whole, for what compares neighbours; for similarities of all pairs
each value is kept too, or where that is too much a **count sketch** of it: m sums of all entries, each entry with a
random sign in a random one of them. The squared length of a difference of values is kept by sketches with a relative
standard error of at most sqrt(2 / m), whatever the values are (Charikar, Chen, Farach-Colton 2002); 1 - cosine is half
that of the difference of two values of length 1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from fmecompile.errors import OptionError
from fmecompile.reuse.calibration import LAGS, Matrix, Trace

CHUNK = 2**15
"""Entries that are taken to float64 at a time: 256 KiB stay in a cache; 2 MiB took up to thirty times as long."""

LEAST_SKETCH = 2**14
"""Sums of the smallest sketch: a relative standard error of 1.1 %."""

MOST = 1e9
"""Stands for the relative change of what was 0."""

SEED = 0


@dataclass(frozen=True)
class _Past:
    """A value, flat and on the host; its mean magnitude, and the norm of each of its tokens."""

    flat: torch.Tensor
    level: float
    norms: torch.Tensor


class Series:
    """The values of one place on one branch. ``limit_bytes`` are for what is kept of each step."""

    def __init__(self, place: str, limit_bytes: int) -> None:
        self._place, self._limit_bytes = place, limit_bytes
        self._pending: tuple[int, torch.Tensor] | None = None
        self._recent: deque[_Past] = deque(maxlen=LAGS)
        self._kept: list[torch.Tensor] = []
        self._squares: list[float] = []
        self._errors: tuple[list[float], ...] = ([], [], [])
        self._moved, self._ratios = [0.0], [1.0]
        self.sketch_entries = 0

    def add(self, step: int, value: torch.Tensor) -> None:
        """The value of ``step``; a second one of the same step takes the place of the first."""
        if self._pending is not None and self._pending[0] != step:
            self._commit()
        self._pending = step, value.detach().to("cpu")

    def trace(self) -> Trace:
        """The figures of all steps so far. What was kept is let go."""
        self._commit()
        errors = tuple(tuple(row) for row in self._errors)
        trace = Trace(self._similarity(), errors, tuple(self._moved), tuple(self._ratios))
        self._kept.clear()
        self._recent.clear()
        return trace

    @property
    def count(self) -> int:
        """Steps so far."""
        return len(self._squares) + (self._pending is not None)

    def _commit(self) -> None:
        if self._pending is None:
            return
        step, value = self._pending
        self._pending = None
        flat, norms = value.flatten(), _token_norms(value)
        square = _square(flat)
        if not square < float("inf"):
            raise OptionError(
                f"{self._place} has values at step {step} that are not finite",
                next_step="calibrate in another dtype, or look at the weights",
            )
        now = _Past(flat, _level(flat), norms)
        self._compare(now)
        self._recent.append(now)
        self._squares.append(square)
        self._kept.append(self._reduced(flat))

    def _compare(self, now: _Past) -> None:
        for lag, before in enumerate(reversed(self._recent), start=1):
            apart = _distance(now.flat, before.flat)
            self._errors[lag - 1].append(_relative(apart, now.level))
            if lag == 1:
                self._moved.append(_relative(apart, before.level))
                self._ratios.append(_ratio(now.norms, before.norms))

    def _reduced(self, flat: torch.Tensor) -> torch.Tensor:
        if flat.nbytes <= self._limit_bytes or len(flat) <= LEAST_SKETCH:
            return flat
        self.sketch_entries = max(self._limit_bytes // 4, LEAST_SKETCH)
        return sketch(flat, self.sketch_entries)

    def _similarity(self) -> Matrix:
        """Of values scaled to length 1, 1 - |difference|^2 / 2; lengths are exact, also where sketches are kept."""
        squares = torch.tensor(self._squares, dtype=torch.float64)
        scales = torch.where(squares > 0, squares.rsqrt(), 0)
        products = _products(self._kept) * scales[:, None] * scales
        own = products.diagonal()
        cosines = (1 - (own[:, None] + own - 2 * products) / 2).clamp(-1, 1)
        both = squares > 0
        cosines = torch.where(both[:, None] & both, cosines, (~both[:, None] & ~both).double())
        return tuple(tuple(row) for row in cosines.fill_diagonal_(1).tolist())


def sketch(flat: torch.Tensor, entries: int) -> torch.Tensor:
    """A count sketch of ``flat``: stretches of it, each with random signs and turned by a random distance, added up.

    The same signs and distances for all values of one length.
    """
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros(entries)
    for stretch in flat.split(entries):
        signs = torch.randint(0, 2, stretch.shape, generator=generator, dtype=torch.int8)
        at = int(torch.randint(entries, (), generator=generator))
        signed = stretch.float() * (2 * signs - 1)
        head = min(len(signed), entries - at)
        total[at : at + head] += signed[:head]
        total[: len(signed) - head] += signed[head:]
    return total


def _products(kept: list[torch.Tensor]) -> torch.Tensor:
    """Inner products of all pairs, (N, N) in float64."""
    total = torch.zeros(len(kept), len(kept), dtype=torch.float64)
    for start in range(0, len(kept[0]), CHUNK):
        chunk = torch.stack([flat[start : start + CHUNK].double() for flat in kept])
        total += chunk @ chunk.T
    return (total + total.T) / 2


def _square(flat: torch.Tensor) -> float:
    """The sum of squares, in float64."""
    return sum(float(wide @ wide) for wide in (chunk.double() for chunk in flat.split(CHUNK)))


def _level(flat: torch.Tensor) -> float:
    """The mean magnitude, in float64."""
    return sum(float(chunk.double().abs().sum()) for chunk in flat.split(CHUNK)) / max(len(flat), 1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean magnitude of the difference, in float64."""
    pairs = zip(one.split(CHUNK), other.split(CHUNK), strict=True)
    return sum(float((a.double() - b.double()).abs().sum()) for a, b in pairs) / max(len(one), 1)


def _token_norms(value: torch.Tensor) -> torch.Tensor:
    """The length of each token: over the second dimension of frames (N, C, ...), the last of sequences (N, T, C)."""
    if not value.ndim:
        return value.double().abs()
    wide = torch.promote_types(value.dtype, torch.float32)
    return torch.linalg.vector_norm(value, dim=1 if value.ndim > 3 else -1, dtype=wide).double()


def _ratio(now: torch.Tensor, before: torch.Tensor) -> float:
    """The mean ratio of the norms of tokens; tokens that were 0 do not count."""
    known = before > 0
    return min(float((now[known] / before[known]).mean()), MOST) if known.any() else 1.0


def _relative(apart: float, level: float) -> float:
    return min(apart / level, MOST) if level else (MOST if apart else 0.0)
