"""One signature of a module under a policy: at each step the variant the policy wants, on what earlier steps kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from fmecompile.reuse.policy import Policy, StaticPolicy
from fmecompile.reuse.steps import FULL, Decision, Steps
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.generation import Branch, Generation, Timeline
from fmecompile.runtime.signature import fake_mode_of

Variants = Callable[[Decision, int], Executable]
"""Compiles, at first use, the program of a step that reuses the components of a decision, while so many bytes are kept
for others."""


@dataclass(eq=False)
class Kept:
    """What one branch knows of its earlier steps. ``values`` are D_0 .. D_order of each cut (D_0 alone without a
    forecast), ``computed`` the steps that computed it."""

    steps: Steps
    plan: tuple[Decision, ...] | None = None
    values: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    computed: dict[str, list[int]] = field(default_factory=dict)

    def wanted(self, step: int) -> Decision:
        if self.plan is None or step >= len(self.plan):
            return FULL
        return self.plan[step]

    def is_read_after(self, component: str, step: int, order: int) -> bool:
        """Whether a later step reads what this one leaves of a component."""
        if self.plan is None:
            return True
        later = self.plan[step + 1 :]
        return any(component in decision for decision in (later if order else later[:1]))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for held in self.values.values() for tensor in held)


class Reusing:
    """Callable like an :class:`Executable`. ``places`` are those leaves that the program reads which a sampler does not
    change at every step, ``timestep`` the leaf that tells the step; ``components`` are the cuts of each component."""

    def __init__(
        self,
        policy: Policy,
        variants: Variants,
        timeline: Timeline,
        timestep: int | None,
        places: Sequence[int],
        components: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._policy, self._variants, self._timeline = policy, variants, timeline
        self._timestep, self._places, self._components = timestep, tuple(places), components
        self._order = policy.order if policy.mode == "forecast" else 0

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run the step that these leaves are of."""
        generation = self._timeline.at(None if self._timestep is None else leaves[self._timestep])
        branch = generation.branch(self, [leaves[i] for i in self._places])
        if branch.state is None:
            branch.state = self._begin(generation)
            self._prepare(branch.state)
        try:
            return self._run(leaves, branch, branch.state)
        except BaseException:
            branch.state = None  # what was kept is of a step that did not end
            raise

    def _begin(self, generation: Generation) -> Kept:
        steps = Steps(generation.count)
        policy = self._policy
        policy.check(steps)
        return Kept(steps, policy.plan(steps) if isinstance(policy, StaticPolicy) else None)

    def _prepare(self, kept: Kept) -> None:
        """Compile before step 0 what the plan asks for, so that a budget that is too small ends no run half way."""
        for decision in dict.fromkeys(kept.plan or ()):
            self._variants(decision, self._timeline.kept_bytes())

    def _run(self, leaves: Sequence[Any], branch: Branch, kept: Kept) -> Any:
        step = branch.step
        decision = frozenset(c for c in kept.wanted(step) if all(n in kept.values for n in self._components[c]))
        program = self._variants(decision, self._timeline.kept_bytes() - kept.nbytes)
        if not self._order:
            for name in program.keeps:
                kept.values.pop(name, None)
        reused = [name for component in decision for name in self._components[component]]
        operands = {(name, k): d for name in reused for k, d in enumerate(kept.values[name])}
        result, new = program.run(leaves, operands, self._coefficients(leaves, kept, decision, step))
        del operands
        for name, value in new.items():
            self._keep(kept, name, value, step)
        for component, names in self._components.items():
            if not kept.is_read_after(component, step, self._order):
                for name in names:
                    kept.values.pop(name, None)
        return result

    def _coefficients(
        self, leaves: Sequence[Any], kept: Kept, decision: Decision, step: int
    ) -> tuple[torch.Tensor, ...]:
        if not self._order or not decision:
            return ()
        computed = kept.computed[self._components[next(iter(decision))][0]]
        mode = fake_mode_of(list(leaves))
        with mode if mode is not None else nullcontext():
            found = self._policy.coefficients(kept.steps, step, computed)[1:]
            return tuple(torch.tensor(c, dtype=torch.float64) for c in found)

    def _keep(self, kept: Kept, name: str, value: torch.Tensor, step: int) -> None:
        """Renew what is kept of a component; the differences take the place of those they are made of."""
        steps = kept.computed.setdefault(name, [])
        if steps and steps[-1] == step:
            steps.pop()
        steps.append(step)
        old = kept.values.get(name, ())
        renewed = [value]
        for scale, earlier in zip(self._policy.difference_scales(kept.steps, steps), old, strict=False):
            renewed.append(earlier.neg_().add_(renewed[-1]).mul_(scale))
        while len(renewed) <= self._order:
            renewed.append(torch.zeros_like(value))
        kept.values[name] = renewed
