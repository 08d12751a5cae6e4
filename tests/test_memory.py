"""allowed >= projected >= measured, at real sizes on fake tensors: no weights, no data, no GPU."""

from __future__ import annotations

import pytest
import torch

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
