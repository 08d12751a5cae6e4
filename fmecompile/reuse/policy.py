"""The protocol of a policy: when to reuse. Policies know no graph and no tensor.

A policy is a frozen dataclass of options, checked when it is made. Ask ``kind`` how it decides:

- ``static``: ``plan(steps)`` gives every decision before step 0. The device is never waited for.
- ``probe``: ``start(steps)`` gives a run; each step measures how far a cheap value moved and asks
  ``run.decide(step, change)``. One scalar travels to the host per step.
- ``feedback``: ``run.decide(step)`` is asked before a step, and ``run.observe(step, change, motion)`` told after a full
  one. One scalar (two with motion) travels per full step.

A run belongs to one generation, one branch and one input signature. ``change`` is always the relative L1 distance
mean|v - v_ref| / mean|v_ref|, None when there is no reference yet; a change that is not finite makes a full step.

What is reused has symbolic names that whoever builds the graphs resolves to values, beside patterns of module paths
and, behind ``class:``, of module classes:
``last_up_temporal`` (the temporal layer's output in the last up block), ``deep_feature:B`` (what meets the skip
connection of branch B, 0 being the outermost), ``block_stack:F:B`` (the stack of blocks without its first F and last
B; ``block_stack`` is all of it), ``block_residuals`` (what each part of a block adds, before it is added),
``spatial_attention``, ``temporal_attention``, ``cross_attention``, ``attention`` (all of them), ``auto`` (the value
that saves most, or several where they save clearly more and keep no more), ``auto:200MiB`` (the values that together
save most within so many bytes, for each branch of guidance that is called alone; all that a forecast keeps counts).
Probes: ``head_residual:F`` (out minus in of the first F blocks),
``modulated_input`` (the first block's normalised and modulated input), ``time_embedding``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fmecompile.errors import OptionError
from fmecompile.reuse.calibration import CalibrationKey
from fmecompile.reuse.forecast import FORMS, Form, difference_scales, newton_coefficients, taylor_coefficients
from fmecompile.reuse.guards import PLAIN, Guards, History, guarded
from fmecompile.reuse.options import names, one_of, whole
from fmecompile.reuse.steps import ALL, FULL, Decision, Steps

Kind = Literal["static", "probe", "feedback"]
Mode = Literal["feature", "residual", "forecast"]
Clock = Literal["step", "timestep", "sigma"]
Reference = Literal["previous", "last_full"]
Cut = str | tuple[str, ...]

MODES: tuple[Mode, ...] = ("feature", "residual", "forecast")
CLOCKS: tuple[Clock, ...] = ("step", "timestep", "sigma")

HOST = "host"
STORES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", HOST)
"""As which, or where, values may be kept between steps."""


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """The options that every policy has; all are given by name.

    ``cut`` says what is reused and ``mode`` how: the cached value (``feature``), the current input of the cut's region
    plus the cached out minus in (``residual``), or an extrapolation of the computed values (``forecast``). A forecast
    has an ``order`` from 1 to 4, a ``form`` (forecast.py) and a ``clock``, the axis along which steps are spaced; other
    modes don't look at these. ``guards`` limit what the policy wants. ``calibration`` says what model and how many
    steps it was measured on, where it was; it refuses others.

    ``store`` says how values are kept: None as they are; a dtype smaller than theirs, or its name (``"float16"``),
    rounded to it, and where they are beyond its range its largest number; ``"host"`` as they are, in host memory until
    a step takes them. A forecast takes its differences between values as they are stored, and stores them alike: in few
    bits they are rounding for the most part.
    """

    cut: Cut = "auto"
    mode: Mode = "feature"
    order: int = 1
    form: Form = "newton"
    clock: Clock = "step"
    guards: Guards = PLAIN
    calibration: CalibrationKey | None = None
    store: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cut", names("cut", self.cut))
        one_of("mode", self.mode, MODES)
        one_of("form", self.form, FORMS)
        one_of("clock", self.clock, CLOCKS)
        whole("order", self.order, 1, 4)
        if self.store is not None:
            object.__setattr__(self, "store", str(self.store).removeprefix("torch."))
            one_of("store", self.store, STORES)
        if not isinstance(self.guards, Guards):
            raise OptionError(f"guards={self.guards!r} are none", next_step="give guards=Guards(warm_up=2, tail=1)")

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """How it decides; see the module."""

    @property
    def needs_steps(self) -> bool:
        """The number of steps must be known before step 0."""
        return self.kind == "static" or self.guards.tail > 0

    @property
    def needs_times(self) -> bool:
        """Timesteps or sigmas must be known before step 0; where they lie on a device, it is waited for then."""
        return self.mode == "forecast" and self.clock != "step"

    @property
    def needs_guidance(self) -> bool:
        """It works on the two halves of classifier-free guidance, so both must be there."""
        return False

    @property
    def alike(self) -> tuple[float, float] | None:
        """The least and the greatest similarity of what is reused between neighbouring steps; None: not known."""
        return None

    def factors(self, steps: Steps, step: int) -> tuple[float, float]:
        """For a step that leaves out the unconditional branch: what the low and the high frequencies of the difference
        of both branches are multiplied by."""
        del steps, step
        return (1.0, 1.0)

    @property
    def is_lossless(self) -> bool:
        """It reuses nothing but what is the same at every step."""
        return not self.cuts and not self.needs_guidance

    @property
    def cuts(self) -> Mapping[str, Cut]:
        """For each component that a decision can name, what is reused. ``UNCOND`` is a branch and not listed."""
        return {ALL: self.cut}

    def describe(self) -> str:
        """The policy in one line: the options that are not the default, what is reused, and how."""
        common = {field.name for field in dataclasses.fields(Policy)} - {"guards"}
        how = f"forecast of order {self.order}" if self.mode == "forecast" else self.mode
        reused = [cut if isinstance(cut, str) else ", ".join(cut) for cut in self.cuts.values()]
        reused += ["the unconditional branch"] * self.needs_guidance
        return f"{type(self).__name__}({_options(self, common)}): reuses {', '.join(reused)} ({how})"

    def check(self, steps: Steps, has_guidance: bool | None = None) -> None:
        """Raise ``OptionError`` before step 0 where this policy cannot run. ``has_guidance`` None: not known."""
        if self.needs_steps:
            steps.known_count(type(self).__name__)
        if self.calibration is not None and steps.count is not None:
            self.calibration.require_steps(steps.count)
        if self.needs_guidance and has_guidance is False:
            raise OptionError(
                f"{type(self).__name__} rebuilds the unconditional branch, and guidance is off",
                next_step="use a guidance scale above 1, or turn that part of the policy off",
            )
        if self.mode == "forecast" and self.clock != "step":
            self._check_clock(steps)

    def _check_clock(self, steps: Steps) -> None:
        positions = steps.timesteps if self.clock == "timestep" else steps.sigmas
        if positions is None:
            raise OptionError(
                f"the {self.clock}s of this run are not known, and clock={self.clock!r} needs them",
                next_step='give Steps the sampler\'s list, or use clock="step"',
            )
        if len(set(positions)) < len(positions):
            raise OptionError(
                f"two steps share one {self.clock}, so no slope can be taken between them", next_step='use clock="step"'
            )

    def position(self, steps: Steps, step: int) -> float:
        """Where a step lies on the clock: its index, timestep or sigma."""
        listed = {"step": None, "timestep": steps.timesteps, "sigma": steps.sigmas}[self.clock]
        return float(step) if listed is None else listed[step]

    def difference_scales(self, steps: Steps, computed: Sequence[int]) -> tuple[float, ...]:
        """For a full step: the scales of D_1 .. D_order (forecast.py), empty in other modes.

        ``computed`` are the steps so far that computed the component, this one last.
        """
        if self.mode != "forecast":
            return ()
        return difference_scales([self.position(steps, step) for step in computed], self.order, self.form)

    def coefficients(self, steps: Steps, step: int, computed: Sequence[int]) -> tuple[float, ...]:
        """For a reuse step: the weights of D_0 .. D_order, ``(1.0,)`` in other modes. ``computed`` as above."""
        if self.mode != "forecast":
            return (1.0,)
        here, past = self.position(steps, step), [self.position(steps, past) for past in computed]
        if self.form == "taylor":
            return taylor_coefficients(here - past[-1], self.order)
        return newton_coefficients(here, past, self.order)


def _options(made: Any, without: Collection[str] = ()) -> str:
    """``name=value`` of the fields of a dataclass that have not their default, in brief."""
    fields = [field for field in dataclasses.fields(made) if field.name not in without]
    values = [(field, getattr(made, field.name)) for field in fields]
    return ", ".join(f"{field.name}={_brief(value)}" for field, value in values if value != field.default)


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"<{', '.join(map(str, value))}>"
    if isinstance(value, tuple) and len(value) > 6:
        return f"<{len(value)} values>"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}({_options(value)})"
    return repr(value)


class StaticPolicy(Policy):
    """Every decision is known before step 0."""

    @property
    def kind(self) -> Kind:
        return "static"

    @abstractmethod
    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        """One decision per step, under the guards. ``OptionError`` when ``check`` refuses, or data do not fit."""


class SchedulePolicy(StaticPolicy):
    """A static policy whose rule doesn't ask what became of the steps before, so guards are laid over its list."""

    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        self.check(steps)
        return guarded(self.guards, steps, self.wanted(steps))

    @abstractmethod
    def wanted(self, steps: Steps) -> Sequence[Decision]:
        """What the schedule wants, one decision per step, before the guards."""


class ProbeRun(ABC):
    """One generation of a probe policy on one branch: state and guards."""

    def __init__(self, guards: Guards, steps: Steps) -> None:
        self._history = History(guards, steps)

    def decide(self, step: int, change: float | None) -> Decision:
        """The decision for ``step``; ``change`` as in the module. Every step is asked for once, in order."""
        wanted = self.wants(step, change) if change is not None and math.isfinite(change) else FULL
        decision = self._history.admit(step, wanted)
        self.took(decision)
        return decision

    @abstractmethod
    def wants(self, step: int, change: float) -> Decision:
        """What the rule wants for a step whose probe moved by ``change``."""

    def took(self, decision: Decision) -> None:  # noqa: B027 - most rules keep nothing
        """What the step does after the guards."""


class ProbePolicy(Policy):
    """A cheap value is measured at every step. ``reference`` says against which step: the one before, whatever it
    did, or the last full one."""

    reference: ClassVar[Reference]

    @property
    def kind(self) -> Kind:
        return "probe"

    @property
    @abstractmethod
    def probe(self) -> str:
        """The symbolic name, or a pattern, of the value that is compared."""

    @property
    def least_change(self) -> float:
        """Only tokens that changed by more than this, relatively, enter the mean; 0: all of them."""
        return 0.0

    @abstractmethod
    def start(self, steps: Steps) -> ProbeRun:
        """A run for one generation. ``OptionError`` when ``check`` refuses."""


class FeedbackRun(ABC):
    """One generation of a feedback policy on one branch."""

    def __init__(self, guards: Guards, steps: Steps) -> None:
        self._history = History(guards, steps)

    @abstractmethod
    def decide(self, step: int) -> Decision:
        """The decision for ``step``. Every step is asked for once, in order."""

    @abstractmethod
    def observe(self, step: int, change: float | None, motion: float | None = None) -> None:
        """After the full step ``step``: how far the watched value moved since the last full step, and its motion."""


class FeedbackPolicy(Policy):
    """A value of each full step decides when the next full step is."""

    reference: ClassVar[Reference] = "last_full"

    @property
    def kind(self) -> Kind:
        return "feedback"

    @property
    @abstractmethod
    def probe(self) -> str:
        """The symbolic name, or a pattern, of the value that is watched."""

    @property
    def needs_motion(self) -> bool:
        """``observe`` wants the motion too."""
        return False

    @abstractmethod
    def start(self, steps: Steps) -> FeedbackRun:
        """A run for one generation. ``OptionError`` when ``check`` refuses."""
