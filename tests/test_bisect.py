"""``bisect``: clean on what is right, and at the right place on what was broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fmecompile
from fmecompile import pipeline
from fmecompile.graph.program import Program
from fmecompile.partition.build import Builder
from fmecompile.passes.one_key import OneKey
from fmecompile.runtime import chunk_loop


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.GroupNorm(4, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.narrow(torch.nn.functional.gelu(self.wide(y)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def batch() -> torch.Tensor:
    return torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(1))


def test_what_is_right_is_clean() -> None:
    module, x = net(), batch()
    verdict = fmecompile.bisect(module, x)
    assert verdict.is_clean and verdict.stages[-1].name == "fuse-norm"
    assert all(stage.error < 1e-5 and stage.measured_bytes > 0 for stage in verdict.stages)
    assert str(verdict).endswith("every stage is right")
    assert not fmecompile.is_optimized(module)


def test_an_optimized_module_stays_so_and_its_plan_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = fmecompile.optimize(net()), batch()
    module(x)
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("searched again"))
    assert fmecompile.bisect(module, x).is_clean
    assert fmecompile.is_optimized(module)


def test_a_wrong_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: OneKey, program: Program, facts: Any) -> str:
        gelu = next(node for node in program.graph.nodes if "gelu" in str(node.target))
        gelu.target = torch.ops.aten.relu.default
        return "broken"

    monkeypatch.setattr(OneKey, "apply", broken)
    verdict = fmecompile.bisect(net(), batch())
    assert verdict.wrong is not None and verdict.wrong.name == "one-key"
    assert verdict.wrong.culprit.startswith("gelu = aten.relu.default")
    assert "wrong from one-key on" in str(verdict)


def test_a_wrong_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = chunk_loop._narrowed
    monkeypatch.setattr(
        chunk_loop, "_narrowed", lambda tensor, span: copy(tensor, tuple((d, 0, length) for d, _, length in span))
    )
    verdict = fmecompile.bisect(net(), batch())
    assert verdict.wrong is not None and verdict.wrong.name == "chunk-loops"
    assert verdict.wrong.culprit.startswith("chunk_loop_")


def test_rows_that_nothing_writes_are_wrong_whatever_the_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = net(), batch()
    rows: list[torch.Tensor] = []
    monkeypatch.setattr(chunk_loop.ChunkLoop, "_run_trip", lambda *operands: rows.extend(operands[-1]))
    assert fmecompile.bisect(module, x).wrong is not None
    assert any(bool(part.isnan().all()) for part in rows if not isinstance(part, FakeTensor))


def test_a_loop_that_holds_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder.build
    monkeypatch.setattr(Builder, "build", lambda *a: replace(build(*a), body_bytes=0))
    monkeypatch.setenv("FMECOMPILE_MIN_TRIP_BYTES", "32768")
    verdict = fmecompile.bisect(net(), batch())
    assert verdict.wrong is None and verdict.over is not None and verdict.over.name == "chunk-loops"
    assert verdict.over.overshoot.startswith("chunk_loop_") and "projected" in str(verdict)


def test_bad_input() -> None:
    with pytest.raises(fmecompile.TargetError, match=r"takes an nn.Module, not int"):
        fmecompile.bisect(3)  # type: ignore[arg-type]
    with pytest.raises(fmecompile.OptionError, match="no positive number"):
        fmecompile.bisect(net(), batch(), tolerance=0.0)
