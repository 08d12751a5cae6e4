"""Step Rehash: key steps by similarity to an anchor, fixed before the first run.

The paper's offline algorithm: step 0 is the first key and the anchor; the next step whose similarity to the anchor
falls below gamma becomes a key and the new anchor; the last step is a key. The paper appends the last step even where
it is one already; here it is added once. It doesn't say whether a reuse step hands on the value of the key step or one
computed again; here the value of the last key step is held, as a shallow graph does not compute it. It doesn't name
the similarity either; the cosine is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from fmecompile.errors import OptionError
from fmecompile.reuse.calibration import Calibration, neighbours
from fmecompile.reuse.options import number, numbers, whole
from fmecompile.reuse.policy import Cut, SchedulePolicy
from fmecompile.reuse.steps import FULL, REUSE, Decision, Steps

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class StepRehash(SchedulePolicy):
    """Full at key steps. Give ``full_steps`` or ``threshold`` (gamma, a cosine from -1 to 1).

    ``similarity[i][j]`` compares the cut's values of steps i and j, K x K, for K steps; a threshold needs it, and the
    run must have K steps. With it, ``full_steps`` finds gamma; where no gamma gives that many, the plan has the next
    lower number there is. Without it full steps are spread evenly, the first and the last step among them: no
    similarity is known, so none is assumed. In a run of no more steps than ``full_steps`` every step is full.

    Raises ``OptionError`` for options that do not fit together, and at ``plan`` for a run of another number of steps.
    """

    full_steps: int | None = None
    threshold: float | None = None
    similarity: Matrix | None = None
    cut: Cut = "last_up_temporal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.full_steps is None) == (self.threshold is None):
            raise OptionError(
                f"full_steps={self.full_steps!r} and threshold={self.threshold!r}: one of the two decides",
                next_step="give StepRehash(full_steps=13), or a threshold with a similarity matrix",
            )
        if self.similarity is not None:
            object.__setattr__(self, "similarity", _checked(self.similarity))
        if self.full_steps is not None:
            whole("full_steps", self.full_steps, 1 if self.similarity is None or len(self.similarity) == 1 else 2)
        if self.threshold is not None:
            number("threshold", self.threshold, -1, 1)
            if self.similarity is None:
                raise OptionError(
                    "threshold is compared with similarities, and there are none",
                    next_step="give similarity=..., StepRehash.from_similarity(matrix, threshold=...), or full_steps",
                )

    @classmethod
    def from_similarity(
        cls,
        matrix: Sequence[Sequence[float]],
        *,
        full_steps: int | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> Self:
        """The policy for a measured K x K matrix; ``options`` are those of every policy."""
        return cls(full_steps=full_steps, threshold=threshold, similarity=_checked(matrix), **options)

    @classmethod
    def from_calibration(
        cls,
        calibration: Calibration,
        *,
        full_steps: int | None = None,
        threshold: float | None = None,
        speedup: float | None = None,
        max_error: float | None = None,
        cut: Cut | None = None,
        **options: Any,
    ) -> Self:
        """The policy for the model and the number of steps of ``calibration``. Exactly one of these decides:
        ``full_steps``; ``threshold``; ``speedup``, that of the denoiser over full steps only, estimated as
        N / (full + (N - full) (1 - saved)); ``max_error``, the most that 1 - cosine of a reused value and its anchor
        may be (in the mean over what was calibrated).

        ``cut`` is by default that of ``StepRehash``, or the only one that was calibrated; ``options`` are those of
        every policy. Raises ``OptionError`` where the cut was not calibrated, or cannot give the speedup.
        """
        given = {"full_steps": full_steps, "threshold": threshold, "speedup": speedup, "max_error": max_error}
        if sum(value is not None for value in given.values()) != 1:
            raise OptionError(
                f"one of {', '.join(given)} decides, and {sum(v is not None for v in given.values())} are given",
                next_step="give StepRehash.from_calibration(c, full_steps=13)",
            )
        record = calibration.record(cut, "residual" if options.get("mode") == "residual" else "feature", cls.cut)
        matrix = record.trace.similarity
        if speedup is not None:
            full_steps = full_steps_for(speedup, len(matrix), record.saved)
        if max_error is not None:
            number("max_error", max_error, 0, 2)
            threshold = 1 - max_error
        fixed = {"cut": record.cut, "calibration": calibration.key}
        return cls.from_similarity(matrix, full_steps=full_steps, threshold=threshold, **options | fixed)

    @property
    def alike(self) -> tuple[float, float] | None:
        return neighbours(self.similarity) if self.similarity is not None and len(self.similarity) > 1 else None

    def wanted(self, steps: Steps) -> Sequence[Decision]:
        count = steps.known_count("StepRehash")
        full = self._keys(count)
        return [FULL if step in full else REUSE for step in range(count)]

    def _keys(self, count: int) -> frozenset[int]:
        if self.similarity is None:
            assert self.full_steps is not None
            return frozenset(spread(count, self.full_steps))
        if len(self.similarity) != count:
            raise OptionError(
                f"the similarities are of {len(self.similarity)} steps, the run has {count}",
                next_step=f"calibrate with {count} steps, or run {len(self.similarity)}",
            )
        gamma = self.threshold
        if gamma is None:
            assert self.full_steps is not None
            gamma = gamma_for(self.similarity, min(self.full_steps, count))
        return frozenset(keys(self.similarity, gamma))


def _checked(matrix: Any) -> Matrix:
    rows = list(matrix)
    checked = tuple(numbers(f"similarity[{at}]", row) for at, row in enumerate(rows))
    if not checked or any(len(row) != len(checked) for row in checked):
        raise OptionError(
            f"similarity has {len(checked)} rows of {sorted({len(row) for row in checked})} columns",
            next_step="give a square matrix, one row and one column per step",
        )
    return checked


def full_steps_for(speedup: float, count: int, saved: float) -> int:
    """The most full steps of ``count`` with which a run is ``speedup`` times as fast, where other steps save the share
    ``saved`` of their work. Raises ``OptionError`` where two are too many."""
    number("speedup", speedup, 1)
    least = min(2, count)
    best = count / (least + (count - least) * (1 - saved))
    if speedup > best:
        raise OptionError(
            f"speedup={speedup:g} is out of reach: with {least} of {count} steps full and {saved:.1%} saved by the "
            f"others it is {best:.2f}",
            next_step="ask for less, or calibrate a cut that saves more",
        )
    if not saved:
        return count
    return max(least, math.floor((count / speedup - count * (1 - saved)) / saved + 1e-9))


def spread(count: int, full_steps: int) -> tuple[int, ...]:
    """``full_steps`` of ``count`` steps at even distances, from the first to the last; only step 0 for one."""
    full_steps = min(full_steps, count)
    if full_steps == 1:
        return (0,)
    return tuple((2 * k * (count - 1) + full_steps - 1) // (2 * (full_steps - 1)) for k in range(full_steps))


def keys(matrix: Sequence[Sequence[float]], gamma: float) -> tuple[int, ...]:
    """The key steps of a K x K similarity matrix in ascending order; the first and the last step are among them."""
    found = [0]
    for step in range(1, len(matrix)):
        if matrix[step][found[-1]] < gamma:
            found.append(step)
    if found[-1] != len(matrix) - 1:
        found.append(len(matrix) - 1)
    return tuple(found)


def gamma_for(matrix: Sequence[Sequence[float]], full_steps: int) -> float:
    """The gamma that gives ``full_steps`` keys, from 2 to K (1 where K is 1); or, failing that, the most below.

    Keys change only where gamma passes a similarity, so those are the candidates. Bisection over them finds the target
    where similarity falls with distance, as then the number of keys grows with gamma. It need not otherwise: when
    bisection misses, every candidate is tried.
    """
    whole("full_steps", full_steps, min(2, len(matrix)), len(matrix))
    candidates = sorted({row[j] for i, row in enumerate(matrix) for j in range(i)})
    if not candidates:
        return 1.0
    candidates.append(math.nextafter(candidates[-1], math.inf))
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if len(keys(matrix, candidates[middle])) <= full_steps:
            low = middle
        else:
            high = middle - 1
    if len(keys(matrix, candidates[low])) == full_steps:
        return candidates[low]
    reached = [(count, gamma) for gamma in candidates if (count := len(keys(matrix, gamma))) <= full_steps]
    return max(reached)[1]
