"""Loops over rows that go through convolutions: exact at every border, and built as they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, prod

import pytest
import torch
from chains import CONVOLUTIONS, divisors
from conformance import (
    FACTS,
    Looped,
    Tape,
    assert_chunks_equal,
    region_of,
    valid_nests,
    with_loops,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx

from fmecompile.analysis.memory import project
from fmecompile.analysis.verify import measured_peak_bytes
from fmecompile.graph.group import Group
from fmecompile.graph.program import Program
from fmecompile.graph.specs import tensor_spec
from fmecompile.operators.registry import tensor
from fmecompile.partition.partition import Partitioner
from fmecompile.runtime.chunk_loop import ChunkLoop, LoopSpec
from fmecompile.runtime.measure import StorageMeter
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

aten = torch.ops.aten
MOST_NUMEL = 3000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operators lose ten times their time to threads when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------- programs


def conv(
    tape: Tape, x: fx.Node, kernel: list[int], stride: list[int] | None = None, dilation: list[int] | None = None
) -> fx.Node:
    """As many channels as before, padding in the middle, and a factor that keeps a chain of them at its size."""
    stride, dilation = stride or [1] * len(kernel), dilation or [1] * len(kernel)
    channels = tape.shape(x)[1]
    weight, bias = tape.input(tensor(channels, channels, *kernel)), tape.input(tensor(channels))
    padding = [k // 2 * d for k, d in zip(kernel, dilation, strict=True)]
    result = tape.call(CONVOLUTIONS[len(kernel)], x, weight, bias, stride, padding, dilation)
    return tape.call(aten.mul.Scalar, result, 0.3)


def norm(tape: Tape, x: fx.Node, groups: int, of: fx.Node | None = None) -> fx.Node:
    """In three parts; ``of`` is what the statistics are taken of, if not x itself."""
    moments = tape.call(group_norm_moments, of or x, groups)
    return tape.call(group_norm_apply, x, tape.call(group_norm_statistics, moments, 1e-3), None, None)


def up(tape: Tape, x: fx.Node, *ratio: float) -> fx.Node:
    return tape.call(aten.upsample_nearest2d.vec, x, None, list(ratio))


def plus(tape: Tape, *values: fx.Node) -> fx.Node:
    return tape.call(aten.add.Tensor, *values)


def silu(tape: Tape, x: fx.Node) -> fx.Node:
    return tape.call(aten.silu.default, x)


def resnet_block(tape: Tape, x: fx.Node) -> fx.Node:
    """Statistics of both norms from outside: of x, and of a copy of it."""
    h = conv(tape, silu(tape, norm(tape, x, 2)), [3, 3])
    return plus(tape, x, conv(tape, silu(tape, norm(tape, h, 2, of=x)), [3, 3]))


def shared_by_two_kernels(tape: Tape, x: fx.Node) -> fx.Node:
    """One value read with halos of 0, 1 and 4, so that two of its readers take a slice of what is made."""
    h = silu(tape, x)
    return plus(tape, plus(tape, conv(tape, h, [3]), conv(tape, h, [5], dilation=[2])), h)


def joined_rows(tape: Tape, x: fx.Node) -> fx.Node:
    """A convolution along rows of rows: two of its rows are one row of the atom that is looped over."""
    joined = tape.call(aten.reshape.default, silu(tape, x), [*tape.shape(x)[:2], prod(tape.shape(x)[2:])])
    return conv(tape, joined, [5])


def split_rows(tape: Tape, x: fx.Node) -> fx.Node:
    """Rows of a convolution are split behind it: a loop may run over the outer part, not over the inner one."""
    y = conv(tape, x, [3])
    return silu(tape, tape.call(aten.reshape.default, y, [*tape.shape(y)[:2], 3, tape.shape(y)[2] // 3]))


def strided_and_back(tape: Tape, x: fx.Node) -> fx.Node:
    down = conv(tape, conv(tape, x, [3, 1]), [3, 3], stride=[2, 2])
    return plus(tape, x, conv(tape, up(tape, down, 2.0, 2.0), [3, 3]))


PROGRAMS: dict[str, tuple[Callable[[Tape, fx.Node], fx.Node], tuple[int, ...]]] = {
    "one": (lambda t, x: conv(t, x, [3]), (2, 2, 7)),
    "dilated": (lambda t, x: conv(t, x, [5], dilation=[2]), (1, 2, 11)),
    "halo of more than all rows": (lambda t, x: conv(t, conv(t, x, [5], dilation=[2]), [5], dilation=[2]), (1, 2, 6)),
    "strided": (lambda t, x: conv(t, conv(t, x, [3], stride=[2]), [3]), (2, 2, 14)),
    "strided twice": (lambda t, x: conv(t, conv(t, x, [5], stride=[2]), [3], stride=[2]), (1, 2, 20)),
    "strided without a halo": (lambda t, x: conv(t, silu(t, x), [2, 3], stride=[2, 1]), (2, 2, 8, 3)),
    "strided to one row": (lambda t, x: conv(t, silu(t, x), [3, 3], stride=[1, 2]), (2, 2, 6, 2)),
    "of two dimensions": (lambda t, x: conv(t, silu(t, conv(t, x, [3, 5])), [3, 3]), (2, 2, 6, 5)),
    "of frames": (lambda t, x: conv(t, conv(t, x, [3, 1, 1]), [1, 3, 3]), (2, 2, 5, 4, 3)),
    "upsampled": (lambda t, x: conv(t, up(t, x, 2.0, 2.0), [3, 3]), (2, 2, 5, 3)),
    "upsampled between": (lambda t, x: conv(t, up(t, conv(t, x, [3, 3]), 4.0, 1.0), [5, 3]), (1, 2, 5, 3)),
    "upsampled by three": (lambda t, x: conv(t, up(t, x, 3.0, 1.0), [3, 3]), (1, 2, 4, 5)),
    "residual": (lambda t, x: plus(t, silu(t, x), conv(t, silu(t, x), [3, 3])), (2, 2, 6, 3)),
    "moments": (lambda t, x: norm(t, conv(t, x, [3, 3]), 2), (2, 4, 6, 3)),
    "resnet block": (resnet_block, (1, 4, 7, 3)),
    "shared by two kernels": (shared_by_two_kernels, (1, 2, 10)),
    "joined rows": (joined_rows, (2, 2, 5, 2)),
    "split rows": (split_rows, (1, 2, 12)),
    "unfolded": (lambda t, x: conv(t, t.call(aten.reshape.default, silu(t, x), [1, 2, 4, 3]), [3, 1]), (1, 2, 12)),
    "strided and back": (strided_and_back, (1, 2, 8, 4)),
}


def program_of(name: str) -> Program:
    write, shape = PROGRAMS[name]
    tape = Tape()
    return tape.program(write(tape, tape.call(aten.clone.default, tape.input(tensor(*shape)))))


# ---------------------------------------------------------------------------------------------------------------- loops


def halo_rows(spec: LoopSpec) -> int:
    """The most rows of the innermost atom that a trip reads on one side of its chunk."""
    narrows = [n for part in spec.slicings if part is not None for n in part.narrows if n.halo != (0, 0)]
    return max((-(-max(n.halo) * spec.axes[-1].size // n.extent) for n in narrows), default=0)


def all_loops(program: Program) -> Iterator[Looped]:
    """Every run of operators, every nest of one or two atoms, every chunk size."""
    region = region_of(program)
    n = len(region.nodes)
    for start in range(1, n):
        for stop in range(start + 1, n + 1):
            for nest in valid_nests(region, start, stop):
                for chunk in range(1, region.sizes[nest[-1]] + 1):
                    yield Looped(start, stop, nest, chunk)


@dataclass(frozen=True)
class Built:
    """One loop, its group, and who owns the storages of the values around it."""

    loop: ChunkLoop
    group: Group
    roots: dict[fx.Node, fx.Node]


def built(program: Program, looped: Looped) -> Built:
    program = program.copy()
    roots = Partitioner(program, FACTS).storages.roots
    loops, groups = with_loops(program, looped)
    (loop,), (group,) = loops.values(), groups.values()
    return Built(loop, group, roots)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_loop_is_exact(name: str) -> None:
    """Chunks of one row to all of them, ragged tails and halos over several chunks among them."""
    program = program_of(name)
    loops = list(all_loops(program))
    assert_chunks_equal(program, loops[:: -(-len(loops) // 150)])


@pytest.mark.parametrize("name", PROGRAMS)
def test_structure_of_loops(name: str) -> None:
    program = program_of(name)
    loops = list(all_loops(program))
    some = [built(program, looped) for looped in loops[:: -(-len(loops) // 40)]]
    assert any(halo_rows(one.loop.spec) for one in some)
    for one in some:
        check_structure(one)


def check_structure(one: Built) -> None:
    check_only_the_innermost_has_halos(one.loop)
    check_nothing_that_others_read_is_taken(one)
    check_bodies_are_shared(one.loop)
    check_trips_hold_what_the_group_says(one)


def check_only_the_innermost_has_halos(loop: ChunkLoop) -> None:
    last = len(loop.spec.axes) - 1
    for narrow in (n for part in loop.spec.slicings if part is not None for n in part.narrows if n.halo != (0, 0)):
        assert narrow.inner and [axis for axis, _ in narrow.terms] == [last]
    assert all(n.halo == (0, 0) for output in loop.spec.outputs for n in output.slicing.narrows)
    assert all(axis.chunk == 1 for axis in loop.spec.axes[:-1])


def check_nothing_that_others_read_is_taken(one: Built) -> None:
    """No operand whose storage any trip reads beyond its own slice."""
    spec, operands = one.loop.spec, one.group.operands
    taken = {one.roots[operands[output.takes]] for output in spec.outputs if output.takes is not None}
    for operand, part in zip(operands, spec.slicings, strict=True):
        if one.roots.get(operand) in taken:
            assert part is not None and all(n.halo == (0, 0) for n in part.narrows)


def check_bodies_are_shared(loop: ChunkLoop) -> None:
    """One for the middle, one for the tail, and one for each chunk that the borders clip; every trip fits its own."""
    assert len(loop.bodies) <= 2 + 2 * ceil(halo_rows(loop.spec) / loop.spec.axes[-1].chunk)
    assert len(loop.bodies) == len(set(loop.spec.kinds)) == len(loop.distinct_trips)
    lengths: dict[int, set[tuple[int, ...]]] = {}
    for kind, reads, writes in loop._trips:
        lengths.setdefault(kind, set()).add(tuple(span[2] for part in (*reads, *writes) for span in part))
    assert all(len(found) == 1 for found in lengths.values())


def check_trips_hold_what_the_group_says(one: Built) -> None:
    """Real trips: what is alive beside the loop's operands and outputs."""
    specs = [tensor_spec(node) for node in one.group.operands]
    operands = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype).zero_() for s in specs]
    for trip in one.loop.distinct_trips:
        with torch.no_grad(), StorageMeter(operands) as meter:
            one.loop.run(operands, (trip,))
        assert meter.peak_bytes - one.group.output_bytes <= one.group.body_bytes


@pytest.mark.parametrize(("rows", "chunk", "bodies"), [(64, 4, 3), (62, 4, 4), (61, 4, 4), (64, 1, 7), (64, 64, 1)])
def test_a_long_loop_has_few_bodies(rows: int, chunk: int, bodies: int) -> None:
    """First, middle, last, and a ragged tail that clips the trip in front of it too; the halo here is 3 rows."""
    tape = Tape()
    x = tape.call(aten.clone.default, tape.input(tensor(1, 2, rows, 2)))
    program = tape.program(conv(tape, conv(tape, x, [3, 3]), [5, 1]))
    region = region_of(program)
    atom = next(a for (a,) in valid_nests(region, 1, 5, 1) if region.sizes[a] == rows)
    one = built(program, Looped(1, 5, (atom,), chunk))
    assert halo_rows(one.loop.spec) == 3
    assert len(one.loop.bodies) == bodies
    check_structure(one)
    assert_chunks_equal(program, [Looped(1, 5, (atom,), chunk)])


# -------------------------------------------------------------------------------------------------------------- nesting


def nests_of_the_call_behind(result: fx.Node, tape: Tape) -> set[tuple[int, ...]]:
    """The sizes of all nests in which the call behind the first one may be looped over alone."""
    region = region_of(tape.program(result))
    return {tuple(region.sizes[atom] for atom in nest) for nest in valid_nests(region, 1, 2)}


def test_a_convolution_of_two_dimensions_may_not_nest_them() -> None:
    """Outer atoms run a row at a time, without neighbours."""
    tape = Tape()
    x = tape.call(aten.clone.default, tape.input(tensor(3, 2, 5, 4)))
    assert nests_of_the_call_behind(conv(tape, x, [3, 3]), tape) == {(3,), (5,), (4,), (3, 5), (3, 4)}


def test_rows_inside_rows_may_not_be_looped_over() -> None:
    """The neighbours of a row of the inner part of a split dimension are in other rows of the outer part."""
    tape = Tape()
    x = tape.call(aten.clone.default, tape.input(tensor(1, 2, 12)))
    y = tape.call(aten.reshape.default, conv(tape, x, [3]), [1, 2, 3, 4])
    assert nests_of_the_call_behind(y, tape) == {(3,)}


# ----------------------------------------------------------------------------------------------------------- taken over


def test_an_operand_read_with_a_halo_is_not_taken() -> None:
    """conv(h) + g: g dies and gives its storage, h dies too but its rows are read by the next trip."""
    tape = Tape()
    x = tape.input(tensor(1, 2, 9))
    h, g = tape.call(aten.clone.default, x), tape.call(aten.neg.default, x)
    program = tape.program(plus(tape, conv(tape, h, [3]), g), tape.call(aten.neg.default, x))
    looped = [one for one in all_loops(program) if (one.start, one.stop) == (2, 5)]
    made = [one for one in (built(program, one) for one in looped) if halo_rows(one.loop.spec)]
    assert made
    for one in made:
        (output,) = one.loop.spec.outputs
        assert output.takes is not None and one.group.operands[output.takes].target is aten.neg.default
    assert_chunks_equal(program, looped)


def test_an_operand_whose_copy_is_read_with_a_halo_is_not_taken() -> None:
    """conv(silu(h)) makes rows of silu(h) twice, from rows of h read twice; h + conv(h) reads h with and without."""
    for write in (lambda t, h: conv(t, silu(t, h), [3]), lambda t, h: plus(t, h, conv(t, h, [3]))):
        tape = Tape()
        program = tape.program(write(tape, tape.call(aten.clone.default, tape.input(tensor(1, 2, 9)))))
        looped = [one for one in all_loops(program) if (one.start, one.stop) == (1, 4)]
        loops = [built(program, one).loop for one in looped]
        assert any(halo_rows(loop.spec) for loop in loops)
        assert all(loop.spec.outputs[0].takes is None for loop in loops if halo_rows(loop.spec))
        assert_chunks_equal(program, looped)


# ------------------------------------------------------------------------------------------------------ random programs


def convolved(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    spatial = tape.shape(x)[2:]
    drawn = [draw(st.sampled_from([(1, 1), (3, 1), (3, 1), (3, 2), (5, 1)])) for _ in spatial]
    reaches = [one if size > 2 else (1, 1) for one, size in zip(drawn, spatial, strict=True)]
    even = [k > 1 and size % 2 == 0 for (k, _), size in zip(reaches, spatial, strict=True)]
    return conv(
        tape,
        x,
        [k for k, _ in reaches],
        [draw(st.sampled_from([1, 1, 2])) if yes else 1 for yes in even],
        [d for _, d in reaches],
    )


def upsampled(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return up(tape, x, *draw(st.sampled_from([(2.0, 2.0), (2.0, 1.0), (1.0, 2.0), (3.0, 1.0)])))


def normed(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """With statistics of x or of an earlier value of its shape."""
    return norm(tape, x, draw(st.sampled_from(divisors(tape.shape(x)[1]))), draw(st.sampled_from(alike(tape, x))))


def pointwise(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return draw(st.sampled_from([silu, lambda t, v: t.call(aten.neg.default, v)]))(tape, x)


def residual(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return plus(tape, x, draw(st.sampled_from(alike(tape, x))))


def rejoined(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """Spatial dimensions joined to one, or one split in two."""
    batch, channels, *spatial = tape.shape(x)
    outer = draw(st.sampled_from(divisors(spatial[0])))
    sizes = [prod(spatial)] if len(spatial) > 1 else [outer, spatial[0] // outer]
    return tape.call(aten.reshape.default, x, [batch, channels, *sizes])


def alike(tape: Tape, x: fx.Node) -> list[fx.Node]:
    return [n for n in tape.graph.nodes if tape.shape(n) == tape.shape(x)]


@st.composite
def chains(draw: st.DrawFn) -> Program:
    """Two to five steps, most of them convolutions; one or two outputs."""
    tape = Tape()
    spatial = draw(st.sampled_from([(12,), (7,), (8, 5), (6, 4), (5, 6), (4, 3, 4), (6, 3, 2)]))
    value = middle = tape.call(aten.clone.default, tape.input(tensor(draw(st.integers(1, 3)), 2, *spatial)))
    for at in range(draw(st.integers(2, 5))):
        steps = [convolved, convolved, convolved, normed, pointwise, residual, rejoined]
        if len(tape.shape(value)) == 4 and prod(tape.shape(value)) * 4 <= MOST_NUMEL:
            steps.append(upsampled)
        value = draw(st.sampled_from(steps))(tape, value, draw)
        middle = value if at == 1 else middle
    return tape.program(value, middle) if draw(st.booleans()) else tape.program(value)


@st.composite
def loops_with_halo(draw: st.DrawFn, program: Program, start: int = 1) -> Looped | None:
    """The longest run of operators from somewhere behind ``start`` in a loop with a halo, in chunks of any size."""
    builder = Partitioner(program, FACTS).builder
    region, end = builder.region, len(builder.region.nodes)
    for a in draw(st.permutations(range(start, end))):
        for b in range(end, a, -1):
            for nest in draw(st.permutations(valid_nests(region, a, b))):
                if halo_rows(builder.build(a, b, nest, 1).spec):
                    return Looped(a, b, nest, draw(st.integers(1, region.sizes[nest[-1]])))
    return None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_chains_in_loops_with_halos_equal_chains_whole(data: st.DataObject) -> None:
    """One or two loops; nothing is overwritten that is read later, and no more bytes are held than projected."""
    program = data.draw(chains())
    first = data.draw(loops_with_halo(program))
    assume(first is not None)
    assert first is not None
    second = data.draw(loops_with_halo(program, first.stop)) if first.stop < len(region_of(program).nodes) else None
    groups = (first,) if second is None else (first, second)
    assert_chunks_equal(program, [groups])
    for looped in groups:
        check_structure(built(program, looped))
    rewritten = program.copy()
    loops, made = with_loops(rewritten, *groups)
    assert measured_peak_bytes(rewritten, dict(loops)) <= project(rewritten, made, FACTS).peak_bytes
