"""SmoothCache: each kind of component is reused as long as its calibrated error allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from fmecompile.errors import OptionError
from fmecompile.reuse.calibration import Calibration
from fmecompile.reuse.options import number, numbers, whole
from fmecompile.reuse.policy import Cut, SchedulePolicy
from fmecompile.reuse.steps import Decision, Steps


@dataclass(frozen=True, kw_only=True)
class SmoothCache(SchedulePolicy):
    """One schedule per component from its errors between steps, within ``alpha``.

    ``errors[component][lag][i]`` is mean|out_i - out_{i+lag}| / mean|out_{i+lag}|, averaged over the blocks, for lags
    1 .. ``lookahead`` and N - lag steps each: the denominator is the later output. ``cut`` ``auto`` takes the component
    names as patterns; otherwise it is a tuple, one entry per component in their order.

    The released scan may end on a reuse and then makes the last step full after the fact; so does this one. Raises
    ``OptionError`` for errors of another number of steps.
    """

    COMPONENTS: ClassVar[tuple[str, ...]] = ("spatial_attention", "temporal_attention", "cross_attention")
    """What a calibration for this policy records unless it is told."""

    alpha: float
    errors: Mapping[str, Mapping[int, Sequence[float]]] = field(hash=False)
    lookahead: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, 0)
        whole("lookahead", self.lookahead, 1)
        if not isinstance(self.errors, Mapping) or not self.errors:
            raise OptionError("errors name no component", next_step="give {component: {1: [...], 2: [...], 3: [...]}}")
        object.__setattr__(self, "errors", {name: self._rows(name, rows) for name, rows in self.errors.items()})
        if self.cut != "auto" and (isinstance(self.cut, str) or len(self.cut) != len(self.errors)):
            raise OptionError(
                f"cut={self.cut!r} for {len(self.errors)} components",
                next_step=f'give cut="auto" or a tuple, one entry for each of {", ".join(self.errors)}',
            )

    @classmethod
    def from_calibration(
        cls, calibration: Calibration, *, alpha: float, components: Sequence[str] | None = None, **options: Any
    ) -> Self:
        """The policy for the model and the number of steps of ``calibration``. ``components`` are names of its cuts, by
        default those of ``COMPONENTS`` that it has; ``options`` are those of every policy.

        Raises ``OptionError`` where a component was not calibrated.
        """
        recorded = {record.cut for record in calibration.records if record.mode == "feature"}
        named = [name for name in cls.COMPONENTS if name in recorded] if components is None else list(components)
        if not named:
            raise OptionError(
                f"of {', '.join(cls.COMPONENTS)} none was calibrated",
                next_step="calibrate with policies=[fmecompile.SmoothCache], or name the components",
            )
        rows = {name: calibration.record(name).trace.errors for name in named}
        errors = {name: dict(enumerate(by_lag, start=1)) for name, by_lag in rows.items()}
        return cls(alpha=alpha, errors=errors, calibration=calibration.key, **options)

    def _rows(self, name: str, rows: Mapping[int, Sequence[float]]) -> dict[int, tuple[float, ...]]:
        if not isinstance(rows, Mapping):
            raise OptionError(f"errors[{name!r}] is no mapping", next_step="give {1: [...], 2: [...], 3: [...]}")
        missing = [lag for lag in range(1, self.lookahead + 1) if lag not in rows]
        if missing:
            raise OptionError(
                f"errors[{name!r}] has no lag {missing[0]}",
                next_step=f"give lags 1 to {self.lookahead} as integers, or lower lookahead",
            )
        checked = {
            lag: numbers(f"errors[{name!r}][{lag}]", rows[lag], 0) if len(rows[lag]) else ()
            for lag in range(1, self.lookahead + 1)
        }
        if any(len(row) != max(0, len(checked[1]) + 1 - lag) for lag, row in checked.items()):
            raise OptionError(
                f"errors[{name!r}] has rows of lengths {[len(row) for row in checked.values()]}",
                next_step="give N - lag errors for a lag, N being the number of steps calibrated",
            )
        return checked

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return dict(zip(self.errors, self.errors if self.cut == "auto" else self.cut, strict=True))

    def wanted(self, steps: Steps) -> Sequence[Decision]:
        count = steps.known_count("SmoothCache")
        for name, rows in self.errors.items():
            if len(rows[1]) + 1 != count:
                raise OptionError(
                    f"the errors of {name!r} are of {len(rows[1]) + 1} steps, the run has {count}",
                    next_step=f"calibrate with {count} steps, or run {len(rows[1]) + 1}",
                )
        reused = {name: scan(rows, self.alpha, count) for name, rows in self.errors.items()}
        return [frozenset(name for name in reused if step in reused[name]) for step in range(count)]


def scan(rows: Mapping[int, Sequence[float]], alpha: float, count: int) -> frozenset[int]:
    """The steps that reuse: from each computed step, as many as the longest lag whose error is at most ``alpha``.

    ``rows`` are the errors by lag from 1 on. The last step is never among them.
    """
    reused: set[int] = set()
    step = 0
    while step < count:
        lags = (lag for lag in sorted(rows, reverse=True) if step < len(rows[lag]) and rows[lag][step] <= alpha)
        lag = next(lags, 0)
        reused.update(range(step + 1, step + lag + 1))
        step += lag + 1
    return frozenset(reused - {count - 1})
