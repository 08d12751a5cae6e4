"""TaylorSeer: every few steps computed, those between forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmecompile.reuse.forecast import Form
from fmecompile.reuse.options import whole
from fmecompile.reuse.policy import Mode, SchedulePolicy
from fmecompile.reuse.steps import FULL, REUSE, Decision, Steps


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(SchedulePolicy):
    """Full before step ``before``, at step ``before`` + 1 and every ``interval`` steps from there, and from ``after``.

    The schedule is diffusers', which therefore reuses step ``before`` itself. The forecast is the release's too
    (``form="taylor"``, distances in steps). ``form="newton"`` is exact on polynomials where the release, from order 2
    on, is not; ``clock`` measures distances in timesteps or sigmas, which matters where they are uneven. The release
    wraps every block, here one cut is forecast: order + 1 tensors are kept.
    """

    interval: int = 5
    before: int = 3
    after: int | None = None
    mode: Mode = "forecast"
    form: Form = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("interval", self.interval, 1)
        whole("before", self.before, 1)
        if self.after is not None:
            whole("after", self.after, 0)

    def wanted(self, steps: Steps) -> Sequence[Decision]:
        count = steps.known_count("TaylorSeer")
        after = count if self.after is None else self.after
        return [FULL if self._is_full(step) or step >= after else REUSE for step in range(count)]

    def _is_full(self, step: int) -> bool:
        return step < self.before or (step - self.before - 1) % self.interval == 0
