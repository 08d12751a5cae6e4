"""FasterCache: attention extrapolated at every other step, and the unconditional branch rebuilt by frequency.

Step numbers c count from 1 as in the paper. They were released for the 30 steps of Open-Sora and are stretched to other
numbers of steps unless given.

Attention, after c = 7, at every other step: A1 + (A1 - A0) * w(c), where A1 was computed last and A0 before it.

Guidance, after c = 11, except at every 5th step: only the conditional branch runs, and

    uncond = real(ifft2(ifftshift((dLow + low) + (dHigh + high))))

for each frame, where low + high is fftshift(fft2(conditional output)) split by a disc of radius min(H, W) // 5, and
dLow, dHigh are the same parts of unconditional minus conditional at the last step that ran both. Each such step first
multiplies them, cumulatively, by ``frequency_factors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmecompile.errors import OptionError
from fmecompile.reuse.options import number, whole
from fmecompile.reuse.policy import Cut, Mode, SchedulePolicy
from fmecompile.reuse.steps import ATTENTION, UNCOND, Decision, Steps

RELEASED_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class FasterCache(SchedulePolicy):
    """Both parts, or one with ``attention=False`` or ``guidance=False``. Decisions name ATTENTION and UNCOND.

    ``*_after``, ``low_until`` and ``high_from`` are step numbers from 1; None is the released 7, 11, 25 and 20 of 30.
    The first two must leave enough to reuse: two computed attentions, one step that ran both branches. ``mode``
    ``forecast`` extrapolates attention (order 1); ``feature`` repeats it.

    Differences. Once the unconditional branch has been skipped, the kept attention is of the conditional one. At a step
    that runs both again (c = 20, 30) the released code takes it for both, by broadcasting; here such a step computes
    attention. Before (c = 8, 10) attention of both branches is reused as released, where diffusers reuses it only in
    steps with half the batch. diffusers also has windows of timesteps for step numbers, 0.5 for w and 1.1 for 1.15.
    """

    attention: bool = True
    guidance: bool = True
    attention_after: int | None = None
    attention_every: int = 2
    attention_gain: float = 0.9
    guidance_after: int | None = None
    guidance_every: int = 5
    frequency_gain: float = 1.15
    low_until: int | None = None
    high_from: int | None = None
    cut: Cut = "attention"
    mode: Mode = "forecast"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.attention or self.guidance):
            raise OptionError("nothing is reused", next_step="leave attention or guidance on")
        if self.mode == "residual" or self.order != 1 or self.clock != "step":
            raise OptionError(
                f"mode={self.mode!r}, order={self.order}, clock={self.clock!r}: not how attention is reused here",
                next_step='give mode="forecast" or mode="feature", and leave order and clock',
            )
        for name, least in (("attention_after", 2), ("guidance_after", 1), ("low_until", 0), ("high_from", 0)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least)
        whole("attention_every", self.attention_every, 1)
        whole("guidance_every", self.guidance_every, 1)
        number("attention_gain", self.attention_gain)
        number("frequency_gain", self.frequency_gain, 0)

    @property
    def needs_guidance(self) -> bool:
        return self.guidance

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return {ATTENTION: self.cut} if self.attention else {}

    def wanted(self, steps: Steps) -> Sequence[Decision]:
        count = steps.known_count("FasterCache")
        return [self._at(c, count) for c in range(1, count + 1)]

    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        """Attention is settled after the guards: kept values of one branch don't serve a step that runs both."""
        decided, has_skipped = [], False
        for decision in super().plan(steps):
            has_skipped = has_skipped or UNCOND in decision
            serves = UNCOND in decision or not has_skipped
            decided.append(decision if serves else decision - {ATTENTION})
        return tuple(decided)

    def _at(self, c: int, count: int) -> Decision:
        found = set()
        if self.guidance and c > self._stretched("guidance_after", 11, count, 1) and c % self.guidance_every:
            found.add(UNCOND)
        past = c - self._stretched("attention_after", 7, count, 2)
        if self.attention and past > 0 and past % self.attention_every:
            found.add(ATTENTION)
        return frozenset(found)

    def _stretched(self, name: str, released: int, count: int, least: int) -> int:
        given = getattr(self, name)
        return max(least, round(released * count / RELEASED_STEPS)) if given is None else given

    def coefficients(self, steps: Steps, step: int, computed: Sequence[int]) -> tuple[float, ...]:
        """For attention: (1, w(c) * distance of the last two computed steps), since D_1 is divided by that distance."""
        if self.mode != "forecast":
            return (1.0,)
        if len(computed) < 2:
            return (1.0, 0.0)
        count = steps.known_count("FasterCache")
        after = self._stretched("attention_after", 7, count, 2)
        weight = attention_weight(step + 1, after, 20 * count / RELEASED_STEPS, self.attention_gain)
        return (1.0, weight * (computed[-1] - computed[-2]))

    def factors(self, steps: Steps, step: int) -> tuple[float, float]:
        """What dLow and dHigh are multiplied by at a step that skips the unconditional branch."""
        count = steps.known_count("FasterCache")
        low, high = self._stretched("low_until", 25, count, 0), self._stretched("high_from", 20, count, 0)
        return frequency_factors(step + 1, low, high, self.frequency_gain)


def attention_weight(c: int, after: int = 7, span: float = 20.0, gain: float = 0.9) -> float:
    """w(c), 0 at ``after`` and ``gain`` at ``span`` steps past it; it goes on rising, to 1.035 at c = 30."""
    return gain * (c - after) / span


def frequency_factors(c: int, low_until: int = 25, high_from: int = 20, gain: float = 1.15) -> tuple[float, float]:
    """(low, high): the low part grows up to step ``low_until``, the high one from step ``high_from`` on."""
    return (gain if c <= low_until else 1.0, gain if c >= high_from else 1.0)
