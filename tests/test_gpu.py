"""What only a GPU can show, and that the benchmark that runs it is harmless without one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fmecompile
from benchmarks import gpu
from benchmarks.gpu import Section
from fmecompile.graph.plan import Plan
from fmecompile.runtime import chunk_loop
from tests.models import animatediff_call, as_dtype, small_animatediff, small_svd, svd_call, twin

ROOT = Path(__file__).resolve().parents[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MODELS = [
    pytest.param(small_svd, svd_call, id="svd"),
    pytest.param(small_animatediff, animatediff_call, id="animatediff"),
]
Build = Callable[[], nn.Module]
Inputs = Callable[..., Any]


def on_gpu(build: Build, call: Inputs) -> tuple[nn.Module, Any]:
    """A small model and its inputs, half precision."""
    inputs = as_dtype(call(2, 4, 32, 32, torch.float32), torch.float16)
    return twin(build(), torch.float16).cuda(), tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs)


def planned(module: nn.Module, inputs: Any, **options: Any) -> Plan:
    """The plan of a first call of a copy."""
    other = fmecompile.optimize(copy.deepcopy(module), strict=True, **options)
    other(*inputs)
    return fmecompile.explain(other).records[0].plan


def in_slots(module: nn.Module, plan: Plan, slots: int) -> nn.Module:
    groups = tuple(replace(group, slots=slots) for group in plan.groups)
    return fmecompile.optimize(copy.deepcopy(module), plan=replace(plan, groups=groups), strict=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("build", "call"), MODELS)
@torch.no_grad()
def test_half_precision_is_as_close_to_float64_as_eager(build: Build, call: Inputs) -> None:
    module, inputs = on_gpu(build, call)
    exact = twin(module.cpu(), torch.float64)(*as_dtype(tuple(x.cpu() for x in inputs), torch.float64))[0]
    module.cuda()
    eager = (module(*inputs)[0].cpu().double() - exact).norm() / exact.norm()
    fmecompile.optimize(module, strict=True)
    ours = (module(*inputs)[0].cpu().double() - exact).norm() / exact.norm()
    assert ours <= 1.25 * eager


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("build", "call"), MODELS)
@torch.no_grad()
def test_pipelined_loops_are_bitwise_equal_to_sequential_ones(
    monkeypatch: pytest.MonkeyPatch, build: Build, call: Inputs
) -> None:
    """Also under delays, which move one stream against another, and beside other memory coming and going."""
    module, inputs = on_gpu(build, call)
    plan = planned(module, inputs)
    want = in_slots(module, plan, 1)(*inputs)[0]
    trip = chunk_loop.ChunkLoop._run_trip
    delays = torch.Generator().manual_seed(0)

    def delayed(*given: Any) -> None:
        torch.cuda._sleep(int(torch.randint(0, 200_000, (), generator=delays)))
        trip(*given)

    for slots in (2, 3):
        other = in_slots(module, plan, slots)
        other(*inputs)
        assert fmecompile.explain(other).records[0].plan.pipelined
        for k in range(8):
            with monkeypatch.context() as patch:
                if k % 2:
                    patch.setattr(chunk_loop.ChunkLoop, "_run_trip", delayed)
                got = other(*inputs)[0]
            scratch = [torch.full((2**16 << k,), float("nan"), device="cuda") for k in range(4)]
            assert torch.equal(got, want)
            del scratch


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_values_in_host_memory_come_back_whole() -> None:
    module, inputs = on_gpu(small_svd, svd_call)
    want = fmecompile.optimize(copy.deepcopy(module), strict=True)(*inputs)[0]
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *inputs))
    plan = planned(module, inputs)
    for share in (0.9, 0.8, 0.7):
        budget = held + 2**28 + int(share * plan.projected_peak_bytes)
        other = fmecompile.optimize(copy.deepcopy(module), memory_budget=budget, spill=True, strict=True)
        try:
            got = [other(*inputs)[0] for _ in range(5)]
        except fmecompile.BudgetInfeasible:
            continue
        assert all(torch.equal(got[0], each) for each in got)
        torch.testing.assert_close(got[0], want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("slots", [1, 2])
@torch.no_grad()
def test_cuda_graphs_replay_what_was_recorded(slots: int) -> None:
    module, (sample, *rest) = on_gpu(small_svd, svd_call)
    plan = planned(module, (sample, *rest))
    plan = replace(plan, groups=tuple(replace(group, slots=slots) for group in plan.groups))
    plain = fmecompile.optimize(copy.deepcopy(module), plan=plan, strict=True)
    graphed = fmecompile.optimize(copy.deepcopy(module), plan=plan, strict=True, cuda_graphs=True)
    samples = [sample + 0.1 * k for k in range(6)]
    got = [graphed(x, *rest)[0] for x in samples]
    assert all(torch.equal(a, plain(x, *rest)[0]) for a, x in zip(got, samples, strict=True))
    assert "1 records, replayed 5 times" in str(fmecompile.explain(graphed))
    for each in (plain, graphed):
        next(each.parameters()).mul_(1.5)
    assert torch.equal(graphed(sample, *rest)[0], plain(sample, *rest)[0])
    for each in (plain, graphed):
        moved = next(each.parameters())
        moved.data = moved.data.clone() * 2
    for _ in range(3):
        assert torch.equal(graphed(sample, *rest)[0], plain(sample, *rest)[0])


# -------------------------------------------------------------------------------------------------------- without a GPU


def test_the_benchmark_needs_a_gpu_and_says_so() -> None:
    before = (ROOT / "benchmarks/results/gpu.json").exists()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    ran = subprocess.run(["benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "finds no CUDA device, so nothing was run and nothing was written" in ran.stdout
    assert (ROOT / "benchmarks/results/gpu.json").exists() == before


def test_a_section_without_a_gpu_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    assert gpu.main([]) == 0 and gpu.main(["--section", "tests"]) == 0
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_section_that_fails_loses_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = ("/bin/sh", "-c")
    asked = [
        Section("good", (*shell, "echo noise; echo '{\"ratio\": 1}'"), 30),
        Section("broken", (*shell, "echo out of memory >&2; exit 3"), 30),
        Section("silent", (*shell, "echo no figures"), 30),
        Section("endless", (*shell, "exec sleep 30"), 0.2),
        Section("last", (*shell, "echo '{\"ratio\": 2}'"), 30),
    ]
    gpu.run_all(asked, tmp_path / "gpu.json", {"device": "a device"})
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["device"] == "a device"
    assert found["sections"] == {
        "good": {"ratio": 1},
        "broken": {"failed": "out of memory"},
        "silent": {"failed": "no figures"},
        "endless": {"failed": "took more than 0 s"},
        "last": {"ratio": 2},
    }
    assert len(capsys.readouterr().out.splitlines()) == len(asked), "one line a section"
    gpu.run_all(asked[:1], tmp_path / "gpu.json", {}, total_s=1)
    assert "left out" in (tmp_path / "gpu.json").read_text(encoding="utf-8")


def test_every_case_and_variant_has_a_section(tmp_path: Path) -> None:
    names = [section.name for section in gpu.sections(tmp_path)]
    assert names[0] == "tests" and len(names) == len(set(names))
    assert {f"{case} {variant}" for case in gpu.CASES for variant in gpu.VARIANTS} <= set(names)
