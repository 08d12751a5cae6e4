"""AdaCache: each full step sets the distance to the next one, from how fast a watched value changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fmecompile.errors import OptionError
from fmecompile.reuse.options import number, whole, window
from fmecompile.reuse.policy import Cut, FeedbackPolicy, FeedbackRun
from fmecompile.reuse.steps import FULL, REUSE, Decision, Steps

Codebook = tuple[tuple[float, int], ...]

FAST_100: Codebook = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
FAST_30: Codebook = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (1.0, 1))
SLOW_30: Codebook = ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.4, 1), (1.0, 1))


@dataclass(frozen=True, kw_only=True)
class AdaCache(FeedbackPolicy):
    """Steps between full steps by the first ``codebook`` threshold above the change per step, else by its last entry.

    A book is pairs (threshold, distance to the next full step) or a mapping, thresholds ascending. Released were
    ``FAST_100`` for 100 steps and ``FAST_30``, ``SLOW_30`` for 30, all for Open-Sora. Steps 1, N-1 and N, counted from
    1, are full.

    The change is told after a full step: of the ``watch`` value against its last full step, over batch, tokens and
    channels, with the older value in the denominator; where several blocks vote, their mean.

    With ``moreg`` the change of the steps ``moreg_steps`` (from 1, ends included; None is a tenth to nine tenths of the
    run, released were 10..90 of 100 and 4..26 of 30) is weighed by motion: the mean over frame strides s of
    mean|v[s:] - v[:-s]| / (mean|v[s:]| + mean|v[:-s]|), taken by the runtime. The released code raises
    motion / 0.385 to the power 8 and divides by 1; its tuple ``1,2`` may have been meant as 1.2. We follow the code.
    """

    codebook: Codebook = SLOW_30
    watch: str = "temporal_attention"
    moreg: bool = False
    moreg_steps: tuple[int, int] | None = None
    moreg_scale: float = 0.385
    moreg_power: float = 8.0
    moreg_gain: float = 10.0
    cut: Cut = "block_residuals"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "codebook", _checked(self.codebook))
        number("moreg_scale", self.moreg_scale, 1e-9)
        number("moreg_power", self.moreg_power, 0)
        number("moreg_gain", self.moreg_gain, 0)
        if self.moreg_steps is not None:
            window("moreg_steps", self.moreg_steps)
            whole("moreg_steps[0]", self.moreg_steps[0], 1)

    @property
    def needs_steps(self) -> bool:
        return True

    @property
    def probe(self) -> str:
        return self.watch

    @property
    def needs_motion(self) -> bool:
        return self.moreg

    def start(self, steps: Steps) -> FeedbackRun:
        self.check(steps)
        return _Pace(self, steps)


def _checked(codebook: Any) -> Codebook:
    listed = [tuple(pair) for pair in (codebook.items() if isinstance(codebook, Mapping) else codebook)]
    if not listed or any(len(pair) != 2 for pair in listed):
        raise OptionError(f"codebook={codebook!r} holds no pairs", next_step="give ((0.08, 3), (0.16, 2), (1.0, 1))")
    pairs = tuple((threshold, distance) for threshold, distance in listed)
    for at, (threshold, distance) in enumerate(pairs):
        number(f"codebook[{at}][0]", threshold, pairs[at - 1][0] if at else 0)
        whole(f"codebook[{at}][1]", distance, 1)
    return pairs


def distance_for(codebook: Codebook, change: float) -> int:
    """Steps to the next full step for a change per step."""
    return next((distance for threshold, distance in codebook if change < threshold), codebook[-1][1])


class _Pace(FeedbackRun):
    """Steps are counted from 0 here and from 1 in the releases."""

    def __init__(self, policy: AdaCache, steps: Steps) -> None:
        super().__init__(policy.guards, steps)
        self._policy, self._count = policy, steps.known_count("AdaCache")
        self._before, self._last, self._distance = 0, 0, 1
        self._weight = 1.0

    def decide(self, step: int) -> Decision:
        due = step - self._last >= self._distance or step in (0, self._count - 2, self._count - 1)
        decision = self._history.admit(step, FULL if due else REUSE)
        if decision == FULL:
            self._before, self._last = self._last, step
        return decision

    def observe(self, step: int, change: float | None, motion: float | None = None) -> None:
        """Sets the distance; one step where a figure is missing or not finite, as nothing is known to hold."""
        self._distance = 1
        if change is None or not math.isfinite(change):
            return
        apart = max(1, self._last - self._before)
        weight = self._motion_weight(step + 1, motion, apart) if self._policy.moreg else 1.0
        if weight is not None:
            self._distance = distance_for(self._policy.codebook, weight * change / apart)

    def _motion_weight(self, c: int, motion: float | None, apart: int) -> float | None:
        """The power of the motion at step ``c`` (from 1), 1 outside the range of steps, plus its slope."""
        policy = self._policy
        low, high = policy.moreg_steps or (round(0.1 * self._count), round(0.9 * self._count))
        weight = 1.0
        if low <= c <= high:
            if motion is None or not math.isfinite(motion):
                return None
            weight = (motion / policy.moreg_scale) ** policy.moreg_power
        slope = policy.moreg_gain * (weight - self._weight) / apart
        self._weight = weight
        return weight + abs(slope)
