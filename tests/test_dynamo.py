"""``torch.compile(m, backend="fmecompile")`` as its users know it: breaks, shapes, weights, options, logs."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._logging._internal import TorchLogsFormatter

from tests.models import animatediff_call, small_animatediff, small_svd, svd_call


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.wide, self.narrow, self.breaks = nn.Linear(32, 128), nn.Linear(128, 32), breaks

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = torch.nn.functional.gelu(self.wide(x)) * scale
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.narrow(y)


def rows(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 16, 32)


def close(found: Any, wanted: Any) -> bool:
    return bool(torch.allclose(found, wanted, rtol=1e-4, atol=1e-5))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_it_is_listed() -> None:
    assert "fmecompile" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    ("build", "call"),
    [
        pytest.param(small_svd, svd_call, marks=pytest.mark.slow, id="svd"),
        pytest.param(small_animatediff, animatediff_call, id="animatediff"),
    ],
)
def test_a_unet_is_one_graph(build: Any, call: Any) -> None:
    model, inputs = build(), call(1, 3, 8, 8, torch.float32)
    compiled = torch.compile(model, backend="fmecompile", fullgraph=True)
    for timestep in (inputs[1], inputs[1] + 1):
        inputs = (inputs[0], timestep, *inputs[2:])
        assert torch.allclose(compiled(*inputs)[0], model(*inputs)[0], rtol=1e-4, atol=1e-4)
    assert graphs() == 1


def test_each_part_of_a_broken_graph_is_a_program() -> None:
    module, x = Block(breaks=True), rows()
    compiled = torch.compile(module, backend="fmecompile")
    assert close(compiled(x), module(x))
    assert graphs() == 2


def test_a_signature_is_compiled_once() -> None:
    module = Block()
    compiled = torch.compile(module, backend="fmecompile", fullgraph=True)
    for _ in range(4):
        x = rows()
        assert close(compiled(x), module(x))
    assert graphs() == 1


def test_shapes_may_change() -> None:
    module = Block()
    compiled = torch.compile(module, backend="fmecompile", dynamic=None)
    for count in (64, 48, 32, 80, 64):
        x = rows(count)
        assert close(compiled(x), module(x))
    assert graphs() == 2  # for one size, then for any


def test_numbers_that_change_leave_the_graph_eager() -> None:
    module, x = Block(), rows()
    compiled = torch.compile(module, backend="fmecompile")
    assert close(compiled(x, 1.0), module(x, 1.0))
    with pytest.warns(UserWarning, match="depends on the values of tensors"):  # Dynamo has made the number an input
        assert close(compiled(x, 0.5), module(x, 0.5))
    assert close(compiled(x, 0.25), module(x, 0.25))


def test_weights_that_change_in_place_are_seen() -> None:
    module, x = Block(), rows()
    compiled = torch.compile(module, backend="fmecompile", fullgraph=True)
    before = compiled(x)
    module.wide.weight.mul_(2)
    assert close(compiled(x), module(x)) and not close(compiled(x), before)
    assert graphs() == 1


def test_another_option_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"no option 'memory_budgets'\n.*near it are memory_budget"):
        torch.compile(Block(), backend="fmecompile", options={"memory_budgets": 1})(rows())


def test_stages_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fmecompile"):
        torch.compile(Block(), backend="fmecompile")(rows())
    assert "capture: 5 operators" in caplog.text
    assert "chunk-loops: the graph" in caplog.text
    assert "torch.ops.aten.linear.default" in caplog.text
    assert "GiB projected" in caplog.text


@pytest.mark.slow
def test_torch_logs_shows_them() -> None:
    code = (
        "import torch; m = torch.nn.Linear(4, 4).requires_grad_(False);"
        "torch.compile(m, backend='fmecompile')(torch.ones(2, 4))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_LOGS": "+fmecompile"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "chunk-loops: the graph" in ran.stderr


def test_artifacts_belong_to_the_frame() -> None:
    log, written = logging.getLogger("torch.__trace"), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(TorchLogsFormatter(trace=True))
    log.addHandler(handler)
    try:
        torch.compile(Block(), backend="fmecompile")(rows())
    finally:
        log.removeHandler(handler)
    entries = [json.loads(line.split("]", 1)[1]) for line in written.getvalue().splitlines() if "fmecompile_" in line]
    assert [entry["artifact"]["name"] for entry in entries] == ["fmecompile_plan", "fmecompile_graph"]
    assert all(entry["frame_id"] == 0 for entry in entries)
