"""allowed >= projected >= measured, at real sizes on fake tensors: no weights, no data, no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fmecompile
from benchmarks.cases import CASES, GIB, Case, fake
from fmecompile.graph.specs import spec_of

ALIKE = {
    "SVD decodes 14 frames, 576x1024",
    "SVD decodes 25 frames, 576x1024",
    "SVD-XT, 25 frames, 576x1024",
    "AnimateDiff, 16 frames, 576x1024",
    "SVD, 13 frames, 448x832, batch 1",
    "SVD in 0.6 GiB, 14 frames, 576x1024",
    "SVD in 0.45 GiB, 14 frames, 576x1024",
}
"""Cases that differ from another one in size or budget alone; every one is in ``python -m benchmarks.memory``."""


def marked(case: Case) -> Any:
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in ALIKE else [])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_real_models_hold_what_the_plan_says(case: Case) -> None:
    with fake(torch.float16):
        module, inputs = case.build(), case.inputs(torch.float16)
        eager = fmecompile.measure(module, *inputs)
        case.optimize(module, inputs)
        module(*inputs)
        measured = fmecompile.measure(module, *inputs)
        plan = fmecompile.explain(module).records[0].plan
    assert [spec_of(t) for t in tree_leaves(measured.output)] == [spec_of(t) for t in tree_leaves(eager.output)]
    assert plan.allowed_bytes >= plan.projected_peak_bytes >= measured.peak_bytes
    assert plan.projected_peak_bytes <= 1.02 * measured.peak_bytes
    must = case.must_bytes(eager.peak_bytes)
    assert must is not None and measured.peak_bytes <= must
    assert plan.floor_bytes <= plan.projected_peak_bytes < eager.peak_bytes / 2
    assert bool(plan.spilled) == case.spill
    if case.limit_gib is not None:
        assert plan.allowed_bytes == int(case.limit_gib * GIB)


@pytest.mark.parametrize(("rows", "is_sliced"), [(16, False), (16384, True)])
def test_a_trip_makes_enough_of_the_weights_it_reads(
    monkeypatch: pytest.MonkeyPatch, rows: int, is_sliced: bool
) -> None:
    """Weights of 8 MiB: with 16 rows a chunk would read them again to make 128 KiB; with 16384 that is little time."""
    monkeypatch.delenv("FMECOMPILE_MIN_TRIP_BYTES")
    module = nn.Sequential(nn.Linear(256, 4096), nn.GELU(), nn.Linear(4096, 256)).eval().requires_grad_(False)
    plan = fmecompile.plan(module, torch.randn(rows, 256))
    assert bool(plan.groups) == is_sliced
