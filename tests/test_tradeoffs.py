"""Work and transfers given for memory: values made twice, values in host memory, GroupNorms in parts or whole."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from chains import chains, dense, loops_in, shapes, steps_for
from conformance import (
    FACTS,
    Tape,
    assert_chunks_equal,
    assert_same,
    module_of,
    region_of,
    tensors_of,
    with_loops,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fmecompile
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.memory import project
from fmecompile.analysis.storages import storages
from fmecompile.analysis.verify import measured_peak_bytes
from fmecompile.graph.invariants import check
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import spec_of
from fmecompile.operators.contraction import products
from fmecompile.operators.registry import tensor
from fmecompile.partition import partition, tradeoffs
from fmecompile.partition.candidates import Candidate
from fmecompile.partition.tradeoffs import CHEAP_WORK, FREE_WORK, Limits
from fmecompile.passes.recompute import Recompute
from fmecompile.passes.recompute import chains as recomputable
from fmecompile.passes.spill import Spill, Wait
from fmecompile.pipeline import NO_LIMITS, Compilation, compile_module, compile_program
from fmecompile.runtime import chunk_loop, host
from fmecompile.runtime.chunk_loop import ChunkLoop, LoopAxis, LoopSpec, Narrow, Output
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.host import host_empty, is_host, to_device, to_host
from fmecompile.runtime.measure import StorageMeter
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics
from tests.models import animatediff_call, seeded, small_animatediff, small_svd, svd_call
from tests.test_models import frames_of, image_decoder, latents, relative, video_decoder

aten = torch.ops.aten
F64, CPU = torch.float64, torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def no_grad(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


# --------------------------------------------------------------------------------------------------------- whole models


@dataclass(frozen=True)
class Call:
    """A module and what it is called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        return tree_leaves((self.args, self.kwargs))

    def eager(self) -> Any:
        return self.module(*self.args, **self.kwargs)

    def plan(self, limits: Limits = NO_LIMITS) -> fmecompile.Plan:
        return compile_module(self.module, self.args, self.kwargs, limits=limits)[1]


@dataclass(frozen=True)
class Ran:
    plan: fmecompile.Plan
    peak_bytes: int
    output: Any


def ran(call: Call, limits: Limits, *saved: fmecompile.Plan) -> Ran:
    """Compile and run once for the constants, then measured."""
    compiled, plan = compile_module(call.module, call.args, call.kwargs, saved=saved, limits=limits)
    executable, leaves = Executable(compiled, call.module), call.leaves
    executable(leaves)
    with StorageMeter([*call.module.parameters(), *call.module.buffers(), *leaves]) as meter:
        output = executable(leaves)
    return Ran(plan, meter.peak_bytes, output)


def of_video_decoder() -> Call:
    return Call(video_decoder().to(F64), (latents(4),), frames_of(2, 2))


def of_image_decoder() -> Call:
    return Call(image_decoder().to(F64), (latents(1, 11, 9),), {})


def of_svd() -> Call:
    return Call(small_svd().to(F64), svd_call(2, 3, 8, 8, F64), {})


def of_animatediff() -> Call:
    return Call(small_animatediff().to(F64), animatediff_call(2, 3, 8, 8, F64), {})


def within(call: Call, want: Any, allowed: int, *, may_spill: bool) -> fmecompile.Plan | fmecompile.BudgetInfeasible:
    """The plan of a limit, after it ran as it says; or why there is none."""
    try:
        got = ran(call, Limits(allowed, may_spill))
    except fmecompile.BudgetInfeasible as error:
        assert error.floor_bytes > error.allowed_bytes == allowed
        return error
    assert relative(got.output, want) <= 1e-10
    assert got.plan.allowed_bytes == allowed
    assert allowed >= got.plan.projected_peak_bytes >= got.peak_bytes
    assert got.plan.projected_peak_bytes <= 1.02 * got.peak_bytes
    assert may_spill or not got.plan.spilled
    return got.plan


@pytest.mark.parametrize(
    ("build", "share", "is_met"),
    [
        (of_image_decoder, 0.9, True),
        (of_image_decoder, 0.7, True),
        (of_image_decoder, 0.5, False),
        (of_video_decoder, 0.9, True),
        pytest.param(of_animatediff, 0.9, True, marks=pytest.mark.slow),
        pytest.param(of_svd, 0.7, True, marks=pytest.mark.slow),
    ],
)
def test_what_a_limit_takes(build: Callable[[], Call], share: float, is_met: bool) -> None:
    """With values in host memory a limit is met that is refused otherwise; never the other way round."""
    call = build()
    want = call.eager()
    allowed = int(call.plan().projected_peak_bytes * share)
    spilling = within(call, want, allowed, may_spill=True)
    keeping = within(call, want, allowed, may_spill=False)
    assert isinstance(spilling, fmecompile.Plan) == is_met
    if isinstance(keeping, fmecompile.BudgetInfeasible):
        assert spilling.spilled if isinstance(spilling, fmecompile.Plan) else True
    else:
        assert isinstance(spilling, fmecompile.Plan)


def test_nothing_waits_in_host_memory_without_need() -> None:
    call = of_image_decoder()
    default = call.plan()
    assert not call.plan(Limits(None, may_spill=True)).spilled
    roomy = call.plan(Limits(2 * default.projected_peak_bytes, may_spill=True))
    assert not roomy.spilled and not roomy.recomputed
    assert roomy.trips <= default.trips


# ---------------------------------------------------------------------------------------------------- values made twice


class Block(nn.Module):
    """Widens, normalises, narrows: the wide value is what a GroupNorm keeps waiting; ``late`` reads it at the end."""

    def __init__(self, widen: int, narrow: int, *, late: bool = False) -> None:
        super().__init__()
        self.widen = nn.Conv2d(16, 64, widen, padding=widen // 2)
        self.norm = nn.GroupNorm(8, 64)
        self.narrow = nn.Conv2d(64, 16, narrow, padding=narrow // 2)
        self.again = nn.Conv2d(16, 64, 1) if late else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.widen(x)
        y = self.narrow(F.silu(self.norm(h)))
        return y if self.again is None else (self.again(y) + h).sum(1)


def block(widen: int, narrow: int, **kwargs: Any) -> Call:
    x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(1), dtype=F64)
    return Call(seeded(Block(widen, narrow, **kwargs)).to(F64), (x,), {})


def works(call: Call, limits: Limits = NO_LIMITS) -> tuple[int, int]:
    """Products before the partition and behind it."""
    found: dict[str, int] = {}

    def observe(name: str, compilation: Compilation) -> None:
        found[name] = sum(map(products, compute_nodes(compilation.program.graph)))

    compile_module(call.module, call.args, call.kwargs, limits=limits, observe=observe)
    return found["two-pass-norm"], found["partition"]


def test_values_are_made_twice_where_that_is_next_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 % more products, for much less than the wide value."""
    call = block(1, 5)
    want = call.eager()
    twice = ran(call, NO_LIMITS)
    before, behind = works(call)
    assert twice.plan.recomputed == ("group_norm_moments",)
    assert before < behind <= (1 + FREE_WORK) * before
    assert relative(twice.output, want) <= 1e-10
    assert twice.peak_bytes <= twice.plan.projected_peak_bytes <= 1.02 * twice.peak_bytes
    monkeypatch.setattr(tradeoffs, "FREE_WORK", 0)
    once = ran(call, NO_LIMITS)
    assert not once.plan.recomputed
    assert twice.peak_bytes < 0.6 * once.peak_bytes


@pytest.mark.parametrize(("widen", "narrow", "is_cheap"), [(1, 3, True), (3, 1, False)], ids=["cheap", "dear"])
def test_values_are_made_twice_for_a_limit(widen: int, narrow: int, is_cheap: bool) -> None:
    """Cheap ones rather than they are moved to host memory, dear ones where that is not allowed."""
    call = block(widen, narrow)
    want = call.eager()
    default = call.plan()
    assert not default.recomputed
    before, behind = works(call)
    assert before == behind
    allowed = int(0.8 * default.floor_bytes)
    limits = Limits(allowed, may_spill=is_cheap)
    got = ran(call, limits)
    assert got.plan.recomputed and not got.plan.spilled
    assert relative(got.output, want) <= 1e-10
    assert allowed >= got.plan.projected_peak_bytes >= got.peak_bytes
    before, behind = works(call, limits)
    assert (1 + FREE_WORK) * before < behind
    assert (behind <= (1 + CHEAP_WORK) * before) == is_cheap


def test_values_are_moved_rather_than_made_twice_where_that_is_dear() -> None:
    call = block(3, 1)
    limits = Limits(int(0.8 * call.plan().floor_bytes), may_spill=True)
    got = ran(call, limits)
    assert got.plan.spilled and not got.plan.recomputed
    assert relative(got.output, call.eager()) <= 1e-10


def test_what_waits_for_a_late_reader_is_not_made_twice() -> None:
    call = block(1, 5, late=True)
    default = call.plan()
    assert not default.recomputed
    with pytest.raises(fmecompile.BudgetInfeasible):
        call.plan(Limits(int(0.8 * default.floor_bytes)))


def normed(tape: Tape, x: fx.Node, groups: int) -> fx.Node:
    statistics = tape.call(group_norm_statistics, tape.call(group_norm_moments, x, groups), 1e-3)
    return tape.call(group_norm_apply, x, statistics, None, None)


def two_norms() -> Program:
    tape = Tape()
    x = tape.call(aten.silu.default, tape.input(tensor(2, 4, 6, 5)))
    y = tape.call(aten.silu.default, normed(tape, tape.call(aten.neg.default, x), 2))
    return tape.program(normed(tape, tape.call(aten.neg.default, y), 2))


def test_a_value_that_is_made_twice_is_equal() -> None:
    program = two_norms()
    want = module_of(program.copy())(*tensors_of(program))
    names = [chain.moments.name for chain in recomputable(program, FACTS)]
    assert len(names) == 2
    for some in ([names[0]], [names[1]], names, names[::-1]):
        twin = program.copy()
        Recompute(some).apply(twin, FACTS)
        assert_same(module_of(twin)(*tensors_of(program)), want)


def test_what_is_made_twice_is_not_made_three_times() -> None:
    program = two_norms()
    names = [chain.moments.name for chain in recomputable(program, FACTS)]
    Recompute(names).apply(program, FACTS)
    Recompute(names).apply(program, FACTS)
    assert all(node.users for node in compute_nodes(program.graph))


def test_values_are_made_twice_in_one_go_as_one_by_one() -> None:
    """A saved plan is replayed in one go; the search went step by step."""
    program = two_norms()
    names = [chain.moments.name for chain in recomputable(program, FACTS)]
    steps, once = program.copy(), program.copy()
    for name in names:
        Recompute((name,)).apply(steps, FACTS)
    Recompute(names).apply(once, FACTS)
    assert str(steps.graph) == str(once.graph)


# ---------------------------------------------------------------------------------------------------------- saved plans


@pytest.mark.parametrize(
    ("build", "share", "may_spill", "expected"),
    [
        (of_image_decoder, 0.7, True, ("spilled", "joined")),
        (of_image_decoder, 0.9, False, ("recomputed", "joined")),
        (lambda: block(3, 1), 0.8, False, ("recomputed",)),
        (lambda: block(3, 1, late=True), 0.8, True, ("spilled",)),
    ],
    ids=["spilled and joined", "recomputed and joined", "recomputed", "spilled"],
)
def test_a_saved_plan_is_replayed_without_a_search(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    build: Callable[[], Call],
    share: float,
    may_spill: bool,
    expected: tuple[str, ...],
) -> None:
    call = build()
    limits = Limits(int(share * call.plan().projected_peak_bytes), may_spill)
    first = ran(call, limits)
    assert all(getattr(first.plan, name) for name in expected)
    first.plan.save(tmp_path / "plan.json")
    plan = fmecompile.Plan.load(tmp_path / "plan.json")
    assert plan == first.plan
    monkeypatch.setattr("fmecompile.pipeline.prepare", lambda *_: pytest.fail("searched"))
    monkeypatch.setattr(partition, "cheapest", lambda *_: pytest.fail("searched"))
    monkeypatch.setattr(partition, "least_limit", lambda *_: pytest.fail("searched"))
    again = ran(call, limits, plan)
    assert (again.plan.recomputed, again.plan.spilled, again.plan.joined) == (
        plan.recomputed,
        plan.spilled,
        plan.joined,
    )
    assert again.plan.groups == plan.groups
    assert again.plan.projected_peak_bytes == plan.projected_peak_bytes
    assert again.peak_bytes == first.peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(again.output), tree_leaves(first.output), strict=True))


# ---------------------------------------------------------------------------------------------------------- host memory


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, 1:3, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.flatten()[:0],
        lambda x: x[0, 0, 0, 0],
        lambda x: x.half(),
        lambda x: x > 0,
    ],
    ids=["dense", "channels last", "permuted", "sliced", "expanded", "empty", "scalar", "half", "bool"],
)
def test_a_round_trip_keeps_values_and_order(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = make(torch.randn(2, 4, 6, 5, dtype=F64))
    there = to_host(x)
    back = to_device(there, x.device)
    assert is_host(there) and not is_host(back) and not is_host(x)
    for copy in (there, back):
        assert torch.equal(copy, x) and copy.dtype == x.dtype
        assert copy.stride() == torch.empty_like(x).stride()
        assert copy.data_ptr() != x.data_ptr() or not x.numel()
    back.fill_(1)
    assert torch.equal(there, x)


def test_views_of_host_memory_are_host_memory() -> None:
    there = to_host(torch.randn(4, 6))
    assert is_host(there[1:].t())
    assert not is_host(there + 1)


def test_host_memory_is_not_counted() -> None:
    x = torch.randn(128, 1024, dtype=F64)
    with StorageMeter([x]) as meter:
        there = to_host(x)
        more = host_empty((1024, 128), (128, 1), F64, CPU)
        assert meter.current_bytes == 0 and is_host(more)
        back = to_device(there, CPU)
        assert meter.current_bytes == meter.peak_bytes == MIB
        del there
        assert meter.current_bytes == MIB
        del back
        assert meter.current_bytes == 0


def test_facts_of_host_memory() -> None:
    """No bytes of the device on the way out, one copy on the way back."""
    facts, spec = FactTable(), spec_of(torch.empty(128, 1024, dtype=F64))
    out = facts(to_host, (spec,), {})
    assert (out.nbytes, out.alias, out.result) == ((0,), (None,), spec)
    back = facts(to_device, (spec, CPU), {})
    assert (back.nbytes, back.hidden_bytes, back.alias, back.result) == ((MIB,), 0, (None,), spec)


def test_facts_are_known_to_later_compilations_under_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(torch.empty(3, 7, 11, dtype=torch.int64))
    call = (torch.ops.aten.mul.Tensor, (spec, 0.5), {})
    known = FactTable()(*call)
    assert known.result.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(FactTable, "_run", None)
        assert FactTable()(*call) is known
        torch.set_default_dtype(F64)
        try:
            with pytest.raises(TypeError):
                FactTable()(*call)
            patch.undo()
            assert FactTable()(*call).result.dtype == F64
        finally:
            torch.set_default_dtype(torch.float32)


def test_nothing_is_held_on_the_way_out() -> None:
    spec = spec_of(torch.empty(128, 1024, dtype=F64))
    assert FactTable()(to_host, (spec,), {}).hidden_bytes == 0


def test_marks_vanish_with_their_tensors() -> None:
    gc.collect()
    before = len(host._host)
    kept = [to_host(torch.randn(8)) for _ in range(10)]
    assert len(host._host) == before + 10
    del kept
    assert len(host._host) == before
    with FakeTensorMode():
        to_host(torch.empty(8))
    gc.collect()
    assert len(host._host) == before


def test_a_hundred_calls_leave_no_marks() -> None:
    call = block(3, 1, late=True)
    limits = Limits(int(0.8 * call.plan().floor_bytes), may_spill=True)
    compiled, plan = compile_module(call.module, call.args, {}, limits=limits)
    assert plan.spilled
    executable = Executable(compiled, call.module)
    gc.collect()
    before = len(host._host)
    for _ in range(100):
        executable(call.leaves)
        assert len(host._host) == before


def host_writing_loop(body: Callable[[torch.Tensor], torch.Tensor]) -> ChunkLoop:
    """Four rows one by one into host memory."""
    graph = fx.Graph()
    x = graph.placeholder("part_0")
    graph.output((graph.call_function(body, (x,)),))
    rows = chunk_loop.Slicing((Narrow(0, ((0, 1),), 1, True),))
    output = Output(rows, (4, 6), (6, 1), F64, host_of=CPU)
    spec = LoopSpec((LoopAxis(4, 1),), (rows,), (output,), (0, 0, 0, 0))
    return ChunkLoop(spec, [fx.GraphModule(nn.Module(), graph)])


def test_a_loop_that_raises_leaves_nothing_behind() -> None:
    trips: list[int] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        trips.append(1)
        if len(trips) == 3:
            raise ArithmeticError("in the third trip")
        return x * 2

    loop, x = host_writing_loop(body), torch.randn(4, 6, dtype=F64)
    before = len(host._host)
    with StorageMeter([x]) as meter:
        with pytest.raises(ArithmeticError):
            loop(x)
        gc.collect()
        assert meter.current_bytes == 0
    assert len(host._host) == before
    (result,) = loop(x)
    assert is_host(result) and torch.equal(result, x * 2)


def test_an_allocation_that_fails_marks_nothing() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        host_empty((2, -1), (1, 1), F64, CPU)
    assert not is_host(torch.empty(4))


def test_marking_is_a_matter_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread allocates while host memory is made is no host memory."""
    seen: list[bool] = []
    empty_strided = torch.empty_strided

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        thread = threading.Thread(target=lambda: seen.append(is_host(torch.empty(4))))
        thread.start()
        thread.join()
        seen.append(is_host(torch.empty(4)))
        return empty_strided(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_strided", watched)
    host_empty((4,), (1,), F64, CPU)
    assert seen == [False, True]


def test_a_value_in_host_memory_is_read_early_only() -> None:
    """Views of it are taken of its copy; the ones that nothing reads any more are gone."""
    tape = Tape()
    x = tape.call(aten.silu.default, tape.input(tensor(4, 6)))
    y = tape.call(aten.exp.default, tape.call(aten.exp.default, x))
    late = tape.call(aten.reshape.default, x, [24])
    program = tape.program(y, tape.call(aten.neg.default, late))
    cut = compute_nodes(program.graph)[2]
    Spill(((x.name, cut.name),)).apply(program, FACTS)
    nodes = compute_nodes(program.graph)
    behind = nodes[nodes.index(cut) :]
    assert not any(x in node.all_input_nodes for node in behind)


# ------------------------------------------------------------------------------------------------------ random programs


@st.composite
def waiting(draw: st.DrawFn) -> Program:
    """A value that waits while a chain of two to five steps runs; what is returned is small."""
    tape = Tape()
    early = tape.call(aten.silu.default, tape.input(dense(draw, draw(shapes(3, 4, (8, 12))))))
    value = tape.call(aten.neg.default, early)
    for _ in range(draw(st.integers(2, 5))):
        value = draw(st.sampled_from(steps_for(tape.shape(value))))(tape, value, draw)
    late = tape.call(aten.exp.default, early)
    ends = (tape.call(aten.sum.dim_IntList, end, [0]) if tape.shape(end) else end for end in (value, late))
    return tape.program(*ends)


def test_chains_within_a_limit_equal_chains_without() -> None:
    """The same values in no more bytes than the plan says; or a refusal."""
    outcomes: list[str] = []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(waiting(), st.sampled_from([0.95, 0.8, 0.6]), st.sampled_from([True, True, False]))
    def one(program: Program, share: float, may_spill: bool) -> None:
        tensors = tensors_of(program)
        want = module_of(program.copy())(*tensors)
        _, default = compile_program(Compilation(program.copy()))
        limits = Limits(int(default.projected_peak_bytes * share), may_spill)
        try:
            compiled, plan = compile_program(Compilation(program.copy()), limits=limits)
        except fmecompile.BudgetInfeasible as error:
            assert error.floor_bytes > error.allowed_bytes == limits.activation_bytes
            outcomes.append("refused")
            return
        executable = Executable(compiled, nn.Module())
        with StorageMeter(tensors) as meter:
            got = executable(list(tensors))
        assert_same(got, want)
        assert meter.peak_bytes <= plan.projected_peak_bytes
        assert may_spill or not plan.spilled
        outcomes.append("spilled" if plan.spilled else "kept")

    one()
    assert outcomes.count("spilled") >= 5 and outcomes.count("refused") >= 5


@st.composite
def waits_in(draw: st.DrawFn, program: Program) -> Wait | None:
    """Any value that is read again, in front of any call up to its last reader."""
    nodes = compute_nodes(program.graph)
    held = storages(nodes, program.outputs, FACTS)
    ends = {n: last for n, last in held.last.items() if n in held.position and last < len(nodes)}
    owners = [n for n, last in ends.items() if last > held.position[n] and n.target is not to_host]
    if not owners:
        return None
    owner = draw(st.sampled_from(owners))
    return owner.name, nodes[draw(st.integers(held.position[owner] + 1, ends[owner]))].name


def test_chains_with_values_in_host_memory_equal_chains_without() -> None:
    """Up to three cuts anywhere, and one or two loops around them or through them."""
    through: list[bool] = []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        program = data.draw(chains())
        tensors = tensors_of(program)
        want = module_of(program.copy())(*tensors)
        for _ in range(data.draw(st.integers(1, 3))):
            cut = data.draw(waits_in(program))
            if cut is not None:
                Spill((cut,)).apply(program, FACTS)
                check(program)
        assert_same(module_of(program.copy())(*tensors), want)
        region = region_of(program)
        first = data.draw(loops_in(region))
        if first is None:
            return
        second = data.draw(loops_in(region, first.stop)) if first.stop < len(region.nodes) else None
        groups = (first,) if second is None else (first, second)
        assert_chunks_equal(program, [groups])
        looped = program.copy()
        loops, made = with_loops(looped, *groups)
        assert measured_peak_bytes(looped, dict(loops)) <= project(looped, made, FACTS).peak_bytes
        moved = [p for p, node in enumerate(region.nodes) if node.target in (to_host, to_device)]
        through.append(any(group.start <= p < group.stop for group in groups for p in moved))

    one()
    assert sum(through) >= 30


# ----------------------------------------------------------------------------------------------------------- the search


def test_exact_prices_are_learned() -> None:
    candidate = Candidate(0, 3, (7,), 1000, ((100.0, 800.0),), size=8)
    assert candidate.peak_bytes(2) == 1300 and candidate.fit(1300) == (4, 2)
    candidate.learn(2, 1100, 450)
    assert candidate.peak_bytes(2) == 1550  # as it was built
    assert candidate.peak_bytes(4) == 1100 + 1.5 * 500  # off by the same factor
    assert candidate.fit(1549) == (8, 1) and candidate.fit(1550) == (4, 2)
    candidate.learn(2, 1100, 450)
    assert candidate.scale == 1.5  # not twice
    candidate.learn(4, 1100, 600)
    assert candidate.peak_bytes(4) == 1700 and candidate.scale == 1.5  # cheaper than thought: only this size is


class Copies(nn.Module):
    """A GroupNorm whose operand has its rows in front of its channels: whole it copies it, in parts it does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm((x * 2).transpose(1, 2), 2).tanh()


def test_a_group_norm_of_another_layout_is_joined_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMECOMPILE_MIN_TRIP_BYTES", str(2**40))  # no loops
    x = torch.randn(2, 16, 8, 16, dtype=F64)
    call = Call(Copies().eval(), (x,), {})
    low = ran(call, Limits())
    assert not low.plan.groups and low.plan.joined == ("group_norm",)
    assert low.peak_bytes <= low.plan.projected_peak_bytes < 2.5 * x.nbytes, "operand and result, and no copy of either"
    assert relative(low.output, call.eager()) <= 1e-10
    tight = ran(call, Limits(int(1.01 * low.plan.projected_peak_bytes)))
    assert tight.plan.joined == ("group_norm",)
    with pytest.raises(fmecompile.BudgetInfeasible):
        call.plan(Limits(int(0.9 * low.plan.floor_bytes)))
