"""Compile a denoiser under a policy: one capture, and a program for every kind of step, each at its first use."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from fmecompile.analysis.cuts import Cuts, CutValue
from fmecompile.analysis.mixing import called_in
from fmecompile.backends.budgeted import within_budget
from fmecompile.backends.eager import EagerCompiler
from fmecompile.budget import Allowance
from fmecompile.capture.example import Example
from fmecompile.capture.export import capture
from fmecompile.capture.families import SCALAR_INPUTS
from fmecompile.capture.shell import Shell
from fmecompile.errors import OptionError
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import Input, Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.partition.tradeoffs import Limits
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.pipeline import Compilation, Record, lower_within, normalise
from fmecompile.reuse.policy import Policy
from fmecompile.reuse.steps import FULL, Decision
from fmecompile.runtime.executable import Compiled, Executable
from fmecompile.runtime.generation import Timeline
from fmecompile.runtime.reusing import Reusing


@dataclass(frozen=True)
class ReuseRecord:
    """What is reused in one signature: the policy in words, the values, and the plan of each kind of step so far."""

    policy: str
    values: tuple[CutValue, ...]
    plans: dict[Decision, Plan]
    notes: dict[Decision, str]
    allowances: dict[Decision, Allowance] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the values that are kept between steps."""
        return sum(value.nbytes for value in self.values)

    def __str__(self) -> str:
        lines = [self.policy]
        for value in self.values[:4]:
            lines.append(f"  {value.module}: {value.nbytes / 2**20:.1f} MiB kept, {value.saved:.1%} of the work saved")
        lines += [f"  and {len(self.values) - 4} more"] if len(self.values) > 4 else []
        for decision, plan in self.plans.items():
            kind = "full step" if decision == FULL else f"step that reuses {', '.join(sorted(decision))}"
            lines.append(f"  {kind}: {plan.projected_peak_bytes / 2**20:.1f} MiB projected; {self.notes[decision]}")
            lines += [f"    {self.allowances[decision]}"] if decision in self.allowances else []
        return "\n".join(lines)


@dataclass(frozen=True)
class ReusingCompiler:
    """The compiler callback of a dispatcher whose module runs under ``policy``."""

    eager: EagerCompiler
    policy: Policy
    timeline: Timeline = field(default_factory=Timeline)

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Reusing, Record]:
        notes: list[tuple[str, str]] = []
        with self.eager.progress(type(module).__name__) as shown:

            def observe(name: str, compilation: Compilation) -> None:
                notes.append(compilation.notes[-1])
                shown(name)

            shell = Shell(module, forward)
            compilation = Compilation(capture(shell, args, kwargs))
            normalise(compilation, observe)
            variants = _Variants(self, shell, Example.of(args, kwargs), compilation)
            variants.make(FULL, observe)
        timestep = _place_of_timestep(forward, args, kwargs)
        record = Record(
            variants.record.plans[FULL], variants.example, tuple(notes), variants.allowance, variants.record
        )
        places = _conditioning(compilation.program, timestep)
        return Reusing(self.policy, variants, self.timeline, timestep, places, variants.components), record

    def situation(self) -> Hashable:
        """What a program depends on apart from the call and the module."""
        return self.eager.situation()


class _Variants:
    """The programs of one signature, by what a step reuses."""

    def __init__(self, compiler: ReusingCompiler, shell: Shell, example: Example, compilation: Compilation) -> None:
        self._compiler, self._shell, self._compilation = compiler, shell, compilation
        self.example = example
        self._lock = threading.Lock()
        self._made: dict[tuple[Decision, int], Executable] = {}
        policy = compiler.policy
        chosen = dict(_chosen(policy, Cuts(compilation.program)))
        values = tuple(value for found in chosen.values() for value in found)
        self._order = policy.order if policy.mode == "forecast" else 0
        self._cuts = tuple(_cuts(policy, chosen, compilation.program))
        self.components = {
            component: tuple(cut.name for cut in self._cuts if cut.component == component) for component in chosen
        }
        self.record = ReuseRecord(policy.describe(), values, {}, {})
        self.allowance: Any = None

    def __call__(self, decision: Decision, elsewhere_bytes: int = 0) -> Executable:
        """The program of a step that reuses ``decision``, while other branches keep ``elsewhere_bytes``, or more."""
        least = elsewhere_bytes if self._compiler.eager.budget is not None else 0
        with self._lock:
            fitting = (made for (kind, most), made in self._made.items() if kind == decision and most >= least)
            return next(fitting, None) or self.make(decision, None, least)

    def make(self, decision: Decision, observe: Any = None, elsewhere_bytes: int = 0) -> Executable:
        program = self._compilation.program.copy()
        reuse = StepReuse(self._cuts, decision, self._order)
        note = reuse.apply(program, self._compilation.facts)
        compilation = replace(self._compilation, program=program, notes=[])
        compilation.done("step-reuse", note, observe)
        # A full step lets go of a value before it computes it anew; the differences of a forecast need the old ones.
        is_held = bool(decision) or self._order > 0
        kept = sum(v.nbytes * (self._order + 1) for v in self.record.values) if is_held else 0
        make = partial(self._lower, compilation, observe)
        eager = self._compiler.eager
        compiled, plan, allowance = within_budget(
            self._shell, self._inputs(), eager.budget, eager.wishes, make, kept + elsewhere_bytes
        )
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


def _chosen(policy: Policy, cuts: Cuts) -> Iterator[tuple[str, list[CutValue]]]:
    """For each component of a policy, the values it reuses. Raises OptionError where there are none."""
    for component, wanted in policy.cuts.items():
        found = [value for name in ((wanted,) if isinstance(wanted, str) else wanted) for value in cuts.named(name)]
        if not any(value.saved for value in found):
            raise OptionError(
                f"{wanted!r} can be reused, and nothing would be saved by it",
                next_step='name a later value, or use cut="auto"',
            )
        yield component, found


def _cuts(policy: Policy, chosen: Mapping[str, list[CutValue]], program: Program) -> Iterator[Cut]:
    for component, values in chosen.items():
        for k, value in enumerate(values):
            name = component if len(values) == 1 else f"{component}:{k}"
            source = _source(program, value) if policy.mode == "residual" else None
            yield Cut(name, value.value, component, source)


def _source(program: Program, value: CutValue) -> str:
    """What enters the module of ``value`` and has its shape, the latest of those."""
    nodes = compute_nodes(program.graph)
    node = next(n for n in nodes if n.name == value.value)
    inside = {n for n in nodes if value.module in called_in(n)}
    entering = [n for n in nodes if n not in inside and inside & set(n.users) and node_spec(n) is not None]
    alike = [
        n for n in entering if isinstance(node_spec(n), TensorSpec) and node_spec(n).shape == node_spec(node).shape
    ]
    if not alike:
        raise OptionError(
            f"{value.module} returns another shape than it takes, so it has no residual",
            next_step='use mode="feature", or another cut',
        )
    return alike[-1].name


def _place_of_timestep(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The leaf of a call that tells the step."""
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    told = next((bound[name] for name in bound if name in SCALAR_INPUTS), None)
    if not isinstance(told, torch.Tensor):
        return None
    leaves, _ = tree_flatten((args, kwargs))
    return next(i for i, leaf in enumerate(leaves) if leaf is told)


def _conditioning(program: Program, timestep: int | None) -> tuple[int, ...]:
    """The leaves that a program reads, without clips and the timestep."""
    bound = zip(program.placeholders, program.bindings, strict=True)
    inputs = [(b.leaf, node_spec(node)) for node, b in bound if isinstance(b, Input)]
    return tuple(leaf for leaf, spec in inputs if leaf != timestep and len(spec.shape) < 4)
