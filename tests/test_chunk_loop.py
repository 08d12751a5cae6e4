"""The chunk loop at run time: what it slices, what it writes over, what it leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from chains import looped_chains
from conformance import (
    FACTS,
    Looped,
    Tape,
    assert_chunks_equal,
    assert_same,
    module_of,
    region_of,
    tensors_of,
    valid_nests,
    with_loops,
)
from hypothesis import given, settings
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.graph.program import Program
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.registry import tensor
from fmecompile.partition.layout import can_overlay
from fmecompile.partition.nests import Nest
from fmecompile.partition.partition import Partitioner
from fmecompile.runtime.chunk_loop import ChunkLoop, LoopAxis, LoopSpec, Narrow, Output, Slicing
from fmecompile.runtime.measure import StorageMeter

aten = torch.ops.aten
CPU = torch.device("cpu")


def atoms_of(program: Program, node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """The atoms of every dimension of ``node``."""
    return Partitioner(program, FACTS).axes[node].axes


def loop_of(program: Program, looped: Looped) -> tuple[ChunkLoop, fx.GraphModule]:
    """The one loop of ``program`` rewritten, and the module around it."""
    program = program.copy()
    loops, _ = with_loops(program, looped)
    (loop,) = loops.values()
    return loop, module_of(program, loops)


def calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_module"]


# -------------------------------------------------------------------------------------------------- outputs taken over


def residual(order: list[int] | None = None) -> tuple[Program, fx.Node]:
    """h = clone(x), in a permuted layout if asked; y = silu(h) + h. The result may be written over h."""
    tape = Tape()
    x = tape.input(tensor(5, 4, 3))
    h = tape.call(aten.clone.default, x)
    h = tape.call(aten.permute.default, h, order) if order else h
    y = tape.call(aten.add.Tensor, tape.call(aten.silu.default, h), h)
    return tape.program(y), y


@pytest.mark.parametrize("order", [None, [2, 0, 1], [1, 0, 2]], ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_dying_operand_gives_its_storage(order: list[int] | None, chunk: int) -> None:
    program, y = residual(order)
    views = 2 if order else 1
    nest = atoms_of(program, y)[0]
    looped = Looped(views, views + 2, nest, min(chunk, node_spec(y).shape[0]))
    loop, module = loop_of(program, looped)
    (output,) = loop.spec.outputs
    assert output.takes is not None
    assert assert_chunks_equal(program, [looped]) == 1
    given: list[torch.Tensor] = []
    loop.register_forward_pre_hook(lambda _, operands: given.extend(operands))
    with torch.no_grad():
        (result,) = module(*tensors_of(program))
    assert result.untyped_storage()._cdata == given[output.takes].untyped_storage()._cdata


def test_a_storage_that_is_read_later_is_not_taken() -> None:
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(5, 4)))
    y = tape.call(aten.silu.default, h)
    program = tape.program(y, tape.call(aten.add.Tensor, y, h))
    nest = atoms_of(program, y)[0]
    looped = Looped(1, 2, nest, 2)
    assert loop_of(program, looped)[0].spec.outputs[0].takes is None
    assert_chunks_equal(program, [looped])


def test_a_graph_input_is_not_taken() -> None:
    tape = Tape()
    y = tape.call(aten.silu.default, tape.input(tensor(5, 4)))
    program = tape.program(y)
    looped = Looped(0, 1, atoms_of(program, y)[0], 2)
    assert loop_of(program, looped)[0].spec.outputs[0].takes is None
    assert_chunks_equal(program, [looped])


def test_a_graph_output_is_not_taken() -> None:
    """Not even through a view: the caller gets both."""
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(5, 4)))
    view = tape.call(aten.reshape.default, h, [20])
    y = tape.call(aten.silu.default, h)
    program = tape.program(view, y)
    looped = Looped(2, 3, atoms_of(program, y)[0], 2)
    assert loop_of(program, looped)[0].spec.outputs[0].takes is None
    assert_chunks_equal(program, [looped])


def test_an_operand_that_another_trip_reads_is_not_taken() -> None:
    """In self-attention every trip reads all keys."""
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(2, 6, 4)))
    y = tape.call(aten.scaled_dot_product_attention.default, h, h, h)
    program = tape.program(y)
    batch, rows, _ = atoms_of(program, y)
    over_rows, over_batch = Looped(1, 2, rows, 4), Looped(1, 2, batch, 1)
    assert loop_of(program, over_rows)[0].spec.outputs[0].takes is None
    assert loop_of(program, over_batch)[0].spec.outputs[0].takes is not None
    assert_chunks_equal(program, [over_rows, over_batch])


def test_one_storage_is_given_once() -> None:
    """Two results, two views of one dying operand: the second result is allocated."""
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(5, 4)))
    a, b = tape.call(aten.silu.default, h), tape.call(aten.neg.default, h)
    program = tape.program(a, b)
    looped = Looped(1, 3, atoms_of(program, a)[0], 2)
    outputs = loop_of(program, looped)[0].spec.outputs
    assert sorted(output.takes is not None for output in outputs) == [False, True]
    assert_chunks_equal(program, [looped])


@pytest.mark.parametrize("chunk", [1, 2, 3, 4], ids=lambda c: f"chunk {c}")
def test_a_storage_that_another_result_is_a_view_of_is_not_taken(chunk: int) -> None:
    """silu(h) could be laid over h, but a copy of h^T is, in a chunk of one row, no copy: it is that row of h."""
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(5, 4)))
    a = tape.call(aten.silu.default, h)
    b = tape.call(aten.contiguous.default, tape.call(aten.permute.default, h, [1, 0]))
    program = tape.program(a, b)
    looped = Looped(1, 4, atoms_of(program, a)[0], chunk)
    assert_chunks_equal(program, [looped])


def test_a_row_expanded_to_the_size_of_its_storage() -> None:
    """The second row of h, three times: as many elements as h, from an offset of its own."""
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(3, 2)))
    row = tape.call(aten.slice.Tensor, h, 0, 1, 2)
    y = tape.call(aten.neg.default, tape.call(aten.expand.default, row, [3, 2]))
    program = tape.program(y)
    assert_chunks_equal(program, [Looped(3, 4, atoms_of(program, y)[1], 1)])


@pytest.mark.parametrize(
    ("new", "old", "fits"),
    [
        ((4, 1), (4, 1), True),
        ((1, 4), (4, 1), False),  # another memory order: rows lie elsewhere
        ((4, 1), (4, 2), False),  # every second element
        ((8, 1), (8, 2), False),
    ],
)
def test_overlays_need_the_same_addresses(new: tuple[int, ...], old: tuple[int, ...], fits: bool) -> None:
    specs = [TensorSpec((4, 4), strides, torch.float64, CPU) for strides in (new, old)]
    axes = ((0,), (1,))
    assert can_overlay(specs[0], axes, specs[1], axes, (0,), {0: 4, 1: 4}) == fits


def test_another_dtype_or_layout_is_not_laid_over() -> None:
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(4, 4, dtype=torch.float64)))
    y = tape.call(aten.to.dtype, h, torch.float32)
    program = tape.program(y)
    looped = Looped(1, 2, atoms_of(program, y)[0], 2)
    assert loop_of(program, looped)[0].spec.outputs[0].takes is None
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(4, 4)))
    turned = tape.call(aten.permute.default, h, [1, 0])
    y = tape.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    program = tape.program(y)
    looped = Looped(2, 3, atoms_of(program, y)[0], 2)
    assert loop_of(program, looped)[0].spec.outputs[0].takes is None
    assert_chunks_equal(program, [looped])


# ----------------------------------------------------------------------------------------------- tails and split views


@pytest.mark.parametrize(("size", "chunk", "trips", "tail"), [(7, 3, 3, 1), (6, 3, 2, 0), (5, 4, 2, 1), (5, 1, 5, 0)])
def test_ragged_tails(size: int, chunk: int, trips: int, tail: int) -> None:
    tape = Tape()
    y = tape.call(aten.linear.default, tape.input(tensor(size, 4)), tape.input(tensor(3, 4)))
    program = tape.program(y)
    looped = Looped(0, 1, atoms_of(program, y)[0], chunk)
    loop, _ = loop_of(program, looped)
    assert loop.spec.trips == trips
    assert len(loop.bodies) == 1 + bool(tail)
    assert len(loop.distinct_trips) == 1 + bool(tail)
    rows: list[int] = []
    for body in loop.bodies:
        body.register_forward_pre_hook(lambda _, operands: rows.append(operands[0].shape[0]))
    loop(*tensors_of(program))
    assert rows == [chunk] * (size // chunk) + [tail] * bool(tail)
    assert_chunks_equal(program, [looped])


def merged() -> tuple[Program, Nest, Nest]:
    """(batch, frames, 3) with batch and frames merged into 12 rows, in and out; and their two atoms."""
    tape = Tape()
    h = tape.call(aten.clone.default, tape.input(tensor(12, 3)))
    y = tape.call(aten.silu.default, h)
    apart = tape.call(aten.reshape.default, y, [3, 4, 3])
    z = tape.call(aten.mul.Tensor, apart, tape.input(tensor(3, 4, 1)))
    program = tape.program(tape.call(aten.reshape.default, z, [12, 3]))
    batch, frames, _ = atoms_of(program, z)
    return program, batch, frames


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_the_inner_part_of_a_merged_axis_is_cut_through_a_view(chunk: int) -> None:
    """A slice of frames out of rows [batch, frames] is no slice of rows: the row axis is viewed as two first."""
    program, batch, frames = merged()
    loop, _ = loop_of(program, Looped(1, 4, frames, chunk))
    assert loop.spec.slicings[0] is not None and loop.spec.slicings[0].shape == (3, 4, 3)
    outer, _ = loop_of(program, Looped(1, 4, batch, 2))
    assert outer.spec.slicings[0] is not None and outer.spec.slicings[0].shape is None
    assert_chunks_equal(
        program,
        [
            Looped(1, 4, frames, chunk),
            Looped(1, 4, batch, 2),
            Looped(1, 4, batch + frames, chunk),
            Looped(0, 4, frames, 3),
        ],
    )


def test_a_nest_of_merged_rows_is_one_slice() -> None:
    """One row of batch, then some frames: contiguous rows again, no view needed."""
    program, batch, frames = merged()
    loop, _ = loop_of(program, Looped(1, 4, batch + frames, 2))
    assert loop.spec.slicings[0] is not None and loop.spec.slicings[0].shape is None
    assert loop.spec.trips == 6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(looped_chains())
def test_trips_write_every_row_once(case: tuple[Program, tuple[Looped, ...]]) -> None:
    """Or, where a result lacks an atom of the nest, once for every row of that atom, and then into its own storage."""
    program, groups = case
    if not groups:
        return
    loops, _ = with_loops(program.copy(), *groups)
    for loop in loops.values():
        for k, output in enumerate(loop.spec.outputs):
            written = torch.zeros(output.slicing.shape or output.shape)
            for _, _, writes in loop._trips:
                target = written
                for dim, start, length in writes[k]:
                    assert start + length <= target.shape[dim]
                    target = target.narrow(dim, start, length)
                target += 1
            lacking = set(range(len(loop.spec.axes))) - {axis for n in output.slicing.narrows for axis, _ in n.terms}
            times = prod(loop.spec.axes[axis].trips for axis in lacking)
            assert bool((written == times).all())
            assert output.takes is None or not lacking


# ------------------------------------------------------------------------------------------------------------- by hand


def traced(function: Callable[..., Any], operands: int) -> fx.GraphModule:
    """A body of ``operands`` operands."""
    graph = fx.Graph()
    graph.output(function(*(graph.placeholder(f"p{k}") for k in range(operands))))
    return fx.GraphModule(nn.Module(), graph)


def rows(chunk: int, *, of: int = 0) -> Slicing:
    del chunk
    return Slicing((Narrow(of, ((0, 1),), 1, True),))


def by_hand(size: int = 5, chunk: int = 2) -> ChunkLoop:
    """(x + w, (x * 2) transposed) over rows of x; w is read whole."""

    def write(x: fx.Node, w: fx.Node) -> tuple[fx.Node, ...]:
        graph = x.graph
        total = graph.call_function(torch.add, (x, w))
        double = graph.call_function(torch.mul, (x, 2))
        return total, graph.call_function(torch.t, (double,))

    outputs = (
        Output(rows(chunk), (size, 3), (3, 1), torch.float64),
        Output(rows(chunk, of=1), (3, size), (1, 3), torch.float64),
    )
    kinds = (0,) * (size // chunk) + (1,) * (size % chunk > 0)
    spec = LoopSpec((LoopAxis(size, chunk),), (rows(chunk), None), outputs, kinds)
    return ChunkLoop(spec, [traced(write, 2) for _ in set(kinds)])


def test_two_outputs_in_their_own_layouts() -> None:
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert_same(by_hand()(x, w), (x + w, (x * 2).t()))


def test_outputs_keep_their_dtypes() -> None:
    tape = Tape()
    x = tape.input(tensor(5, 4))
    program = tape.program(tape.call(aten.gt.Scalar, x, 0.0), tape.call(aten.to.dtype, x, torch.float16))
    region = region_of(program)
    assert_chunks_equal(program, [Looped(0, 2, nest, 2) for nest in valid_nests(region, 0, 2)])


def test_outputs_are_on_the_device_of_their_values() -> None:
    """sigma * sample, with sigma a scalar on the CPU as samplers keep it; the meta device stands in for a GPU."""
    tape = Tape()
    meta = torch.device("meta")
    sigma = tape.input(TensorSpec((), (), torch.float32, CPU))
    y = tape.call(aten.mul.Tensor, sigma, tape.input(TensorSpec((5, 6), (6, 1), torch.float32, meta)))
    program = tape.program(y)
    assert node_spec(y).device == meta
    loop, module = loop_of(program, Looped(0, 1, atoms_of(program, y)[0], 2))
    assert loop.spec.trips == 3
    (result,) = module(torch.ones(()), torch.empty(5, 6, device=meta))
    assert result.device == meta


def test_a_loop_may_move_its_operand_to_another_device() -> None:
    """_to_copy has a rule, so a group may hold a move from the CPU to the GPU."""
    tape = Tape()
    x = tape.input(TensorSpec((4, 6), (6, 1), torch.float32, CPU))
    moved = tape.call(aten._to_copy.default, x, device=torch.device("meta"))
    program = tape.program(tape.call(aten.silu.default, moved))
    loop, module = loop_of(program, Looped(0, 2, atoms_of(program, moved)[0], 2))
    (result,) = module(torch.ones(4, 6))
    assert loop.spec.trips == 2
    assert result.device.type == "meta"


def test_fake_tensors_run_through_a_loop() -> None:
    with FakeTensorMode():
        total, double = by_hand()(torch.empty(5, 3, dtype=torch.float64), torch.empty(3, dtype=torch.float64))
    assert (total.shape, double.shape, double.stride()) == ((5, 3), (3, 5), (1, 3))


# ---------------------------------------------------------------------------------------------- exceptions and storages


def test_an_interrupt_leaves_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the second trip: outputs and pieces are released, and the next call is right."""
    loop = by_hand(7, 2)
    x, w = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    trips: list[int] = []
    forward = loop.bodies[0].forward

    def interrupted(*operands: torch.Tensor) -> Any:
        trips.append(len(trips))
        values = forward(*operands)
        if len(trips) == 2:
            raise KeyboardInterrupt
        return values

    monkeypatch.setattr(loop.bodies[0], "forward", interrupted)
    meter = StorageMeter([x, w])
    with meter:
        try:
            loop(x, w)
        except KeyboardInterrupt:
            stopped = True
        gc.collect()
        assert stopped and trips == [0, 1]
        assert meter.peak_bytes > 0
        assert meter.current_bytes == 0
    monkeypatch.undo()
    assert_same(loop(x, w), (x + w, (x * 2).t()))
    assert not vars(loop).keys() - {"training", "spec", "label", *_private(loop)}, "a loop keeps no state of a call"


def _private(loop: ChunkLoop) -> set[str]:
    return {name for name in vars(loop) if name.startswith("_")}


def test_calls_do_not_add_up() -> None:
    """Every call holds the same peak and, when its outputs are dropped, nothing."""
    program, batch, frames = merged()
    _, module = loop_of(program, Looped(1, 4, batch + frames, 3))
    tensors = tensors_of(program)
    peaks, left = [], []
    with torch.no_grad():
        for _ in range(5):
            meter = StorageMeter(tensors)
            with meter:
                results = module(*tensors)
                held = meter.current_bytes
                del results
            peaks.append(meter.peak_bytes)
            left.append(meter.current_bytes)
            assert held > 0
    assert len(set(peaks)) == 1
    assert left == [0] * 5


@pytest.mark.parametrize("chunk", [1, 4, 16, 24])
def test_a_trip_does_not_hold_the_one_before(chunk: int) -> None:
    """The peak is the outputs and one trip, whatever the number of trips: here two values of a chunk each."""
    tape = Tape()
    x = tape.input(tensor(64, 64))
    program = tape.program(tape.call(aten.silu.default, tape.call(aten.exp.default, x)))
    tensors = tensors_of(program)
    _, module = loop_of(program, Looped(0, 2, valid_nests(region_of(program), 0, 2)[0], chunk))
    with torch.no_grad(), StorageMeter(tensors) as meter:
        module(*tensors)
    assert meter.peak_bytes == (64 + 2 * chunk) * 64 * 8


def test_bodies_of_equal_structure_are_one_module() -> None:
    """Two layers of the same shape share a body, since weights are operands."""
    tape = Tape()
    h = tape.input(tensor(6, 4))
    for _ in range(2):
        h = tape.call(aten.silu.default, tape.call(aten.linear.default, h, tape.input(tensor(4, 4))))
    program = tape.program(h)
    nest = atoms_of(program, h)[0]
    groups = (Looped(0, 2, nest, 2), Looped(2, 4, nest, 2))
    loops, _ = with_loops(program.copy(), *groups)
    first, second = loops.values()
    assert first.bodies[0] is second.bodies[0]
    assert_chunks_equal(program, [groups])
