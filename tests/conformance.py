"""What every axis rule must pass: chunk-and-compare through the real builder and loops, and NaN poison.

Both take a call as an operator and a sample: its arguments, in which a ``TensorSpec`` stands for a tensor; a dict
behind the last argument holds keyword arguments. Programs are written with :class:`Tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from fmecompile.analysis.axes import GraphAxes, Use, propagate
from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import check
from fmecompile.graph.program import Input, Program, compute_nodes
from fmecompile.graph.specs import SPEC, TensorSpec, node_spec
from fmecompile.operators.registry import Axes
from fmecompile.partition.nests import Nest, roles
from fmecompile.partition.partition import Partitioner
from fmecompile.partition.reach import halo_of
from fmecompile.partition.region import Region
from fmecompile.passes.chunk_loops import ChunkLoops
from fmecompile.passes.relax_views import RelaxViews
from fmecompile.passes.write_through import WriteThrough
from fmecompile.runtime.chunk_loop import ChunkLoop

aten = torch.ops.aten
Sample = tuple[Any, ...]
Shape = tuple[int, ...]

FACTS = FactTable()
"""Facts depend on the call alone, so all tests share them."""


class Tape:
    """Writes a program call by call; every value has its spec at once."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []

    def input(self, spec: TensorSpec) -> fx.Node:
        """A new graph input, behind the ones there are, in front of all calls."""
        anchor = self.inputs[-1].next if self.inputs else next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(anchor):
            node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta[SPEC] = spec
        self.inputs.append(node)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        edit.annotate([node], FACTS)
        return node

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return node_spec(node).shape

    def program(self, *outputs: fx.Node) -> Program:
        self.graph.output(tuple(outputs))
        tree = tree_flatten(list(outputs))[1]
        return Program(self.graph, [Input(i) for i in range(len(self.inputs))], tree, {})


# ---------------------------------------------------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Looped:
    """Operators ``[start, stop)`` as one loop over ``nest``, ``chunk`` rows of its last atom a trip."""

    start: int
    stop: int
    nest: Nest
    chunk: int


def module_of(program: Program, loops: dict[str, ChunkLoop] | None = None) -> fx.GraphModule:
    root = nn.Module()
    for name, loop in (loops or {}).items():
        root.add_module(name, loop)
    return fx.GraphModule(root, program.graph)


def with_loops(
    program: Program, *groups: Looped, writes: bool = False
) -> tuple[dict[str, ChunkLoop], dict[str, Group]]:
    """Rewrite ``program``, with bodies that write their outputs where ``writes``; its loops and groups by name."""
    builder = Partitioner(program, FACTS).builder
    built = [builder.build(g.start, g.stop, g.nest, g.chunk) for g in groups]
    if writes:
        built, _ = WriteThrough(built).apply(program, FACTS)
    loops = ChunkLoops(built).apply(program)
    check(program)
    return loops, dict(zip(loops, built, strict=True))


def rewritten(program: Program, *groups: Looped) -> fx.GraphModule:
    """A copy of ``program`` with groups as chunk loops, ready to run."""
    program = program.copy()
    loops, _ = with_loops(program, *groups, writes=True)
    return module_of(program, loops)


def region_of(program: Program) -> Region:
    return Partitioner(program, FACTS).region


def valid_nests(region: Region, start: int, stop: int, depth: int = 2) -> list[Nest]:
    """Every nest of up to ``depth`` atoms that may loop over ``[start, stop)``."""
    atoms = sorted({atom for p in range(start, stop) for atom in region.carries[p]})
    orders = (nest for k in range(1, depth + 1) for nest in permutations(atoms, k))
    return [nest for nest in orders if is_valid(region, start, stop, nest)]


def is_valid(region: Region, start: int, stop: int, nest: Nest) -> bool:
    """Whether ``[start, stop)`` may loop over ``nest``, and something does."""
    return any((roles(region, start, stop, nest) or {}).values())


def chunk_sizes(size: int) -> list[int]:
    """One row, ragged ones, all but one row."""
    return sorted({chunk for chunk in (1, 2, 3, size - 1) if 1 <= chunk < size})


def loops_over(region: Region, start: int, stop: int) -> Iterator[Looped]:
    """Every atom in several chunk sizes, and every nest of two, the outer one row at a time, in chunks of two rows."""
    for nest in valid_nests(region, start, stop):
        size = region.sizes[nest[-1]]
        for chunk in chunk_sizes(size) if len(nest) == 1 else [min(2, size)]:
            yield Looped(start, stop, nest, chunk)


# -------------------------------------------------------------------------------------------------------------- numbers


def tensor_of(spec: TensorSpec, seed: int = 0, *, positive: bool = False) -> torch.Tensor:
    """A tensor with the shape, strides and dtype of ``spec``; the same at every call with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if spec.dtype == torch.bool:
        values = torch.rand(spec.shape, generator=generator) < 0.7
    elif spec.dtype.is_floating_point:
        values = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        values = values.abs().clamp(0.25, 0.75) if positive else values
    else:
        values = torch.randint(0, 5, spec.shape, generator=generator)
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype).copy_(values)


def tensors_of(program: Program) -> list[torch.Tensor]:
    return [tensor_of(node_spec(node), seed) for seed, node in enumerate(program.placeholders)]


def assert_same(got: Any, want: Any, where: object = "") -> None:
    """Equal values (to 1e-12 in float64), dtype, shape and, where a dimension has more than one row, strides."""
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        if not isinstance(theirs, torch.Tensor):
            assert mine == theirs
            continue
        tolerance = 1e-12 if theirs.dtype == torch.float64 else 2e-6 if theirs.dtype.is_floating_point else 0
        torch.testing.assert_close(
            mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
        wide = [d for d, size in enumerate(theirs.shape) if size > 1]
        assert [mine.stride(d) for d in wide] == [theirs.stride(d) for d in wide], f"{where}: strides"


def assert_chunks_equal(program: Program, loops: Iterable[Looped | tuple[Looped, ...]]) -> int:
    """``program`` run whole and with each of ``loops`` returns the same and leaves its inputs alone; how many ran."""
    tensors = tensors_of(program)
    before = [tensor.clone() for tensor in tensors]
    ran = 0
    with torch.no_grad():
        want = module_of(program)(*tensors)
        for looped in loops:
            groups = looped if isinstance(looped, tuple) else (looped,)
            assert_same(rewritten(program, *groups)(*tensors), want, looped)
            ran += 1
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "a graph input was written to"
    return ran


# --------------------------------------------------------------------------------------------------------- one operator


def is_spec(value: Any) -> bool:
    return isinstance(value, TensorSpec)


def specs_of(sample: Sample) -> list[TensorSpec]:
    return [leaf for leaf in tree_flatten(sample, is_leaf=is_spec)[0] if is_spec(leaf)]


def filled(sample: Sample, values: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``sample`` with ``values`` in place of its specs, in order."""
    rest = iter(values)
    full = tree_map_only(TensorSpec, lambda _: next(rest), sample, is_leaf=is_spec)
    return (full[:-1], full[-1]) if full and isinstance(full[-1], dict) else (full, {})


def written(target: Any, sample: Sample, *, keep_result: bool = False) -> Program:
    """One call between copies: of its operands (whose storages a loop may take over) and of its result.

    ``keep_result`` returns the result itself too, so that a view of an operand must outlive the loop.
    """
    tape = Tape()
    nodes = [tape.input(spec) for spec in specs_of(sample)]
    copies = [tape.call(aten.clone.default, node) for node in nodes]
    args, kwargs = filled(sample, copies)
    result = tape.call(target, *args, **kwargs)
    copy = tape.call(aten.clone.default, result)
    program = tape.program(result, copy) if keep_result else tape.program(copy)
    RelaxViews().apply(program, FACTS)  # as in the pipeline: a view of a slice may need a copy
    return program


def check_chunks(target: Any, sample: Sample, most: int | None = None) -> int:
    """Chunk-and-compare of one call along all atoms its result carries; the number of loops that ran.

    With its operands from outside the loop, with their copies made inside, and with the result itself returned.
    ``most`` leaves out loops at even distances.
    """
    program = written(target, sample)
    region, copies, stop = region_of(program), len(specs_of(sample)), len(compute_nodes(program.graph))
    loops = list(loops_over(region, copies, stop))
    loops = loops[:: -(-len(loops) // most)] if most and loops else loops
    ran = assert_chunks_equal(program, loops)
    few = [g for g in loops if len(g.nest) == 1 and g.chunk == min(2, region.sizes[g.nest[0]] - 1)][:most]
    assert_chunks_equal(written(target, sample, keep_result=True), few)
    assert_chunks_equal(
        program, [g for g in (Looped(0, stop, g.nest, g.chunk) for g in few) if is_valid(region, 0, stop, g.nest)]
    )
    return ran


def axes_of_call(target: Any, sample: Sample) -> tuple[GraphAxes, fx.Node]:
    """The axes of one call on graph inputs, each operand an input of its own."""
    tape = Tape()
    args, kwargs = filled(sample, [tape.input(spec) for spec in specs_of(sample)])
    node = tape.call(target, *args, **kwargs)
    return propagate(tape.graph), node


def mask_along(axes: Axes, atom: int, index: int, size: Callable[[int], int], shape: tuple[int, ...]) -> torch.Tensor:
    """True where ``atom`` of a tensor with ``axes`` is at ``index``."""
    atoms = [a for axis in axes for a in axis]
    mask = torch.zeros([size(a) for a in atoms], dtype=torch.bool)
    mask.select(atoms.index(atom), index).fill_(True)
    return mask.reshape(shape)


Poison = tuple[torch.Tensor, dict[int, int]]
"""Where NaN goes in an operand, and the slices of the result that read it, with how far behind their start it is."""


def check_poison(target: Any, sample: Sample) -> int:
    """NaN in one slice of one operand reaches only the same slice of the result; the number of slices poisoned.

    Along a halo NaN in each single row reaches only the slices whose halo has that row, and no row of a halo is idle.
    """
    axes, node = axes_of_call(target, sample)
    facts, size, specs = axes[node], axes.table.size, specs_of(sample)
    clean = [tensor_of(spec, seed, positive=True) for seed, spec in enumerate(specs)]
    assert not torch.isnan(_called(target, sample, clean)).any(), "the sample gives NaN by itself"
    ran = 0
    for at, use in enumerate(facts.uses):
        kept = {atom for d in use.kept_dims for atom in use.axes[d]} - use.reduced
        for atom in sorted(kept & facts.carries) if specs[at].dtype.is_floating_point else ():
            declared: set[int] = set()
            seen: set[int] = set()
            for where, reached in _poisons(use, atom, size, specs[at].shape):
                poisoned = [t.masked_fill(where, torch.nan) if i == at else t for i, t in enumerate(clean)]
                nans = torch.isnan(_called(target, sample, poisoned))
                slices = (mask_along(facts.axes, atom, i, size, tuple(nans.shape)) for i in range(size(atom)))
                got = {i for i, one in enumerate(slices) if nans[one].any()}
                assert got <= reached.keys(), f"operand {at}, atom {atom}: {got} read what {[*reached]} say they read"
                declared |= set(reached.values())
                seen |= {reached[i] for i in got}
                ran += 1
            if halo_of(use, atom) != (0, 0):
                assert {min(declared), max(declared)} <= seen, f"operand {at}, atom {atom}: an idle halo"
    return ran


def _poisons(use: Use, atom: int, size: Callable[[int], int], shape: Shape) -> Iterator[Poison]:
    """Some slices of ``atom``; with a halo, whose rows neighbours share, every single row of its dimension."""
    before, after = halo_of(use, atom)
    if not before and not after:
        for index in sorted({0, size(atom) // 2, size(atom) - 1}):
            yield mask_along(use.axes, atom, index, size, shape), {index: 0}
        return
    dim = next(d for d in use.kept_dims if atom in use.axes[d])
    unit = shape[dim] // size(atom)
    for row in range(shape[dim]):
        where = torch.zeros(shape, dtype=torch.bool)
        where.select(dim, row).fill_(True)
        places = {i: row - i * unit for i in range(size(atom))}
        yield where, {i: place for i, place in places.items() if -before <= place < unit + after}


def _called(target: Any, sample: Sample, tensors: list[torch.Tensor]) -> torch.Tensor:
    args, kwargs = filled(sample, tensors)
    return target(*args, **kwargs)


def check_rule(target: Any, sample: Sample, most: int | None = None) -> None:
    """Everything that a sample enrols its rule in."""
    check_chunks(target, sample, most)
    check_poison(target, sample)
