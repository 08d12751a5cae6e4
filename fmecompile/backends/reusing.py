"""Compile a denoiser under a policy: one capture, and a program for every kind of step, each at its first use."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from fmecompile.analysis.cuts import CutValue
from fmecompile.backends.budgeted import within_budget
from fmecompile.backends.choice import Choice
from fmecompile.backends.eager import EagerCompiler
from fmecompile.budget import Allowance
from fmecompile.capture.example import Example
from fmecompile.capture.export import capture
from fmecompile.capture.families import SCALAR_INPUTS
from fmecompile.capture.shell import Shell
from fmecompile.errors import OptionError
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import Input, Program
from fmecompile.graph.specs import node_spec
from fmecompile.partition.tradeoffs import Limits
from fmecompile.passes.prologue import Prologue as SplitPrologue
from fmecompile.passes.prologue import kept_bytes
from fmecompile.pipeline import Compilation, Record, lower_within, normalise
from fmecompile.reuse.policy import Policy
from fmecompile.reuse.steps import FULL, Decision, to_bits
from fmecompile.runtime.executable import Compiled, Executable
from fmecompile.runtime.generation import Timeline
from fmecompile.runtime.prologue import Prologue
from fmecompile.runtime.reusing import HEAD, Reusing, Runs, new_runs


@dataclass(frozen=True)
class ReuseRecord:
    """What is reused in one signature: the policy in words, the values, those that are measured, the plan of each kind
    of step so far (``HEAD`` for what runs before a policy decides), and what the steps of the latest runs did.
    ``order`` is that of the forecast, ``shared_bytes`` what all steps share and one of them makes."""

    policy: str
    values: tuple[CutValue, ...]
    plans: dict[Decision, Plan]
    notes: dict[Decision, str]
    watched: tuple[CutValue, ...] = ()
    order: int = 0
    runs: Runs = field(default_factory=new_runs)
    allowances: dict[Decision, Allowance] = field(default_factory=dict)
    shared_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of the values that are kept between steps."""
        return sum(v.nbytes * (self.order + 1) for v in self.values) + sum(v.nbytes for v in self.watched)

    def __str__(self) -> str:
        lines = [f"{self.policy}; {len(self.plans)} programs so far"]
        for value in self.values[:4]:
            lines.append(f"  {value.module}: {value.nbytes / 2**20:.1f} MiB kept, {value.saved:.1%} of the work saved")
        lines += [f"  and {len(self.values) - 4} more"] if len(self.values) > 4 else []
        lines += [f"  {self.shared_bytes / 2**20:.2f} MiB are the same at every step"] if self.shared_bytes else []
        lines += [f"  measured: {', '.join(v.module or v.value for v in self.watched)}"] if self.watched else []
        for decision, plan in self.plans.items():
            peak = f"{plan.projected_peak_bytes / 2**20:.1f} MiB projected"
            lines.append(f"  {_kind(decision)}: {peak}; {self.notes[decision]}")
            lines += [f"    {self.allowances[decision]}"] if decision in self.allowances else []
        lines += [
            f"  latest run, 1 for a full step: {to_bits(t.decision for t in run)}" for run in list(self.runs)[-1:]
        ]
        return "\n".join(lines)


def _kind(decision: Decision) -> str:
    if decision == HEAD:
        return "what decides"
    return "full step" if decision == FULL else f"step that reuses {', '.join(sorted(decision))}"


@dataclass(frozen=True)
class ReusingCompiler:
    """The compiler callback of a dispatcher whose module runs under ``policy``. Raises OptionError for one that is not
    supported yet, or is calibrated on another model."""

    eager: EagerCompiler
    policy: Policy
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        if self.policy.needs_guidance:
            name = type(self.policy).__name__
            raise OptionError(
                f"{name} with guidance=True is not supported yet", next_step=f"use {name}(guidance=False)"
            )

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Reusing, Record]:
        if self.policy.calibration is not None:
            self.policy.calibration.require_model(module)
        notes: list[tuple[str, str]] = []
        with self.eager.progress(type(module).__name__) as shown:

            def observe(name: str, compilation: Compilation) -> None:
                notes.append(compilation.notes[-1])
                shown(name)

            shell = Shell(module, forward)
            compilation = Compilation(capture(shell, args, kwargs))
            normalise(compilation, observe)
            timestep = place_of_timestep(forward, args, kwargs)
            places = conditioning(compilation.program, timestep)
            compilation.done("prologue", split(compilation, places), observe)
            variants = _Variants(self, shell, Example.of(args, kwargs), compilation)
            for decision in (HEAD, FULL) if variants.choice.crossing else (FULL,):
                variants.make(decision, observe)
        plan = max(variants.record.plans.values(), key=lambda plan: plan.projected_peak_bytes)
        record = Record(plan, variants.example, tuple(notes), variants.allowance, variants.record)
        return Reusing(self.policy, variants, self.timeline, timestep, places, variants.record.runs), record

    def situation(self) -> Hashable:
        """What a program depends on apart from the call and the module."""
        return self.eager.situation()


class _Variants:
    """The programs of one signature, by what a step reuses."""

    def __init__(self, compiler: ReusingCompiler, shell: Shell, example: Example, compilation: Compilation) -> None:
        self._compiler, self._shell, self._compilation = compiler, shell, compilation
        self.example = example
        self._lock = threading.RLock()
        self._made: dict[tuple[Decision, int], Executable] = {}
        self._renewed: dict[Decision, frozenset[str]] = {}
        self.prologue, self._shared_bytes = self._made_once()
        policy = compiler.policy
        self.choice = choice = Choice.of(policy, compilation.program, compilation.facts)
        self.components = choice.components
        self.probes = tuple(cut.name for cut in choice.probes)
        self.frames = choice.frames
        words = policy.describe()
        self.record = ReuseRecord(
            words, choice.values, {}, {}, choice.watched, choice.order, shared_bytes=self._shared_bytes
        )
        self.allowance: Any = None

    def __call__(self, decision: Decision, elsewhere_bytes: int = 0) -> Executable:
        """The program of a step that reuses ``decision``, or the head of every step, while other branches keep
        ``elsewhere_bytes``, or more."""
        least = elsewhere_bytes if self._compiler.eager.budget is not None else 0
        with self._lock:
            fitting = (made for (kind, most), made in self._made.items() if kind == decision and most >= least)
            return next(fitting, None) or self.make(decision, None, least)

    def _made_once(self) -> tuple[Prologue | None, int]:
        """What runs the prologue, and the bytes that it makes."""
        program = self._compilation.program.prologue
        if program is None:
            return None, 0
        compiled, _ = lower_within(replace(self._compilation, program=program, notes=[]))
        leaves = [binding.leaf for binding in program.bindings if isinstance(binding, Input)]
        return Prologue(Executable(compiled, self._shell.module), leaves), kept_bytes(program)

    def renewed(self, decision: Decision) -> frozenset[str]:
        """The cuts whose value such a step computes; another may be dead because a later one is reused."""
        with self._lock:
            if decision not in self._renewed:
                program = self._compilation.program.copy()
                self.choice.rewrite(program, decision, self._compilation.facts)
                self._renewed[decision] = frozenset(program.keeps)
            return self._renewed[decision]

    def make(self, decision: Decision, observe: Any = None, elsewhere_bytes: int = 0) -> Executable:
        """Compile one of them."""
        program = self._compilation.program.copy()
        note = self.choice.rewrite(program, decision, self._compilation.facts)
        compilation = replace(self._compilation, program=program, notes=[])
        compilation.done("step-reuse", note, observe)
        held = self.choice.held_bytes(program) + self._shared_bytes + elsewhere_bytes
        make = partial(self._lower, compilation, observe)
        eager = self._compiler.eager
        compiled, plan, allowance = within_budget(self._shell, self._inputs(), eager.budget, eager.wishes, make, held)
        self.allowance = self.allowance or allowance
        if allowance is not None:
            self.record.allowances[decision] = allowance
        self.record.plans[decision], self.record.notes[decision] = plan, note
        made = self._made[decision, elsewhere_bytes] = Executable(compiled, self._shell.module)
        return made

    def _inputs(self) -> Any:
        return self.example.materialise(FakeTensorMode(allow_non_fake_inputs=True))

    def _lower(self, compilation: Compilation, observe: Any, limits: Limits) -> tuple[Compiled, Plan]:
        return lower_within(compilation, self._compiler.eager.saved, limits, observe)


def split(compilation: Compilation, places: Sequence[int]) -> str:
    """Move what depends on nothing but the leaves at ``places`` into a prologue."""
    bound = compilation.program.bindings
    varying = {binding.leaf for binding in bound if isinstance(binding, Input)} - set(places)
    return SplitPrologue(frozenset(varying)).apply(compilation.program, compilation.facts)


def place_of_timestep(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The leaf of a call that tells the step."""
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    told = next((bound[name] for name in bound if name in SCALAR_INPUTS), None)
    if not isinstance(told, torch.Tensor):
        return None
    leaves, _ = tree_flatten((args, kwargs))
    return next(i for i, leaf in enumerate(leaves) if leaf is told)


def conditioning(program: Program, timestep: int | None) -> tuple[int, ...]:
    """The leaves that a program reads, without clips and the timestep."""
    bound = zip(program.placeholders, program.bindings, strict=True)
    inputs = [(b.leaf, node_spec(node)) for node, b in bound if isinstance(b, Input)]
    return tuple(leaf for leaf, spec in inputs if leaf != timestep and len(spec.shape) < 4)
