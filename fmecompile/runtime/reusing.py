"""One signature of a module under a policy: at each step the variant the policy wants, on what earlier steps kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fmecompile.reuse.policy import HOST, FeedbackPolicy, FeedbackRun, Policy, ProbePolicy, ProbeRun, StaticPolicy
from fmecompile.reuse.steps import FULL, UNCOND, Decision, Steps
from fmecompile.runtime.change import Frames, changes, motion
from fmecompile.runtime.executable import Executable, Keep
from fmecompile.runtime.generation import Branch, Generation, Timeline
from fmecompile.runtime.guidance import Gap, conditional, halved
from fmecompile.runtime.prologue import Prologue
from fmecompile.runtime.signature import fake_mode_of
from fmecompile.runtime.store import Store

HEAD: Decision = frozenset({"(head)"})
"""No decision but what runs before one: it computes the probe, and all that the probe is made of."""


class Variants(Protocol):
    """Compiles programs at first use. ``components`` are the cuts of each component, ``probes`` what is measured (kept
    by the head, or by a full step where the policy looks back), with ``frames``; ``batch`` that of the clip. A decision
    with ``UNCOND`` has programs for the second half of the batch."""

    @property
    def components(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def probes(self) -> tuple[str, ...]: ...
    @property
    def frames(self) -> tuple[Frames, ...]: ...
    @property
    def batch(self) -> int: ...

    def __call__(self, decision: Decision, elsewhere_bytes: int) -> Executable:
        """The program of a step that reuses ``decision``, while so many bytes are kept for others."""
        ...

    @property
    def prologue(self) -> Prologue | None: ...

    def renewed(self, decision: Decision) -> frozenset[str]:
        """The cuts whose value such a step computes."""
        ...


@dataclass(frozen=True)
class Taken:
    """What one step did, and what was measured for it: before it by a probe, after it by a policy that looks back."""

    step: int
    decision: Decision
    change: float | None = None
    motion: float | None = None


Runs = deque[list[Taken]]
"""The steps of the latest generations, one list for each branch, the latest last."""


def new_runs() -> Runs:
    """Room for the last few."""
    return deque(maxlen=8)


@dataclass(eq=False)
class Kept:
    """What one branch knows of its earlier steps. ``values`` are those of the cuts, ``computed`` the steps that made
    each, ``measured`` the values that the next ones are compared with. A static policy has a ``plan``, another one a
    ``run``. ``gaps`` lie between the halves of guidance, one for each result; once a step left the unconditional half
    out, ``values`` are of the other one (``is_halved``)."""

    steps: Steps
    values: Store
    plan: tuple[Decision, ...] | None = None
    run: ProbeRun | FeedbackRun | None = None
    computed: dict[str, list[int]] = field(default_factory=dict)
    measured: tuple[torch.Tensor, ...] = ()
    taken: list[Taken] = field(default_factory=list)
    gaps: tuple[Gap, ...] = ()
    is_halved: bool = False

    def halve(self) -> None:
        """Keep the conditional half alone."""
        if not self.is_halved:
            self.values.halve()
            self.is_halved = True

    def forget(self) -> None:
        """Let go of everything."""
        self.values.clear()
        self.measured, self.gaps = (), ()

    def decide(self, step: int, change: float | None = None) -> Decision:
        """What ``step`` reuses; a step that calls twice is decided once. A run counts the steps of its branch."""
        if self.taken and self.taken[-1].step == step:
            return self.taken[-1].decision
        if isinstance(self.run, ProbeRun):
            decision = self.run.decide(len(self.taken), change)
        elif self.run is not None:
            decision = self.run.decide(len(self.taken))
        else:
            decision = self.plan[step] if self.plan is not None and step < len(self.plan) else FULL
        self.taken.append(Taken(step, decision, change))
        return decision

    def observe(self, change: float | None, moved: float | None) -> None:
        """Tell a run that looks back what the full step that was decided last has shown."""
        assert isinstance(self.run, FeedbackRun)
        last = self.taken[-1]
        if last.decision == FULL and last.change is None and last.motion is None:
            self.run.observe(len(self.taken) - 1, change, moved)
            self.taken[-1] = Taken(last.step, last.decision, change, moved)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.values.nbytes + sum(held.nbytes for held in (*self.measured, *self.gaps))


class Reusing:
    """Callable like an :class:`Executable`. ``places`` are those leaves that the program reads which a sampler does not
    change at every step, ``timestep`` the leaf that tells the step; ``runs`` is where the steps are written down."""

    def __init__(
        self,
        policy: Policy,
        variants: Variants,
        timeline: Timeline,
        timestep: int | None,
        places: Sequence[int],
        runs: Runs,
    ) -> None:
        self._policy, self._variants, self._timeline, self._runs = policy, variants, timeline, runs
        self._timestep, self._places, self._components = timestep, tuple(places), variants.components
        self._order = policy.order if policy.mode == "forecast" else 0

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run the step that these leaves are of."""
        generation = self._timeline.at(None if self._timestep is None else leaves[self._timestep])
        branch = generation.branch(self, [leaves[i] for i in self._places])
        try:
            if branch.state is None:
                branch.state = self._begin(generation)
                self._prepare(branch.state)
            shared = self._shared(generation, branch, leaves)
            return self._run(leaves, branch, branch.state, shared)
        except BaseException:
            branch.state = branch.made = None  # what was kept is of a step that did not end
            raise

    def _shared(self, generation: Generation, branch: Branch, leaves: Sequence[Any]) -> Keep:
        """What is the same at every step."""
        prologue = self._variants.prologue
        return {} if prologue is None else prologue.values(generation, branch, leaves)

    def _begin(self, generation: Generation) -> Kept:
        policy = self._policy
        steps = self._timeline.steps(generation, with_times=policy.needs_times)
        policy.check(steps, self._variants.batch % 2 == 0)
        store = Store(self._order, policy.store == HOST)
        if policy.kind == "static":
            assert isinstance(policy, StaticPolicy)
            kept = Kept(steps, store, policy.plan(steps))
        else:
            assert isinstance(policy, (ProbePolicy, FeedbackPolicy))
            kept = Kept(steps, store, run=policy.start(steps))
        self._runs.append(kept.taken)
        return kept

    def _prepare(self, kept: Kept) -> None:
        """Compile before step 0 what the plan asks for, so that a budget that is too small ends no run half way."""
        for decision in dict.fromkeys(kept.plan or ()):
            self._variants(decision, self._timeline.kept_bytes())

    def _run(self, leaves: Sequence[Any], branch: Branch, kept: Kept, shared: Keep) -> Any:
        step = branch.step
        elsewhere = self._timeline.kept_bytes() - branch.nbytes
        if isinstance(kept.run, ProbeRun):
            decision, operands = self._probe(leaves, kept, step, elsewhere, shared)
        else:
            decision, operands = kept.decide(step), dict(shared)
        decision = self._possible(kept, decision)
        if UNCOND in decision:
            kept.halve()
            leaves = halved(leaves, self._variants.batch)
        program = self._variants(decision, elsewhere)
        if not self._order:
            for name in program.keeps:
                kept.values.drop(name)
        for name in {name for name, _ in operands} - program.takes:
            del operands[name, 0]
        reused = [name for component in decision - {UNCOND} for name in self._components[component]]
        taken = [name for name in reused if name in program.takes]
        operands.update({(name, k): d for name in taken for k, d in enumerate(kept.values.take(name))})
        result, new = program.run(leaves, operands, self._coefficients(leaves, kept, decision, step))
        del operands
        if isinstance(kept.run, FeedbackRun) and decision == FULL:
            self._look_back(leaves, kept, tuple(new.pop(name) for name in self._variants.probes))
        for name in list(new):
            value = new.pop(name)
            is_whole = kept.is_halved and UNCOND not in decision
            self._keep(kept, name, conditional(value).clone() if is_whole else value, step)
        result = self._guided(kept, decision, result, step)
        self._let_go(kept, step)
        return result

    def _possible(self, kept: Kept, decision: Decision) -> Decision:
        """What of a decision there is something kept for; of one half alone, nothing serves a step that runs both."""
        if UNCOND in decision and not kept.gaps:
            decision -= {UNCOND}
        if kept.is_halved and UNCOND not in decision:
            return FULL
        return frozenset(c for c in decision if all(n in kept.values for n in self._components.get(c, ())))

    def _guided(self, kept: Kept, decision: Decision, result: Any, step: int) -> Any:
        """The result of both halves: rebuilt where one was left out; else what they differ by is kept for that."""
        if not self._policy.needs_guidance:
            return result
        flat, spec = tree_flatten(result)
        if UNCOND in decision:
            factors = self._policy.factors(kept.steps, step)
            kept.gaps = tuple(gap.scaled(*factors) for gap in kept.gaps)
            flat = [gap.completed(value) for gap, value in zip(kept.gaps, flat, strict=True)]
            return tree_unflatten(flat, spec)
        later = kept.plan[step + 1 : step + 2] if kept.plan is not None else ()
        kept.gaps = tuple(map(Gap.of, flat)) if any(UNCOND in wanted for wanted in later) else ()
        return result

    def _probe(
        self, leaves: Sequence[Any], kept: Kept, step: int, elsewhere: int, shared: Keep
    ) -> tuple[Decision, dict[tuple[str, int], torch.Tensor]]:
        """Run the head of a step and decide; also what the head hands to the rest."""
        policy = self._policy
        assert isinstance(policy, ProbePolicy)
        _, new = self._variants(HEAD, elsewhere).run(leaves, shared)
        now = tuple(new.pop(name) for name in self._variants.probes)
        change = None
        if kept.measured and fake_mode_of(list(leaves)) is None:
            change = float(changes(now, kept.measured, policy.least_change))
        decision = kept.decide(step, change)
        if decision == FULL or policy.reference == "previous":
            kept.measured = now
        return decision, {**shared, **{(name, 0): value for name, value in new.items()}}

    def _look_back(self, leaves: Sequence[Any], kept: Kept, now: tuple[torch.Tensor, ...]) -> None:
        """Measure what a full step computed and tell the policy: one transfer to the host, and none at first where no
        motion is asked for."""
        frames, told = self._variants.frames, [None, None]
        if fake_mode_of(list(leaves)) is None:
            figures = [changes(now, kept.measured)] if kept.measured else []
            figures += [motion(now, frames).to(now[0].device)] if frames else []
            numbers = torch.stack([figure.double() for figure in figures]).tolist() if figures else []
            told = [numbers.pop(0) if kept.measured else None, numbers.pop() if frames else None]
        kept.measured = now
        kept.observe(*told)

    def _let_go(self, kept: Kept, step: int) -> None:
        """What no later step reads: all of it at the end, and what a static policy tells before."""
        count = kept.steps.count
        if count is not None and step >= count - 1:
            kept.forget()
        elif kept.plan is not None:
            for names in self._unread(kept.plan[step + 1 :]):
                for name in names:
                    kept.values.drop(name)

    def _unread(self, later: Sequence[Decision]) -> list[tuple[str, ...]]:
        return [names for component, names in self._components.items() if not self._is_read(component, names, later)]

    def _is_read(self, component: str, names: tuple[str, ...], later: Sequence[Decision]) -> bool:
        """Whether one of ``later`` steps reads what is kept of a component now, before all of it is renewed."""
        for decision in later:
            if component in decision:
                return True
            if not self._order and self._variants.renewed(decision).issuperset(names):
                return False
        return False

    def _coefficients(
        self, leaves: Sequence[Any], kept: Kept, decision: Decision, step: int
    ) -> dict[tuple[str, int], torch.Tensor]:
        found = {}
        mode = fake_mode_of(list(leaves))
        with mode if mode is not None else nullcontext():
            for component in decision - {UNCOND} if self._order else ():
                computed = kept.computed[self._components[component][0]]
                weights = self._policy.coefficients(kept.steps, step, computed)
                for k in range(1, self._order + 1):
                    found[component, k] = torch.tensor(weights[k], dtype=torch.float64)
        return found

    def _keep(self, kept: Kept, name: str, value: torch.Tensor, step: int) -> None:
        """Renew what is kept of a cut."""
        steps = kept.computed.setdefault(name, [])
        if steps and steps[-1] == step:
            steps.pop()
        steps.append(step)
        kept.values.renew(name, value, self._policy.difference_scales(kept.steps, steps))
