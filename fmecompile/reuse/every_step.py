"""No reuse but the lossless one: every step is full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmecompile.reuse.policy import Cut, StaticPolicy
from fmecompile.reuse.steps import FULL, Decision, Steps


@dataclass(frozen=True, kw_only=True)
class EveryStep(StaticPolicy):
    """What a diffusion pipeline is optimized with where no policy is asked for. Only what is the same at every step is
    made once, in a prologue, so the result is that of a run without reuse, bit for bit."""

    @property
    def needs_steps(self) -> bool:
        return False

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return {}

    def describe(self) -> str:
        return "every step is full"

    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        return (FULL,) * (steps.count or 0)
