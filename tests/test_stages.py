"""Looking inside: stages as code that runs, what differs between two, pictures, traces, and names in snapshots."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fmecompile
from fmecompile.backends import inductor
from fmecompile.graph.plan import Plan
from fmecompile.stages import Stage
from tests.test_inductor import Block, as_operators
from tests.test_report import FeedForward

MIB = 2**20


def batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 1024, 64)


def optimized(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = fmecompile.optimize(FeedForward().eval().requires_grad_(False), strict=True, **options)
    with fmecompile.generation(steps=3):
        for _ in range(3):
            module(batch())
    return module


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return optimized(memory_budget="8MiB")


@pytest.fixture(scope="module")
def stages(module: nn.Module) -> list[Stage]:
    return fmecompile.stages(module)


def plan_of(module: nn.Module) -> Plan:
    return fmecompile.explain(module).records[0].plan


def operands(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), batch()]


# Stages


def test_the_code_of_a_stage_is_its_program(module: nn.Module, stages: list[Stage]) -> None:
    given = operands(module)
    for stage in (stages[0], stages[10], *stages[-2:]):
        defined: dict[str, Any] = {}
        exec(stage.code, defined)
        assert torch.equal(defined["program"](*given)[0], stage.program(*given)[0]), stage.name
        measured = [fmecompile.measure(program, *given).peak_bytes for program in (defined["program"], stage.program)]
        assert measured[0] == measured[1] <= stage.projected_peak_bytes, stage.name


def test_a_call_tells_its_module_its_line_and_its_pass(stages: list[Stage]) -> None:
    first, last = stages[0].code.splitlines(), stages[-1].code.splitlines()
    at = next(place for place, line in enumerate(first) if "aten.layer_norm" in line)
    assert re.fullmatch(r" +# norm \| test_report.py:\d+: return x \+ self.down\(.*\) \| capture", first[at - 1])
    assert first[at].endswith("# f32 8x1024x64")
    sums = next(place for place, line in enumerate(last) if "aten.add" in line)
    assert last[sums - 1].endswith("| capture, changed by chunk-loops")
    assert last[0].startswith("# FeedForward after fuse-norm: ")


def test_print_readable_shows_the_loops(stages: list[Stage], capsys: pytest.CaptureFixture[str]) -> None:
    said = stages[-1].program.print_readable()
    assert capsys.readouterr().out.strip() == said.strip()
    assert re.search(r"chunk_loop_0: \d+ trips over 8 rows by 1 x 1024 rows by \d+; they hold \d+ bytes", said)
    assert "reads operand 0 sliced by dim 0, dim 1" in said and "2097152 bytes allocated, sliced" in said


@pytest.mark.parametrize(
    "options", [{}, {"memory_budget": "12MiB"}, {"max_chunks": 4}, {"memory_budget": "20MiB", "reuse": True}]
)
def test_stages_are_of_the_plan_that_runs(options: dict[str, Any]) -> None:
    if options.get("reuse"):
        options = options | {"reuse": fmecompile.StepRehash(full_steps=2, cut="down")}
    module = optimized(**options)
    record = fmecompile.explain(module).records[0]
    found = fmecompile.stages(module)
    assert found[-1].projected_peak_bytes == record.plan.projected_peak_bytes
    assert [stage.name for stage in found] == [name for name, _ in record.notes if name != "(head)"]
    trips = sum(loop.spec.trips for loop in found[-1].program.children())  # type: ignore[union-attr]
    assert trips == record.plan.trips
    assert ("step-reuse" in [stage.name for stage in found]) == ("reuse" in options)


def test_diff_tells_what_moved_into_loops(stages: list[Stage]) -> None:
    before, after = stages[-3], stages[-1]
    said = fmecompile.diff(before, after)
    head, *lines = said.splitlines()
    assert (
        head.startswith("pipeline-chunks -> fuse-norm: projected peak 64.0 MiB -> ")
        and "4 moved into loops or kernels" in head
    )
    assert any(line.startswith("+ chunk_loop_0: ") for line in lines)
    assert lines[lines.index("up:") + 1].startswith("  > linear = aten.linear.default(")
    assert any(line.startswith("  ~ add = aten.add.Tensor(x, linear_1)") for line in lines)
    assert fmecompile.diff(before, after) == said
    back = fmecompile.diff(after, before).splitlines()
    assert "- chunk_loop_0" in back and any(line.startswith("  - chunk_loop_0 = ") for line in back)
    same = fmecompile.diff(before, before)
    assert same.count("\n") == 1 and "the same calls" in same
    with pytest.raises(fmecompile.TargetError, match="pass two of"):
        fmecompile.diff(before, after.code)  # type: ignore[arg-type]


def test_kernels_are_shown_as_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_compile", as_operators)
    monkeypatch.setattr(inductor, "_missing", lambda operators: "")
    monkeypatch.setenv("FMECOMPILE_MIN_FUSED_BYTES", "0")
    module, x = Block().eval().requires_grad_(False), torch.randn(96, 8, 16)
    want = module(x)
    fmecompile.optimize(module, backend="inductor", strict=True)(x)
    *_, before, after = fmecompile.stages(module)
    assert after.name == "fuse-runs" and "class fused_0(" in after.code and "class fused_0(" not in before.code
    for stage in (before, after):
        defined: dict[str, Any] = {}
        exec(stage.code, defined)
        for program in (defined["program"], stage.program):
            assert torch.allclose(program(*module.parameters(), x)[0], want, atol=1e-5)
    assert re.search(r"> gelu = .* in chunk_loop_0.fused_\d", fmecompile.diff(before, after))


# Pictures


def test_a_group_is_drawn(stages: list[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Dot:
        def __init__(self, body: Any, name: str, **_: Any) -> None:
            drawn.append(f"{name}: {[node.name for node in body.graph.nodes if node.op == 'call_function']}")

        def get_dot_graph(self) -> Any:
            return self

        def to_string(self) -> str:
            return drawn[-1]

        def create(self, format: str) -> bytes:
            raise FileNotFoundError("dot")

    monkeypatch.setitem(sys.modules, "pydot", ModuleType("pydot"))
    monkeypatch.setattr("torch.fx.passes.graph_drawer.FxGraphDrawer", Dot)
    stages[-1].draw(0, tmp_path / "group.dot")
    assert "chunk_loop_0: ['layer_norm', 'linear', " in (tmp_path / "group.dot").read_text()
    for stage, group, name, hint in (
        (stages[-1], 7, "a.dot", "give a number from 0 to"),
        (stages[0], 0, "a.dot", "take a stage from chunk-loops on"),
        (stages[-1], 0, "a.txt", "name it .dot"),
        (stages[-1], 0, "a.svg", "install Graphviz"),
    ):
        with pytest.raises(fmecompile.OptionError, match=hint):
            stage.draw(group, tmp_path / name)
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(fmecompile.OptionError, match="pip install pydot"):
        stages[-1].draw(0, tmp_path / "b.dot")
    assert [path.name for path in tmp_path.iterdir()] == ["group.dot"]


# Measured times and traces


def test_a_measurement_times_loops_and_follows_modules(module: nn.Module) -> None:
    found = fmecompile.measure(module, batch())
    check_times(plan_of(module), found)
    fresh = fmecompile.optimize(FeedForward().eval().requires_grad_(False), strict=True)
    first = fmecompile.measure(fresh, batch())  # the call that compiles, which runs loops on fake tensors too
    check_times(plan_of(fresh), first)
    eager = fmecompile.measure(FeedForward().eval(), batch())
    assert list(dict.fromkeys(name for name, _ in eager.modules)) == ["", "norm", "up", "down"]
    assert not torch.nn.modules.module._global_forward_pre_hooks


def check_times(plan: Plan, found: fmecompile.Measurement) -> None:
    loops = [span for span in found.spans if span.name != "trip"]
    assert [span.name for span in loops] == [f"chunk_loop_{k}" for k in range(len(plan.groups))]
    assert len(found.spans) - len(loops) == plan.trips
    assert all(0 <= span.start_s < span.end_s <= found.times_s[-1] + 1 for span in found.spans)
    assert len(found.times_s) == len(found.timeline) and list(found.times_s) == sorted(found.times_s)


def test_a_trace_has_modules_loops_trips_and_bytes(module: nn.Module, tmp_path: Path) -> None:
    plan = plan_of(module)
    plan.to_trace(tmp_path / "trace.json", fmecompile.measure(module, batch()))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for process in (1, 2):
        own = [event for event in events if event["pid"] == process]
        slices = {event["name"]: event for event in own if event["ph"] == "X"}
        held = [event["args"]["bytes"] for event in own if event["ph"] == "C"]
        assert held and max(held) <= plan.projected_peak_bytes
        loop = slices["chunk_loop_0"]
        assert loop["args"]["trips"] == plan.groups[0].trips
        trips = [event for event in own if event["name"].startswith("trip ")]
        assert len(trips) == plan.trips
        assert all(event["dur"] >= 0 for event in own if event["ph"] == "X")
    projected = [event for event in events if event["pid"] == 1 and event.get("tid") == 1 and event["ph"] == "X"]
    assert {event["name"] for event in projected} <= {"norm", "up", "down"} and projected
    assert max(e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == 1) == max(plan.timeline)
    assert sum(plan.durations_s) == pytest.approx(plan.whole_s + plan.extra_s, rel=1e-3)


# CUDA's allocator


def test_allocations_of_loops_bear_their_names(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(fmecompile.OptionError, match="measure"), fmecompile.memory_snapshot(tmp_path / "no.pickle"):
        pass
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_record_memory_history", "_dump_snapshot", "_get_memory_metadata", "_set_memory_metadata"):
        monkeypatch.setattr(torch.cuda.memory, name, getattr(allocator, name))
    with fmecompile.memory_snapshot(tmp_path / "snapshot.pickle"):
        fmecompile.stages(module)[-1].program(*operands(module))
    loops = [f"chunk_loop_{k}: the module itself" for k in range(len(plan_of(module).groups))]
    assert allocator.log == ["on", *[name for loop in loops for name in (loop, "mine")], "dump", "off"]
    with pytest.raises(ZeroDivisionError), fmecompile.memory_snapshot(tmp_path / "snapshot.pickle"):
        raise ZeroDivisionError
    assert allocator.log[-2:] == ["on", "off"]


class Allocator:
    """Stands in for what torch.cuda.memory does."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._metadata = "mine"

    def _record_memory_history(self, enabled: str | None = "all", **_: Any) -> None:
        self.log.append("off" if enabled is None else "on")

    def _dump_snapshot(self, path: str) -> None:
        self.log.append("dump")

    def _get_memory_metadata(self) -> str:
        return self._metadata

    def _set_memory_metadata(self, metadata: str) -> None:
        self._metadata = metadata
        self.log.append(metadata)
