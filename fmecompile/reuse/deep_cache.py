"""DeepCache: the deep part of a U-Net every few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmecompile.reuse.options import whole
from fmecompile.reuse.policy import Cut, SchedulePolicy
from fmecompile.reuse.steps import ALL, FULL, REUSE, Decision, Steps


@dataclass(frozen=True, kw_only=True)
class DeepCache(SchedulePolicy):
    """Full at every ``interval``-th step from step 0 on; the others reuse the deep feature that meets the skip
    connection of ``branch`` (0 is the outermost: the least runs).

    This is the uniform schedule. The paper has an uneven one too, denser around a chosen step, and uses uniform where
    nothing is said. The released helper keeps the output of every module it wraps; here one value is kept.
    """

    interval: int = 3
    branch: int = 0
    cut: Cut = "deep_feature"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("interval", self.interval, 1)
        whole("branch", self.branch, 0)

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return {ALL: f"deep_feature:{self.branch}" if self.cut == "deep_feature" else self.cut}

    def wanted(self, steps: Steps) -> Sequence[Decision]:
        return [REUSE if step % self.interval else FULL for step in range(steps.known_count("DeepCache"))]
