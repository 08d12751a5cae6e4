"""Autocast: a program belongs to the state in which its module was called, and holds what it says in each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fmecompile
from fmecompile.analysis.facts import FactTable
from fmecompile.graph.specs import spec_of
from tests.models import animatediff_call, small_animatediff, small_svd, svd_call, twin
from tests.test_models import relative

F64 = torch.float64


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class Regions(nn.Module):
    """Turns autocast on and off around its own lines, and gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.norm(self.conv(x)).relu()
        x = self.linear(x.permute(0, 2, 3, 1)) + 1
        with autocast():
            x = F.scaled_dot_product_attention(self.linear(x), x, x)
        with autocast(False):
            return self.linear(x.float())


def seeded(kind: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module and what ``optimize`` makes of a copy."""
    torch.manual_seed(0)
    eager = kind().eval().requires_grad_(False)
    return eager, fmecompile.optimize(copy.deepcopy(eager), strict=True, **options)


@pytest.mark.parametrize(
    ("build", "call", "order"),
    [
        pytest.param(small_svd, svd_call, (False, True), marks=pytest.mark.slow, id="svd"),
        pytest.param(small_animatediff, animatediff_call, (True, False), id="animatediff"),
    ],
)
@torch.no_grad()
def test_each_state_has_a_program(build: Any, call: Any, order: tuple[bool, bool]) -> None:
    """As good as eager in the same state, against float64, and no more bytes than the plan of that state says."""
    eager, module = seeded(build)
    args = call(1, 2, 8, 8, torch.float32)
    ideal = twin(eager, F64)(*call(1, 2, 8, 8, F64))[0]
    for k, enabled in enumerate((*order, *order)):
        with autocast(enabled):
            module(*args)  # compiles
            want, measured = eager(*args)[0], fmecompile.measure(module, *args)
            assert torch.is_autocast_enabled("cpu") == enabled
        found, records = measured.output[0], fmecompile.explain(module).records
        assert found.dtype == want.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert relative(found.to(F64), ideal) <= 1.5 * relative(want.to(F64), ideal)
        assert records[-1].plan.projected_peak_bytes >= measured.peak_bytes
        assert len(records) == min(k + 1, 2)


@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_a_module_may_turn_it_on_and_off(enabled: bool) -> None:
    eager, module = seeded(Regions)
    x = torch.randn(2, 4, 16, 16)
    with autocast(enabled):
        want, found = eager(x), module(x)
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_steps_that_reuse() -> None:
    """A step that reuses takes what a full one kept in its own dtype; on the same values it returns the same."""
    eager, module = seeded(small_animatediff, reuse=fmecompile.DeepCache(interval=2))
    args = animatediff_call(1, 2, 8, 8, torch.float32)
    with autocast(), fmecompile.generation(steps=2):
        want, full, shallow = eager(*args)[0], module(*args)[0], module(*args)[0]
    assert full.dtype == shallow.dtype == want.dtype
    assert relative(full, want) <= 0.05 and relative(shallow, want) <= 0.05


@torch.no_grad()
def test_torch_compile() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2), nn.Linear(100, 6)).eval()
    compiled = torch.compile(copy.deepcopy(eager), backend="fmecompile", fullgraph=True)
    x = torch.randn(2, 4, 12, 12)
    for enabled in (True, False, True):
        with autocast(enabled), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*eager.*")
            want, found = eager(x), compiled(x)
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


@torch.no_grad()
def test_the_dtype_that_integers_become() -> None:
    eager, module = seeded(Halves)
    x = torch.arange(6)
    before = torch.get_default_dtype()
    for dtype in (torch.float32, F64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            found, want = module(x), eager(x)
        finally:
            torch.set_default_dtype(before)
        assert found.dtype == want.dtype == dtype and torch.equal(found, want)
    assert len(fmecompile.explain(module).records) == 2


@torch.no_grad()
def test_autocast_is_as_before_behind_an_error() -> None:
    _, module = seeded(Regions)
    with autocast():
        with pytest.raises(Exception):  # noqa: B017 - whatever torch says of three dimensions of eight
            module(torch.randn(2, 8, 8, 16, 16))
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_a_plan_made_before_is_that_of_the_call(enabled: bool) -> None:
    """Also where a plan for the other state was made in this process."""
    eager, module = seeded(Regions)
    x = torch.randn(2, 4, 16, 24)
    with autocast(not enabled):
        fmecompile.plan(eager, x)
    with autocast(enabled):
        plan = fmecompile.plan(eager, x)
        module(x)
        measured = fmecompile.measure(module, x)
    made = fmecompile.explain(module).records[0].plan
    assert (plan.key, plan.projected_peak_bytes) == (made.key, made.projected_peak_bytes)
    assert plan.projected_peak_bytes >= measured.peak_bytes


@torch.no_grad()
def test_facts_of_one_state_are_not_those_of_another() -> None:
    x, w = spec_of(torch.empty(5, 8)), spec_of(torch.empty(3, 8))
    for enabled in (True, False):
        with autocast(enabled):
            found = FactTable()(torch.ops.aten.linear.default, (x, w), {}).result
        assert found.dtype == (torch.bfloat16 if enabled else torch.float32)
