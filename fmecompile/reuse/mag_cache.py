"""MagCache: calibrated magnitude ratios of the residual say how far it drifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from fmecompile.reuse.calibration import Calibration
from fmecompile.reuse.guards import History
from fmecompile.reuse.options import number, numbers, whole
from fmecompile.reuse.policy import Cut, Mode, StaticPolicy
from fmecompile.reuse.steps import FULL, REUSE, Decision, Steps


@dataclass(frozen=True, kw_only=True)
class MagCache(StaticPolicy):
    """Reuse the residual of the block stack while its accumulated magnitude error is at most ``threshold``.

    ``ratios[i]`` is the mean over tokens of ||R_i|| / ||R_{i-1}|| of a calibration run, the first one 1; they are taken
    to the run's number of steps by the nearest step. From step int(``retention`` * N + 0.5) on, the ratios since the
    last full step multiply to p, and |1 - p| adds up to the error; at most ``max_skip`` steps in a row reuse.

    This is diffusers' rule. The authors' Wan script compares with ``<``, has no + 0.5, and keeps the ratios of both
    branches interleaved in one list. A full step that a guard forces starts the error anew like any other.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    cut: Cut = "block_stack"
    mode: Mode = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", numbers("ratios", self.ratios, 0))
        number("threshold", self.threshold, 0)
        number("retention", self.retention, 0, 1)
        whole("max_skip", self.max_skip, 1)

    @classmethod
    def from_calibration(cls, calibration: Calibration, *, cut: Cut | None = None, **options: Any) -> Self:
        """The policy for the model and the number of steps of ``calibration``: its ratios are not resampled. ``cut`` is
        by default that of ``MagCache``, or the only one whose residual was calibrated; ``options`` are the others.

        Raises ``OptionError`` where the cut's residual (or value, for another ``mode``) was not calibrated.
        """
        mode = "residual" if options.get("mode", cls.mode) == "residual" else "feature"
        record = calibration.record(cut, mode, cls.cut)
        return cls(ratios=record.trace.ratios, cut=record.cut, calibration=calibration.key, **options)

    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        self.check(steps)
        count = steps.known_count("MagCache")
        history, decided = History(self.guards, steps), []
        first = int(self.retention * count + 0.5)
        product, error, skipped = 1.0, 0.0, 0
        for step, ratio in enumerate(resample(self.ratios, count)):
            if step >= first:
                product, skipped = product * ratio, skipped + 1
                error += abs(1.0 - product)
            fits = step >= first and error <= self.threshold and skipped <= self.max_skip
            decided.append(history.admit(step, REUSE if fits else FULL))
            if decided[-1] == FULL:
                product, error, skipped = 1.0, 0.0, 0
        return tuple(decided)


def resample(values: Sequence[float], count: int) -> tuple[float, ...]:
    """``count`` of the values at even distances, first and last included, each the nearest; for one, the last.

    A place halfway between two takes the even index, as rounding does in the released code.
    """
    if count == 1:
        return (values[-1],)
    return tuple(values[round(Fraction(step * (len(values) - 1), count - 1))] for step in range(count))
