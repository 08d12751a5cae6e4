"""TeaCache: the change of a cheap indicator, summed up until it is too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fmecompile.errors import OptionError
from fmecompile.reuse.calibration import Calibration
from fmecompile.reuse.guards import Guards
from fmecompile.reuse.options import number, numbers
from fmecompile.reuse.policy import Cut, Kind, Mode, ProbePolicy, ProbeRun, Reference, StaticPolicy
from fmecompile.reuse.steps import FULL, REUSE, Decision, Steps

ENDS = Guards(tail=1)
"""The first and the last step are full."""


@dataclass(frozen=True, kw_only=True)
class TeaCache(StaticPolicy, ProbePolicy):
    """Reuse while the sum of poly(change of the indicator) since the last full step stays below ``threshold``.

    ``coefficients_of_change`` are of the polynomial that maps the indicator's relative change to the output's, highest
    power first as such tables are printed; they are fitted per model, and (1, 0) leaves the change as it is. The
    indicator is compared with the step before, reused or not. The first R and last T full steps of the releases are
    ``guards`` (R = T = 1 unless given; Wan's retention mode is ``Guards(warm_up=5)``), and each full step, forced
    or not, starts the sum anew.

    Where the indicator is the time embedding (CogVideoX, Wan) its changes depend on the timesteps alone: given as
    ``indicator_changes``, one per step with the first not looked at, they make the policy static. Such a list depends
    on the number of steps, the sampler's shift and the checkpoint. A polynomial may fall below 0: the releases add
    the negative value, here it counts as 0, so that a change never buys reuse.
    """

    threshold: float
    coefficients_of_change: tuple[float, ...] = (1.0, 0.0)
    indicator: str = "modulated_input"
    indicator_changes: tuple[float, ...] | None = None
    cut: Cut = "block_stack"
    mode: Mode = "residual"
    guards: Guards = ENDS

    reference: ClassVar[Reference] = "previous"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("threshold", self.threshold, 0)
        fitted = numbers("coefficients_of_change", self.coefficients_of_change)
        object.__setattr__(self, "coefficients_of_change", fitted)
        if self.indicator_changes is not None:
            object.__setattr__(self, "indicator_changes", numbers("indicator_changes", self.indicator_changes, 0))

    @classmethod
    def from_calibration(
        cls, calibration: Calibration, *, threshold: float, indicator: str = "time_embedding", **options: Any
    ) -> Self:
        """The static policy for the model and the number of steps of ``calibration``: its changes of ``indicator``,
        which is one that depends on nothing but the timestep.

        Raises ``OptionError`` where the indicator was not calibrated.
        """
        changes = calibration.record(indicator).trace.moved
        fixed = {"indicator": indicator, "indicator_changes": changes, "calibration": calibration.key}
        return cls(threshold=threshold, **options | fixed)

    @property
    def kind(self) -> Kind:
        return "probe" if self.indicator_changes is None else "static"

    @property
    def probe(self) -> str:
        return self.indicator

    def start(self, steps: Steps) -> ProbeRun:
        self.check(steps)
        return _Sum(self, steps)

    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        """The run over ``indicator_changes``. ``OptionError`` without them, or when there is not one per step."""
        run, changes = self.start(steps), self._changes(steps)
        return tuple(run.decide(step, change if step else None) for step, change in enumerate(changes))

    def _changes(self, steps: Steps) -> tuple[float, ...]:
        if self.indicator_changes is None:
            raise OptionError(
                "TeaCache decides as it goes where no indicator_changes are given",
                next_step="use start(steps), or give the changes of the time embedding",
            )
        count = steps.known_count("TeaCache")
        if len(self.indicator_changes) != count:
            raise OptionError(
                f"indicator_changes has {len(self.indicator_changes)} values for {count} steps",
                next_step="give one per step of this run; the first is not looked at",
            )
        return self.indicator_changes


class _Sum(ProbeRun):
    def __init__(self, policy: TeaCache, steps: Steps) -> None:
        super().__init__(policy.guards, steps)
        self._policy, self._sum = policy, 0.0

    def wants(self, step: int, change: float) -> Decision:
        self._sum += max(0.0, polynomial(self._policy.coefficients_of_change, change))
        return REUSE if self._sum < self._policy.threshold else FULL

    def took(self, decision: Decision) -> None:
        if decision == FULL:
            self._sum = 0.0


def polynomial(coefficients: Sequence[float], value: float) -> float:
    """The polynomial at ``value``; coefficients from the highest power down."""
    total = 0.0
    for coefficient in coefficients:
        total = total * value + coefficient
    return total
