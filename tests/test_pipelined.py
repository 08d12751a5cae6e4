"""Pipelined loops: which may be, in what order their trips run, what they hold, and that no memory is read too early or
too late."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import looped_chains
from conformance import FACTS, Looped, Tape, assert_same, module_of, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Device
from torch import fx, nn

import fmecompile
from fmecompile.analysis.memory import project
from fmecompile.analysis.verify import measured_peak_bytes
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import Program
from fmecompile.graph.specs import TensorSpec
from fmecompile.operators.registry import tensor
from fmecompile.partition.candidates import candidates
from fmecompile.partition.partition import Answer, Chosen, Partitioner
from fmecompile.partition.search import Choice
from fmecompile.passes.chunk_loops import ChunkLoops
from fmecompile.passes.pipeline_chunks import PipelineChunks, gain_s
from fmecompile.runtime import chunk_loop
from fmecompile.runtime.chunk_loop import ChunkLoop, LoopAxis, LoopSpec, Narrow, Output, Slicing, must_run_in_order
from fmecompile.runtime.measure import StorageMeter
from fmecompile.runtime.rates import ASSUMED
from fmecompile.runtime.schedule import Schedule, Wait, schedule

aten = torch.ops.aten
F64 = torch.float64

# ------------------------------------------------------------------------------------------------------------- schedule


def test_the_schedule_is_data() -> None:
    assert schedule(5, 2) == Schedule((Wait(1, 0),), (0, 1, 0, 1, 0), (Wait(0, 1),))
    assert schedule(3, 1) == Schedule((), (0, 0, 0), ())
    assert schedule(4, 3) == Schedule((Wait(1, 0), Wait(2, 0)), (0, 1, 2, 0), (Wait(0, 1), Wait(0, 2)))
    assert schedule(2, 4) == Schedule((Wait(1, 0),), (0, 1), (Wait(0, 1),)), "no stream without a trip"


# ---------------------------------------------------------------------------------------------------- loops that may be

OWN = Slicing((Narrow(0, ((0, 1),), 1, True),))
HALO = Slicing((Narrow(0, ((0, 1),), 1, True, (1, 1), 6),))


def spec(reads: tuple[Slicing | None, ...], *, takes: int | None = None, writes: Slicing = OWN) -> LoopSpec:
    output = Output(writes, (6, 2), (2, 1), F64, takes=takes)
    return LoopSpec((LoopAxis(6, 2),), reads, (output,), (0, 0, 0))


@pytest.mark.parametrize(
    ("loop", "storages", "why"),
    [
        (spec((OWN, None)), "xw", ""),
        (spec((HALO,)), "x", ""),
        (spec((OWN,), takes=0), "x", ""),
        (spec((OWN, OWN), takes=0), "xx", ""),
        (spec((HALO,), takes=0), "x", "trips read rows that others write over"),
        (spec((OWN, HALO), takes=0), "xx", "trips read rows that others write over"),
        (spec((OWN, None), takes=0), "xx", "trips read rows that others write over"),
        (spec((OWN, HALO), takes=0), "xy", ""),
        (spec((OWN,), writes=Slicing(())), "x", "several trips write the same rows"),
        (replace(spec((OWN,)), axes=(LoopAxis(6, 6),)), "x", "there is nothing to overlap"),
    ],
)
def test_which_loops_may_overlap(loop: LoopSpec, storages: str, why: str) -> None:
    assert must_run_in_order(loop, storages) == why


def test_every_axis_of_a_nest_has_rows_of_its_own() -> None:
    """Over (2, 6): a slice that follows the inner axis alone is written once for each row of the outer."""
    both = Slicing((Narrow(0, ((0, 1),), 1, False), Narrow(1, ((1, 1),), 1, True)))
    inner = Slicing((Narrow(0, ((1, 1),), 1, True),))
    nest = replace(spec((OWN,), writes=both), axes=(LoopAxis(2, 1), LoopAxis(6, 2)))
    assert must_run_in_order(nest, "x") == ""
    assert must_run_in_order(replace(nest, outputs=(replace(nest.outputs[0], slicing=inner),)), "x")


# ------------------------------------------------------------------------------------------------ the model of a device


def pipelined(program: Program, groups: tuple[Looped, ...], slots: int) -> tuple[fx.GraphModule, int]:
    """``program`` with loops in slots where they may be, and how many are."""
    program = program.copy()
    partitioner = Partitioner(program, FACTS)
    built = [partitioner.builder.build(g.start, g.stop, g.nest, g.chunk) for g in groups]
    roots = partitioner.storages.roots
    may = [not must_run_in_order(g.spec, [roots.get(n, n) for n in g.operands]) for g in built]
    built = [g.with_slots(slots) if ok else g for g, ok in zip(built, may, strict=True)]
    return module_of(program, dict(ChunkLoops(built).apply(program))), sum(may)


def recorded(monkeypatch: pytest.MonkeyPatch, module: nn.Module, operands: list[torch.Tensor]) -> tuple[Device, Any]:
    """Run ``module`` on the model of a device."""
    device = Device(operands)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(chunk_loop, "streams_beside", lambda *_: device)
        with device:
            results = module(*operands)
    return device, results


def durations(device: Device, seed: int) -> list[float]:
    """From a hundredth to a hundred times as long as one another."""
    rng = random.Random(seed)
    return [10 ** rng.uniform(-2, 2) for _ in device.tasks]


def test_random_loops_race_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte is read before it is written, nor after its block was given out again: proven by the order that holds for
    all durations, and tried with random ones."""
    overlapped: list[int] = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(looped_chains(), st.sampled_from([2, 2, 3]), st.integers(0, 2**32))
    def one(case: tuple[Program, tuple[Looped, ...]], slots: int, seed: int) -> None:
        program, groups = case
        operands = tensors_of(program)
        module, count = pipelined(program, groups, slots)
        if not count:
            return
        device, results = recorded(monkeypatch, module, operands)
        assert_same(results, module_of(program)(*operands))
        assert not [(a.name, b.name) for a, b in device.races()]
        for k in range(3):
            assert not device.wrong_reads(durations(device, seed + k))
        overlapped.append(sum(task.stream > 0 for task in device.tasks))

    one()
    assert sum(map(bool, overlapped)) > 25, "the stress test has to overlap something"


def between() -> tuple[Program, tuple[Looped, ...]]:
    """A loop that takes its operand over, between calls of the caller that reuse what it read and left."""
    tape = Tape()
    h = tape.call(aten.exp.default, tape.input(tensor(8, 16)))
    y = h
    for _ in range(3):
        y = tape.call(aten.silu.default, y)
    z = tape.call(aten.exp.default, tape.call(aten.neg.default, y))
    program = tape.program(tape.call(aten.neg.default, z))
    nest = Partitioner(program, FACTS).axes[y].axes[0]
    return program, (Looped(1, 4, nest, 2),)


def is_broken(monkeypatch: pytest.MonkeyPatch, program: Program, groups: tuple[Looped, ...]) -> tuple[bool, bool]:
    """Whether the proof finds a race, and whether one of twenty random runs reads something wrong."""
    module, count = pipelined(program, groups, 2)
    assert count
    device, _ = recorded(monkeypatch, module, tensors_of(program))
    return bool(device.races()), any(device.wrong_reads(durations(device, seed)) for seed in range(20))


@pytest.mark.parametrize(
    ("broken", "found"),
    [({}, False), ({"fork": ()}, True), ({"join": ()}, True), ({"fork": (), "join": ()}, True)],
    ids=["as it is", "no fork", "no join", "neither"],
)
def test_the_model_notices_a_broken_schedule(
    monkeypatch: pytest.MonkeyPatch, broken: dict[str, tuple[Wait, ...]], found: bool
) -> None:
    monkeypatch.setattr(chunk_loop, "schedule", lambda *how: replace(schedule(*how), **broken))
    assert is_broken(monkeypatch, *between()) == (found, found)


def test_the_model_notices_a_loop_that_must_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trip writes over rows that its neighbours read."""
    over = Output(OWN, (6, 2), (2, 1), F64, takes=1)
    loop_spec = replace(spec((OWN, HALO)), outputs=(over,), slots=2)
    body = fx.Graph()
    own, near = body.placeholder("part_0"), body.placeholder("part_1")
    total = body.call_function(aten.sum.dim_IntList, (near, [0]))
    body.output((body.call_function(aten.add.Tensor, (own, total)),))
    loop = ChunkLoop(loop_spec, [fx.GraphModule(nn.Module(), body)])
    assert must_run_in_order(loop_spec, "xy")
    operands = [torch.randn(6, 2, dtype=F64), torch.randn(6, 2, dtype=F64)]
    assert recorded(monkeypatch, loop, operands)[0].races()


def test_an_exception_is_behind_the_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are given back while side streams may still write them: whoever gets that memory comes behind."""
    program, groups = between()
    module, _ = pipelined(program, groups, 2)
    operands = tensors_of(program)
    (loop,) = (m for m in module.modules() if isinstance(m, ChunkLoop))
    trips: list[int] = []
    body = loop.bodies[0].forward

    def stopping(*pieces: torch.Tensor) -> Any:
        trips.append(1)
        if len(trips) == 4:
            raise ArithmeticError
        return body(*pieces)

    monkeypatch.setattr(loop.bodies[0], "forward", stopping)
    device = Device(operands)
    monkeypatch.setattr(chunk_loop, "streams_beside", lambda *_: device)
    with device, torch.no_grad():
        with pytest.raises(ArithmeticError):
            module(*operands)
        gc.collect()
        kept = [torch.exp(operands[0]) for _ in range(4)]
    assert len(kept) == 4 and any(task.stream for task in device.tasks)
    assert not device.races()


def test_slots_run_in_order_where_there_are_no_streams() -> None:
    """The same bits, and the peak of one trip at a time."""
    program, groups = between()
    operands = tensors_of(program)
    peaks = []
    results = []
    for slots in (1, 2, 3):
        with StorageMeter(operands) as meter, torch.no_grad():
            results.append(pipelined(program, groups, slots)[0](*operands)[0])
        peaks.append(meter.peak_bytes)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert len(set(peaks)) == 1


# ---------------------------------------------------------------------------------------------------------- the planner

GPU = torch.device("cuda")
ROWS, WIDE = 16, 2**12


def pointwise(device: torch.device, columns: int, calls: int = 6) -> Partitioner:
    """A chain that can be cut by rows, of which each call takes as long as ``columns`` say."""
    tape = Tape()
    x = tape.input(TensorSpec((ROWS, columns), (columns, 1), torch.float16, device))
    y = tape.call(aten.silu.default, x)
    for _ in range(calls):
        y = tape.call(aten.silu.default, y)
    return Partitioner(tape.program(tape.call(aten.neg.default, y)), FACTS)


def answer_for(partitioner: Partitioner, chunk: int = 1) -> Answer:
    """All but the ends as one loop, by rows."""
    nodes = partitioner.region.nodes
    nest = partitioner.axes[nodes[1]].axes[0]
    found = candidates(partitioner.region, partitioner.axes, 1)
    candidate = max((c for c in found if c.nest == nest), key=lambda c: c.stop)
    group = partitioner.builder.build(1, candidate.stop, nest, chunk)
    trips = ROWS // chunk
    peak = partitioner.peak_bytes(1, group)
    chosen = Chosen(group, Choice(candidate, chunk, trips), peak, 2 * peak, candidate.extra_s(trips, chunk))
    return Answer((chosen,), peak, peak)


PAYING = 10 * 2**18
"""Columns of half precision with which a row takes a kernel 15 us at the assumed rates."""


@pytest.mark.parametrize(
    ("device", "columns", "room", "slots"),
    [
        (GPU, PAYING, 2.5, 2),
        (torch.device("cpu"), PAYING, 2.5, 1),  # no streams
        (GPU, 16 * PAYING, 2.5, 1),  # kernels that fill the device
        (GPU, PAYING // 16, 2.5, 1),  # kernels that run faster than the host asks for them
        (GPU, PAYING, 0.5, 1),  # no room for another trip
    ],
    ids=["pays", "CPU", "large kernels", "tiny kernels", "no room"],
)
def test_loops_are_pipelined_where_it_pays(device: torch.device, columns: int, room: float, slots: int) -> None:
    partitioner = pointwise(device, columns)
    answer = answer_for(partitioner)
    (before,) = answer.chosen
    limit = before.peak_bytes + int(room * before.group.body_bytes)
    (after,) = PipelineChunks(limit).apply(partitioner, answer).chosen
    assert after.group.spec.slots == slots
    assert after.peak_bytes == before.peak_bytes + (slots - 1) * before.group.body_bytes <= limit
    assert (after.extra_s < before.extra_s) == (slots > 1)


def test_a_loop_that_must_run_in_order_is_not_pipelined() -> None:
    partitioner = pointwise(GPU, PAYING)
    answer = answer_for(partitioner)
    (chosen,) = answer.chosen
    shared = replace(chosen.group.spec.outputs[0], slicing=Slicing(()))
    in_order = replace(chosen.group, spec=replace(chosen.group.spec, outputs=(shared,)))
    (after,) = (
        PipelineChunks(2**40).apply(partitioner, replace(answer, chosen=(replace(chosen, group=in_order),))).chosen
    )
    assert after.group.spec.slots == 1


def test_a_gain_is_never_more_than_what_kernels_cost_however_small() -> None:
    rates = ASSUMED["cuda"]
    chosen = answer_for(pointwise(GPU, PAYING)).chosen[0]
    candidate = chosen.choice.candidate
    calls = candidate.issue_s / rates.issue_s
    assert gain_s(chosen, rates, 2) == pytest.approx(ROWS * calls * rates.call_s / 2)
    assert gain_s(chosen, ASSUMED["cpu"], 2) == 0


# ------------------------------------------------------------------------------------- allowed >= projected >= measured


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(nn.functional.gelu(self.wide(x)))


@pytest.fixture
def planned() -> tuple[nn.Module, torch.Tensor, Plan]:
    torch.manual_seed(0)
    module, x = Chain().double().eval().requires_grad_(False), torch.randn(4, 32, 16, dtype=F64)
    return module, x, fmecompile.plan(module, x)


def in_slots(plan: Plan, slots: int) -> Plan:
    """The plan with all loops in so many slots, and what that may take."""
    return replace(plan, groups=tuple(replace(group, slots=slots) for group in plan.groups))


def test_a_saved_plan_replays_its_slots(planned: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path) -> None:
    module, x, plan = planned
    assert plan.groups and not plan.pipelined and " at once" not in plan.summary()
    in_slots(plan, 2).save(tmp_path / "plan.json")
    saved = Plan.load(tmp_path / "plan.json")
    want = module(x)
    fmecompile.optimize(module, plan=saved, strict=True)
    module(x)
    measured = fmecompile.measure(module, x)
    assert torch.allclose(measured.output, want, rtol=1e-12)
    explanation = fmecompile.explain(module)
    replayed = explanation.records[0].plan
    assert replayed.pipelined == len(plan.groups)
    assert "2 at once" in str(explanation) and "trips overlap" in str(explanation)
    replayed.to_html(tmp_path / "plan.html")
    assert ", 2 at once" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert replayed.allowed_bytes >= replayed.projected_peak_bytes >= measured.peak_bytes
    assert plan.projected_peak_bytes < replayed.projected_peak_bytes <= 2 * plan.projected_peak_bytes


def test_projected_counts_the_trips_under_way() -> None:
    program, (looped,) = between()
    held = []
    for slots in (1, 2, 3, 99):
        copy = program.copy()
        builder = Partitioner(copy, FACTS).builder
        group = builder.build(looped.start, looped.stop, looped.nest, looped.chunk).with_slots(slots)
        loops = dict(ChunkLoops([group]).apply(copy))
        projection = project(copy, dict.fromkeys(loops, group), FACTS)
        assert projection.peak_bytes >= measured_peak_bytes(copy, dict(loops))
        own = next(m.own_bytes for m in projection.moments if m.node.op == "call_module")
        held.append((own - group.output_bytes) / group.body_bytes)
    assert held == [1, 2, 3, 4], "no more than there are trips"
