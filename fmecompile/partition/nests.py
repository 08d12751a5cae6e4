"""Loop nests: which atoms a group may loop over, how far, and what runs in the loop or in front of it."""

from __future__ import annotations

from collections.abc import Collection

from fmecompile.analysis.axes import GraphAxes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.partition.region import Region, atom_strides

MAX_TRIPS = 1024
"""A group runs in at most so many trips, unless fewer are asked for."""
MAX_REACH = 200
"""A group spans at most this many operators; search time stays linear in the size of the graph."""
MIN_STRIDE = 32
"""Atoms whose rows are closer together than this many elements are sliced only where there are no others."""
STRIDED = 0.15
"""Share of the work that slices with gaps in memory cost more: a convolution on 64 of 256 columns takes 1.15 times as
long."""
MAX_SINGLES = 2
"""Of the atoms that reach equally far, so many are tried as loops of their own."""

Nest = tuple[int, ...]
"""Loop atoms, outermost first. All but the last run one row at a time."""


def nests(region: Region, axes: GraphAxes, start: int) -> dict[Nest, float]:
    """Loop nests worth trying from ``start``, each with the share of work that gaps in its slices add: of atoms that
    reach equally far, the outermost alone, and the prefixes in memory order."""
    end = min(start + MAX_REACH, len(region.nodes))
    first = next((b for b in region.boundaries if b > start), end)
    big = _big(region, start, first) or _big(region, start, min(first + 40, end))
    atoms = {atom for p in big for atom in region.carries[p]}
    reach = {atom: _reach(region, start, (atom,), end) for atom in sorted(atoms)}
    reach = {atom: at for atom, at in reach.items() if at >= first}
    found: dict[Nest, float] = {}
    for level in sorted(set(reach.values()), reverse=True):
        order = _memory_order(region, axes, big, {atom for atom, at in reach.items() if at >= level})
        for k, atom in enumerate(order[:MAX_SINGLES]):
            found.setdefault((atom,), STRIDED if k else 0.0)
        outer_trips = 1
        for k, atom in enumerate(order):
            if outer_trips > MAX_TRIPS:
                break
            found[order[: k + 1]] = 0.0
            outer_trips *= region.sizes[atom]
    return found


def _big(region: Region, start: int, stop: int) -> list[int]:
    return [p for p in range(start, stop) if region.owner[p] == p and region.nbytes[p] > region.threshold_bytes]


def _memory_order(region: Region, axes: GraphAxes, big: list[int], atoms: set[int]) -> Nest:
    def rank(p: int) -> tuple[int, int]:
        return (len(atoms & region.carries[p]), region.nbytes[p])

    best = max((p for p in big if atoms & region.carries[p]), key=rank)
    node = region.nodes[best]
    spec = node_spec(node)
    assert isinstance(spec, TensorSpec)
    strides = atom_strides(spec, axes[node].axes, region.sizes)
    order = sorted(atoms & strides.keys(), key=lambda atom: -strides[atom])
    return tuple(atom for atom in order if strides[atom] >= MIN_STRIDE) or tuple(order)


def _reach(region: Region, start: int, nest: Nest, end: int) -> int:
    """The first position that cannot be in a loop over ``nest`` from ``start``."""
    looped: dict[int, bool] = {}
    for p in range(start, end):
        role = role_of(region, p, start, nest, looped)
        if role is None:
            return p
        looped[p] = role
    return end


def roles(region: Region, start: int, stop: int, nest: Nest) -> dict[int, bool] | None:
    """For each position of a group: True when it runs in the loop, False when it is hoisted. None where one can do
    neither, so that there is no such group."""
    looped: dict[int, bool] = {}
    for p in range(start, stop):
        role = role_of(region, p, start, nest, looped)
        if role is None:
            return None
        looped[p] = role
    return looped


def role_of(region: Region, p: int, start: int, nest: Nest, looped: dict[int, bool]) -> bool | None:
    """True: in the loop; False: hoisted in front of it; None: it cannot be in this group."""
    reads, outer = region.reads[p], nest[:-1]
    inside = [read for read in reads if read.producer >= start and looped[read.producer]]
    sliced = _meets(nest, region.carries[p]) and not _meets(nest, region.barred[p])
    if outer and any(_meets(outer, read.halo) for read in reads):
        sliced = False  # only the innermost atom has halos
    if not inside:
        return sliced
    return True if sliced and not any(_meets(nest, read.reduced) for read in inside) else None


def _meets(nest: Nest, atoms: Collection[int]) -> bool:
    return any(atom in atoms for atom in nest)
