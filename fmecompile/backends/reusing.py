"""Compile a denoiser under a policy: one capture, and a program for every kind of step, each at its first use."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fmecompile.analysis.cuts import CutValue
from fmecompile.backends.budgeted import within_budget
from fmecompile.backends.choice import Choice
from fmecompile.backends.eager import EagerCompiler
from fmecompile.backends.offer import Offer
from fmecompile.budget import Allowance
from fmecompile.capture.example import Example
from fmecompile.capture.export import capture
from fmecompile.capture.families import SCALAR_INPUTS
from fmecompile.capture.shell import Shell
from fmecompile.errors import BudgetInfeasible
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import Input, Program
from fmecompile.graph.specs import node_spec
from fmecompile.partition.tradeoffs import Limits
from fmecompile.passes.fuse_runs import Fuse
from fmecompile.passes.prologue import Prologue as SplitPrologue
from fmecompile.passes.prologue import kept_bytes
from fmecompile.pipeline import Compilation, Observe, Record, lower_within, normalise
from fmecompile.reuse.policy import HOST, Policy
from fmecompile.reuse.steps import FULL, UNCOND, Decision, Steps, to_bits
from fmecompile.runtime.executable import Compiled, Executable
from fmecompile.runtime.generation import Timeline
from fmecompile.runtime.guidance import halved
from fmecompile.runtime.prologue import Prologue
from fmecompile.runtime.reusing import HEAD, Reusing, Runs, Taken, new_runs


@dataclass(frozen=True)
class ReuseRecord:
    """What is reused in one signature: the policy in words, the values, those that are measured, the plan of each kind
    of step so far (``HEAD`` for what runs before a policy decides), and what the steps of the latest runs did.
    ``order`` is that of the forecast, ``gap_bytes`` what the halves of guidance differ by, ``shared_bytes`` what all
    steps share and one of them makes. ``store`` is as which, or where, the values are kept, and their bytes are those
    that they have so. ``offer`` is what could be reused instead."""

    policy: str
    values: tuple[CutValue, ...]
    offer: Offer
    plans: dict[Decision, Plan]
    notes: dict[Decision, str]
    watched: tuple[CutValue, ...] = ()
    order: int = 0
    gap_bytes: int = 0
    runs: Runs = field(default_factory=new_runs)
    allowances: dict[Decision, Allowance] = field(default_factory=dict)
    shared_bytes: int = 0
    store: str | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes on the device of what is kept between steps."""
        values = 0 if self.store == HOST else self._value_bytes
        return values + sum(v.nbytes for v in self.watched) + self.gap_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory in which values wait for the step that takes them."""
        return self._value_bytes if self.store == HOST else 0

    @property
    def _value_bytes(self) -> int:
        return sum(v.nbytes for v in self.values) * (self.order + 1)

    def __str__(self) -> str:
        if not self.values and not self.gap_bytes:
            return f"{self.policy}; {self.shared_bytes / 2**20:.2f} MiB are made once and serve all steps"
        lines = [f"{self.policy}; {len(self.plans)} programs so far"]
        how = {None: "", HOST: " in host memory"}.get(self.store, f" as {self.store}")
        for value in self.values[:4]:
            kept = f"{value.nbytes / 2**20:.1f} MiB kept{how}"
            lines.append(f"  {value.module}: {kept}, {value.saved:.1%} of the work saved")
        lines += [f"  and {len(self.values) - 4} more"] if len(self.values) > 4 else []
        lines += [f"  together {self.offer.chosen.saved:.1%} of the work saved"] if len(self.values) > 1 else []
        lines += [f"  {line}" for line in str(self.offer).splitlines()]
        lines += [f"  {self.shared_bytes / 2**20:.2f} MiB are the same at every step"] if self.shared_bytes else []
        lines += [f"  measured: {', '.join(v.module or v.value for v in self.watched)}"] if self.watched else []
        for decision, plan in self.plans.items():
            peak = f"{plan.projected_peak_bytes / 2**20:.1f} MiB projected"
            lines.append(f"  {kind_of(decision)}: {peak}; {self.notes[decision]}")
            lines += [f"    {self.allowances[decision]}"] if decision in self.allowances else []
        lines += [f"  latest run, 1 for a full step: {_run(run)}" for run in list(self.runs)[-1:]]
        return "\n".join(lines)


def _run(taken: Sequence[Taken]) -> str:
    """What the steps of a run did, and between which figures the changes lie that it was decided by."""
    full = sum(t.decision == FULL for t in taken)
    changes = [t.change for t in taken if t.change is not None and math.isfinite(t.change)]
    measured = f"; changes from {min(changes):.3g} to {max(changes):.3g} were measured" if changes else ""
    return f"{to_bits(t.decision for t in taken)}, {full} of {len(taken)}{measured}"


def kind_of(decision: Decision) -> str:
    """A kind of step, in words."""
    if decision == HEAD:
        return "what decides"
    return "full step" if decision == FULL else f"step that reuses {', '.join(sorted(decision))}"


@dataclass(frozen=True)
class ReusingCompiler:
    """The compiler callback of a dispatcher whose module runs under ``policy``."""

    eager: EagerCompiler
    policy: Policy
    timeline: Timeline = field(default_factory=Timeline)

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Reusing | Executable, Record]:
        if self.policy.calibration is not None:
            self.policy.calibration.require_model(module)
        with self.eager.observed(module) as (observe, notes):
            shell = Shell(module, forward)
            timestep = place_of_timestep(forward, args, kwargs)
            whole = _Captured.of(shell, args, kwargs, self.policy, timestep, observe, self.eager.fuse)
            half = None
            if self.policy.needs_guidance:
                self.policy.check(Steps(1), whole.batch % 2 == 0)
                leaves, tree = tree_flatten((args, kwargs))
                half_args, half_kwargs = tree_unflatten(halved(leaves, whole.batch), tree)
                half = _Captured.of(shell, half_args, half_kwargs, self.policy, timestep, fuse=self.eager.fuse)
            variants = _Variants(self, shell, whole, half)
            variants.make(FULL, observe)
            if whole.choice.crossing:
                variants.make(HEAD)
            if self.policy.is_lossless and variants.prologue is None:
                return variants.alone(notes)
        plan = max(variants.record.plans.values(), key=lambda plan: plan.projected_peak_bytes)
        if self.policy.is_lossless:  # what is shared lives all along, and nobody adds what a policy keeps
            plan = plan.beside(variants.record.shared_bytes)
        record = Record(plan, whole.example, tuple(notes), variants.allowance, variants.record, self.eager.graphs)
        runs = variants.record.runs
        return Reusing(self.policy, variants, self.timeline, timestep, whole.conditioning, runs), record

    def watched(self, watcher: Observe, record: Record) -> ReusingCompiler:
        """As :meth:`EagerCompiler.watched`: the last stages are of the step that computes everything."""
        plans = record.reuse.plans.values() if isinstance(record.reuse, ReuseRecord) else (record.plan,)
        return replace(self, eager=replace(self.eager.watched(watcher, record), saved=tuple(plans)))

    def situation(self) -> Hashable:
        """What a program depends on apart from the call and the module."""
        return self.eager.situation()


@dataclass(frozen=True)
class _Captured:
    """One call of the module, normalised, and what is reused in it; ``batch`` is that of its first clip, and
    ``conditioning`` are the leaves that tell branches apart."""

    example: Example
    compilation: Compilation
    choice: Choice
    batch: int
    conditioning: tuple[int, ...]

    @classmethod
    def of(
        cls,
        shell: Shell,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        policy: Policy,
        timestep: int | None,
        observe: Any = None,
        fuse: Fuse | None = None,
    ) -> _Captured:
        compilation = Compilation(capture(shell, args, kwargs), fuse=fuse)
        normalise(compilation, observe)
        leaves = conditioning(compilation.program, timestep)
        if not policy.needs_guidance:  # half of an input is another tensor at every step
            compilation.done("prologue", split(compilation, leaves), observe)
        choice = Choice.of(policy, compilation.program, compilation.facts)
        return cls(Example.of(args, kwargs), compilation, choice, choice.batch, leaves)

    def inputs(self) -> Any:
        """The arguments on fake tensors."""
        return self.example.materialise(FakeTensorMode(allow_non_fake_inputs=True))

    def variant(self, decision: Decision) -> tuple[Program, str]:
        """The program of a step that reuses ``decision``, and what was done in words."""
        program = self.compilation.program.copy()
        return program, self.choice.rewrite(program, decision, self.compilation.facts)


class _Variants:
    """The programs of one signature, by what a step reuses; of its conditional ``half`` for steps without the other."""

    def __init__(self, compiler: ReusingCompiler, shell: Shell, whole: _Captured, half: _Captured | None) -> None:
        self._compiler, self._shell, self._whole, self._half = compiler, shell, whole, half
        self._lock = threading.RLock()
        self._made: dict[tuple[Decision, int], Executable] = {}
        self._refused: dict[tuple[Decision, int], BudgetInfeasible] = {}
        self._renewed: dict[Decision, frozenset[str]] = {}
        choice = whole.choice
        self.components, self.frames, self.batch = choice.components, choice.frames, whole.batch
        self.probes = tuple(cut.name for cut in choice.probes)
        policy = compiler.policy
        self.prologue, shared = self._made_once()
        self.record = ReuseRecord(
            policy.describe(),
            choice.values,
            choice.offer,
            {},
            {},
            choice.watched,
            choice.order,
            choice.gap_bytes,
            shared_bytes=shared,
            store=policy.store,
        )
        self.allowance: Any = None
        self._held_by_full = 0

    def _made_once(self) -> tuple[Prologue | None, int]:
        """What runs the prologue, and the bytes that it makes."""
        program = self._whole.compilation.program.prologue
        if program is None:
            return None, 0
        compiled, _ = lower_within(replace(self._whole.compilation, program=program, notes=[]))
        leaves = [binding.leaf for binding in program.bindings if isinstance(binding, Input)]
        return Prologue(self._executable(compiled), leaves), kept_bytes(program)

    def _captured(self, decision: Decision) -> _Captured:
        return self._half if self._half is not None and UNCOND in decision else self._whole

    def __call__(self, decision: Decision, elsewhere_bytes: int = 0) -> Executable:
        """The program of a step that reuses ``decision``, or the head of every step, while other branches keep
        ``elsewhere_bytes``, or more. Raises BudgetInfeasible, at once where the same was refused before."""
        least = elsewhere_bytes if self._compiler.eager.budget is not None else 0
        with self._lock:
            fitting = (made for (kind, most), made in self._made.items() if kind == decision and most >= least)
            found, refused = next(fitting, None), self._refused.get((decision, least))
            if found is None and refused is not None:
                raise refused.detached()
            return found or self.make(decision, None, least)

    def renewed(self, decision: Decision) -> frozenset[str]:
        """The cuts whose value such a step computes; another may be dead because a later one is reused."""
        with self._lock:
            if decision not in self._renewed:
                program, _ = self._captured(decision).variant(decision - {UNCOND})
                self._renewed[decision] = frozenset(program.keeps)
            return self._renewed[decision]

    def make(self, decision: Decision, observe: Any = None, elsewhere_bytes: int = 0) -> Executable:
        """Compile one of them."""
        captured = self._captured(decision)
        program, note = captured.variant(decision - {UNCOND})
        notes = list(captured.compilation.notes)
        compilation = replace(captured.compilation, program=program, notes=notes)
        if not self._compiler.policy.is_lossless:
            compilation.done("step-reuse", note, observe)
        held = captured.choice.held_bytes(program) + self.record.shared_bytes + elsewhere_bytes
        eager = self._compiler.eager
        full = self.record.plans.get(FULL) if eager.budget is None else None
        room = None if full is None else full.projected_peak_bytes - max(held - self._held_by_full, 0)
        make = partial(self._lower, compilation, observe, room)
        try:
            compiled, plan, allowance = within_budget(
                self._shell, captured.inputs(), eager.budget, eager.wishes, make, held
            )
        except BudgetInfeasible as error:
            self._refused[decision, elsewhere_bytes] = error.detached()
            raise
        if decision == FULL:
            self._held_by_full = held
        self.allowance = self.allowance or allowance
        if allowance is not None:
            self.record.allowances[decision] = allowance
        self.record.plans[decision], self.record.notes[decision] = plan, note
        made = self._made[decision, elsewhere_bytes] = self._executable(compiled)
        return made

    def alone(self, notes: Sequence[tuple[str, str]]) -> tuple[Executable, Record]:
        """The full step, where nothing is shared."""
        plan, example = self.record.plans[FULL], self._whole.example
        return self(FULL), Record(plan, example, tuple(notes), self.allowance, graphs=self._compiler.eager.graphs)

    def _executable(self, compiled: Compiled) -> Executable:
        return Executable(compiled, self._shell.module, self._compiler.eager.graphs)

    def _lower(self, compilation: Compilation, observe: Any, room: int | None, limits: Limits) -> tuple[Compiled, Plan]:
        """``room`` is what there is for a step without a budget, as a full step holds as much: it may be fast instead
        of lean, where it can keep to that at all."""
        lower_to = partial(lower_within, compilation, self._compiler.eager.saved, observe=observe)
        if room is not None and limits.activation_bytes is None:
            with suppress(BudgetInfeasible):
                return lower_to(limits=replace(limits, activation_bytes=room))
        return lower_to(limits=limits)


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
