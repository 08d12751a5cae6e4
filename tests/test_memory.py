"""allowed >= projected >= measured, at real sizes on fake tensors: no weights, no data, no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fmecompile
from benchmarks.cases import CASES, GIB, Case, fake


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_real_models_hold_what_the_plan_says(case: Case) -> None:
    with fake(torch.float16):
        module, inputs = case.build(), case.inputs(torch.float16)
        eager = fmecompile.measure(module, *inputs)
        expected = eager.output.sample
        fmecompile.optimize(module, strict=True)
        module(*inputs)
        measured = fmecompile.measure(module, *inputs)
        plan = fmecompile.explain(module).records[0].plan
    assert measured.output.sample.shape == expected.shape
    assert measured.output.sample.dtype == expected.dtype
    assert plan.allowed_bytes >= plan.projected_peak_bytes >= measured.peak_bytes
    assert plan.projected_peak_bytes <= 1.02 * measured.peak_bytes
    assert measured.peak_bytes <= case.must_gib * GIB
    assert plan.floor_bytes <= plan.projected_peak_bytes < eager.peak_bytes / 3


@pytest.mark.parametrize(("rows", "is_sliced"), [(16, False), (1024, True)])
def test_a_trip_makes_enough_of_the_weights_it_reads(
    monkeypatch: pytest.MonkeyPatch, rows: int, is_sliced: bool
) -> None:
    """Weights of 8 MiB: with 16 rows a chunk would read them again to make 128 KiB; with 1024 it makes 8 MiB."""
    monkeypatch.setenv("FMECOMPILE_MIN_TRIP_BYTES", "1")
    module = nn.Sequential(nn.Linear(256, 4096), nn.GELU(), nn.Linear(4096, 256)).eval().requires_grad_(False)
    plan = fmecompile.plan(module, torch.randn(rows, 256))
    assert bool(plan.groups) == is_sliced
