"""What calls cost in time: a roofline a call, split into what every trip of a loop pays and what trips share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Cost:
    """Seconds of one call. ``call_s`` is spent whenever it is made, on a slice or on everything, ``work_s`` on
    computing and writing all of it, ``fresh_s`` on mapping the memory of all of it anew. ``whole_s`` is that of the
    whole by the roofline, where the slower of computing and moving hides the other."""

    call_s: float
    work_s: float
    reads: tuple[ReadCost, ...]
    whole_s: float
    fresh_s: float = 0.0

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
    return Cost(rates.call_s, work_s, reads, whole_s, fresh_s(_nbytes(node), rates))


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
