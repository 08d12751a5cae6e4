"""What calls cost in time: a roofline a call, split into what every trip of a loop pays and what trips share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from fmecompile.analysis.axes import GraphAxes
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import storages
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.contraction import all_products
from fmecompile.runtime.rates import KEPT_BYTES, Rates, rates_of


@dataclass(frozen=True)
class ReadCost:
    """Seconds to read one operand: ``sliced_s`` by slices along its atoms, ``again_s`` all of it by every trip."""

    atoms: frozenset[int]
    sliced_s: float
    again_s: float


FEW_ROWS = 20480
"""ATen leaves a convolution of one sample to a kernel that unfolds its input first, and not to oneDNN, where the sizes
of the input but the last of three spatial ones multiply to no more (``use_mkldnn`` in ATen's Convolution.cpp)."""


@dataclass(frozen=True)
class Unfolding:
    """What a convolution costs beyond its products where ATen unfolds its input: ``extra_s`` for all of it.
    ``samples`` and ``counted`` are the atoms of the batch and of the other dimensions that decide."""

    samples: tuple[int, ...]
    counted: tuple[int, ...]
    extra_s: float

    def least_rows(self, nest: Sequence[int], sizes: Mapping[int, int]) -> int:
        """The fewest rows of the innermost atom of ``nest`` a trip with which nothing is unfolded; more than there are
        where it is with any."""
        inner, rest = nest[-1], _product(self.counted, nest, sizes)
        if _product(self.samples, nest, sizes) > 1 or rest > FEW_ROWS:
            return 1
        if inner in self.counted:
            return FEW_ROWS // rest + 1
        return 2 if inner in self.samples else sizes[inner] + 1


def _product(atoms: Iterable[int], nest: Sequence[int], sizes: Mapping[int, int]) -> int:
    return prod(sizes[atom] for atom in atoms if atom not in nest)


@dataclass(frozen=True)
class Cost:
    """Seconds of one call. ``call_s`` is spent whenever it is made, on a slice or on everything, ``work_s`` on
    computing and writing all of it, ``fresh_s`` on mapping the memory of all of it anew. ``whole_s`` is that of the
    whole by the roofline, where the slower of computing and moving hides the other. ``unfolding`` is what a slice may
    cost more than its share."""

    call_s: float
    work_s: float
    reads: tuple[ReadCost, ...]
    whole_s: float
    fresh_s: float = 0.0
    unfolding: Unfolding | None = None

    def split(self, atoms: Collection[int]) -> tuple[float, float]:
        """What each trip of a loop over ``atoms`` spends again, and what its trips spend together."""
        fixed, sliced = self.call_s, self.work_s
        for read in self.reads:
            if read.atoms.isdisjoint(atoms):
                fixed += read.again_s
            else:
                sliced += read.sliced_s
        return fixed, sliced


def cost_of(node: fx.Node, axes: GraphAxes, rates: Rates, *, is_view: bool) -> Cost:
    """What one call costs; a view moves nothing."""
    whole_s = _roofline_s(node, rates, is_view=is_view)
    if is_view:
        return Cost(rates.call_s, 0.0, (), whole_s)
    reads = tuple(_read_cost(operand, axes, rates) for operand in node.all_input_nodes)
    work_s = all_products(node) / rates.products_per_s + _nbytes(node) / rates.bytes_per_s
    return Cost(rates.call_s, work_s, reads, whole_s, fresh_s(_nbytes(node), rates), _unfolding(node, axes, rates))


def _unfolding(node: fx.Node, axes: GraphAxes, rates: Rates) -> Unfolding | None:
    """None where oneDNN is not asked, or gets every slice, or not even the whole; nor along less than three
    dimensions, where unfolding was measured to cost nothing."""
    source = node.args[0] if node.target is torch.ops.aten.conv3d.default else None
    if not isinstance(source, fx.Node) or source not in axes.nodes:
        return None
    x, kernel = _tensor(source), _tensor(node.args[1]).shape
    is_asked = x.device.type == "cpu" and x.dtype == torch.float32
    is_grouped = kernel[1] != x.shape[1]
    is_never = len(x.shape) < len(kernel) or is_grouped or min(kernel[-2:]) > 3  # no batch, or a wide kernel
    is_temporal = max(kernel[-2:]) == 1 and x.shape[0] < 16  # which one thread unfolds itself
    is_always = (is_temporal and torch.get_num_threads() == 1) or (x.shape[0] == 1 and prod(x.shape[:-1]) <= FEW_ROWS)
    if not is_asked or is_never or is_always:
        return None
    samples, *counted, _ = axes[source].axes
    unfolded = prod(kernel[2:]) * _nbytes(source)
    extra_s = unfolded * (2 / rates.bytes_per_s + rates.fresh_s)
    return Unfolding(samples, tuple(atom for axis in counted for atom in axis), extra_s)


def _tensor(node: object) -> TensorSpec:
    spec = node_spec(node) if isinstance(node, fx.Node) else None
    assert isinstance(spec, TensorSpec)
    return spec


def fresh_s(nbytes: int, rates: Rates) -> float:
    """Seconds that a value of so many bytes costs beyond writing it, where its memory comes from the system."""
    return nbytes * rates.fresh_s if nbytes >= KEPT_BYTES else 0.0


def whole_s(program: Program, facts: FactTable) -> float:
    """Seconds of a program whose calls all run whole."""
    nodes = compute_nodes(program.graph)
    roots, rates = storages(nodes, program.outputs, facts).roots, rates_for(nodes)
    return sum(_roofline_s(node, rates, is_view=roots[node] is not node) for node in nodes)


def _roofline_s(node: fx.Node, rates: Rates, *, is_view: bool) -> float:
    if is_view:
        return rates.call_s
    written = _nbytes(node)
    moved_s = (written + sum(map(_nbytes, node.all_input_nodes))) / rates.bytes_per_s
    return rates.call_s + max(all_products(node) / rates.products_per_s, moved_s) + fresh_s(written, rates)


def _read_cost(operand: fx.Node, axes: GraphAxes, rates: Rates) -> ReadCost:
    """Graph inputs that every trip reads whole are weights."""
    nbytes = _nbytes(operand)
    known = axes.nodes.get(operand)
    atoms = frozenset(atom for axis in known.axes for atom in axis) if known is not None else frozenset()
    rate = rates.weight_bytes_per_s if operand.op == "placeholder" else rates.bytes_per_s
    return ReadCost(atoms, nbytes / rates.bytes_per_s, nbytes / rate)


def rates_for(nodes: Sequence[fx.Node]) -> Rates:
    """The rates of where the largest value of these calls is, in its dtype."""
    specs = [spec for node in nodes if isinstance(spec := node_spec(node), TensorSpec)]
    largest = max(specs, key=lambda spec: spec.numel, default=None)
    if largest is None:
        return rates_of(torch.device("cpu"), torch.float32)
    return rates_of(largest.device, largest.dtype)


def _nbytes(node: fx.Node) -> int:
    spec = node_spec(node)
    return spec.numel * spec.dtype.itemsize if isinstance(spec, TensorSpec) else 0
