"""Plan files changed at random: refused with a typed error, or followed with the right values; never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fmecompile
from fmecompile.capture.export import capture
from fmecompile.errors import BudgetInfeasible, FmeError, PlanMismatch
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import compute_nodes
from fmecompile.partition.tradeoffs import Limits
from fmecompile.pipeline import NO_LIMITS, Compilation, lower_within, normalise
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.measure import StorageMeter
from tests.soak.budget import share
from tests.soak.checks import compare
from tests.soak.mutations import mutated

PLANS = share(10)
"""Mutated plans for each random graph."""


class Block(nn.Module):
    """A norm, a skip connection and several operands that die in loops; a result in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.large = nn.Conv2d(8, 12, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.wide, self.out = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> Any:
        skip = self.first(x)
        h = skip + self.second(F.silu(self.norm(skip)))
        best, _ = self.large(F.silu(h)).cumsum(1).topk(4, 1)
        rows = self.out(F.gelu(self.wide(h.flatten(2).transpose(1, 2))))
        return rows * F.gelu(rows), best.sum(1) + skip.mean(1), skip.amax((2, 3))


@dataclass(frozen=True)
class Subject:
    """A module, captured and normalised once, with plans of several kinds."""

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    wanted: Any
    compilation: Compilation
    plans: tuple[Plan, ...]

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.compilation.program.graph.nodes]

    def run(self, plan: Plan, limits: Limits) -> bool:
        """Follow ``plan`` and compare; whether it was followed."""
        trial = replace(self.compilation, program=self.compilation.program.copy(), notes=[])
        try:
            compiled, made = lower_within(trial, (plan,), limits)
        except (PlanMismatch, BudgetInfeasible):
            return False
        executable = Executable(compiled, self.module)
        executable(self.inputs)
        with torch.no_grad(), StorageMeter([self.inputs, list(self.module.parameters())]) as meter:
            compare(executable(self.inputs), self.wanted, 1e-10)
        assert meter.peak_bytes <= made.projected_peak_bytes
        return True


@pytest.fixture(scope="module")
def subject() -> Subject:
    module = Block().double().eval().requires_grad_(False)
    inputs = (torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64),)
    with torch.no_grad():
        wanted = module(*inputs)
        compilation = Compilation(capture(module, inputs, {}))
        normalise(compilation)
        compilation.program.graph.lint()
        plans = list(_plans(compilation))
    assert any(plan.spilled for plan in plans) and any(plan.groups for plan in plans)
    return Subject(module, inputs, wanted, compilation, tuple(plans))


def _plans(compilation: Compilation) -> Iterator[Plan]:
    """The default plan, one with room for everything, and those of limits around the floor."""
    yield (default := _plan(compilation, NO_LIMITS))
    yield _plan(compilation, Limits(10**6))
    for part in (0.7, 0.8, 0.9, 1.02):
        with suppress(BudgetInfeasible):
            yield _plan(compilation, Limits(int(part * default.floor_bytes), may_spill=True))


def _plan(compilation: Compilation, limits: Limits) -> Plan:
    return lower_within(replace(compilation, program=compilation.program.copy(), notes=[]), (), limits)[1]


@pytest.mark.timeout(1200)
def test_a_mutated_plan_is_refused_or_right(subject: Subject, tmp_path: Path) -> None:
    path, followed, loaded = tmp_path / "plan.json", 0, 0
    for seed in range(PLANS):
        rng = Random(seed)
        text = rng.choice(subject.plans).to_json()
        path.write_bytes(mutated(rng, text, subject.names))
        try:
            plan = Plan.load(path)
        except PlanMismatch:
            continue
        loaded += 1
        try:
            followed += subject.run(plan, rng.choice((NO_LIMITS, NO_LIMITS, Limits(10**6, True), Limits(3000, True))))
            plan.summary()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {path.read_bytes()[:3000]!r}") from error
    assert loaded and followed, "no mutated plan was followed: too wild to prove anything"


def test_the_door_refuses_a_plan_that_does_not_fit(subject: Subject) -> None:
    """Where the graph is the plan's, but a group is none of it."""
    plan = next(plan for plan in subject.plans if plan.groups)
    group = replace(plan.groups[0], last=plan.groups[0].first, first=plan.groups[0].last)
    fmecompile.optimize(subject.module, plan=replace(plan, groups=(group,)))
    try:
        with torch.no_grad(), pytest.raises(PlanMismatch, match="does not fit"):
            subject.module(*subject.inputs)
    finally:
        fmecompile.restore(subject.module)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"format": 4, "format": 4}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b"NaN",
    ],
    ids=["nothing", "no text", "a list", "nested", "a key twice", "a huge number", "no number"],
)
def test_what_is_no_plan_is_a_typed_error(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(PlanMismatch, match="not a plan"):
        Plan.load(path)


def test_every_plan_comes_back_equal(subject: Subject) -> None:
    assert compute_nodes(subject.compilation.program.graph)
    for plan in subject.plans:
        assert Plan.from_json(plan.to_json()) == plan
    assert issubclass(PlanMismatch, FmeError)
