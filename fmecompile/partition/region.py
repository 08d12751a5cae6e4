"""The graph as the partition sees it: arrays by position, and the boundaries where a group may begin or end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import fx

from fmecompile.analysis.axes import GraphAxes, Use
from fmecompile.analysis.cost import Cost, cost_of, rates_for
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.overwrites import overwrites
from fmecompile.analysis.storages import Storages
from fmecompile.graph.specs import TensorSpec, node_spec, specs_in
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY, GROUP_NORM_MOMENTS
from fmecompile.passes.fuse_norm import fused
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics
from fmecompile.runtime.rates import Rates

NORM_PARTS = (
    group_norm_moments,
    group_norm_statistics,
    group_norm_apply,
    GROUP_NORM_MOMENTS,
    GROUP_NORM_APPLY,
)


@dataclass(frozen=True)
class Read:
    """One operand of the call at a position: who produced it (a position, or -1 for a graph input), the position that
    owns its storage (or -1), the atoms the call reduces, and by atom the rows of it that the call's halo spans."""

    producer: int
    owner: int
    reduced: frozenset[int]
    halo: dict[int, float]


class Joined(NamedTuple):
    """Positions of the first and the last part of a split GroupNorm, and what the whole one holds while it runs."""

    first: int
    last: int
    hidden_bytes: int


@dataclass(frozen=True)
class Region:
    """Positions 0..n of a straight-line graph. ``live`` has one entry a boundary, other sequences one a position.
    ``over`` has what owns the storage that a call may write over, or -1; ``rates`` are those of the device."""

    nodes: tuple[fx.Node, ...]
    sizes: dict[int, int]
    carries: list[frozenset[int]]
    barred: list[frozenset[int]]
    reads: list[tuple[Read, ...]]
    costs: list[Cost]
    owner: list[int]
    over: list[int]
    nbytes: tuple[int, ...]
    hidden: list[int]
    joined: list[Joined | None]
    last: list[int]
    dies: list[list[int]]
    live: list[int]
    boundaries: list[int]
    rates: Rates

    @property
    def whole_s(self) -> float:
        """How long all operators take that run whole."""
        return sum(cost.whole_s for cost in self.costs)

    @property
    def threshold_bytes(self) -> int:
        """Storages below this do not shape the search: a thousandth of the largest."""
        return max(self.nbytes, default=0) // 1000


def region(storages: Storages, axes: GraphAxes, facts: FactTable, *, may_write_over: bool = True) -> Region:
    """Flatten storages and axes into arrays, and find the boundaries."""
    position = storages.position
    nodes = storages.nodes
    n = len(nodes)
    rates = rates_for(nodes)
    owner = [position.get(storages.roots[node], -1) for node in nodes]
    atoms = {atom for facts in axes.nodes.values() for axis in facts.axes for atom in axis}
    sizes = {atom: axes.table.size(atom) for atom in atoms}
    reads = [
        tuple(_read(use, storages, sizes) for use in axes[node].uses) if node in axes.nodes else () for node in nodes
    ]
    last = [storages.last.get(node, at) for at, node in enumerate(nodes)]
    dies: list[list[int]] = [[] for _ in range(n + 1)]
    for at, node in enumerate(nodes):
        if storages.roots[node] is node:
            dies[min(last[at], n)].append(at)
    live = storages.live_bytes()
    over = overwrites(nodes) if may_write_over else {}
    empty: frozenset[int] = frozenset()
    found = Region(
        nodes=nodes,
        sizes=sizes,
        carries=[axes[node].carries if node in axes.nodes else empty for node in nodes],
        barred=[axes[node].barred if node in axes.nodes else empty for node in nodes],
        reads=reads,
        costs=[cost_of(node, axes, rates, is_view=owner[at] != at) for at, node in enumerate(nodes)],
        owner=owner,
        over=[owner[position[over[node]]] if node in over else -1 for node in nodes],
        nbytes=storages.nbytes,
        hidden=list(storages.hidden),
        joined=_joined(nodes, position, facts),
        last=last,
        dies=dies,
        live=live,
        boundaries=[],
        rates=rates,
    )
    found.boundaries.extend(_boundaries(found))
    return found


def _read(use: Use, storages: Storages, sizes: dict[int, int]) -> Read:
    root = storages.roots.get(use.node, use.node)
    halo = {
        use.axes[d][0]: (before + after) / prod(sizes[atom] for atom in use.axes[d][1:])
        for d, (before, after) in use.halo
        if use.axes[d]
    }
    return Read(storages.position.get(use.node, -1), storages.position.get(root, -1), use.reduced, halo)


def _joined(nodes: Sequence[fx.Node], position: dict[fx.Node, int], facts: FactTable) -> list[Joined | None]:
    """For each part of a split GroupNorm, all of it: together the parts are joined again."""
    found: list[Joined | None] = [None] * len(nodes)
    for at, node in enumerate(nodes):
        call = fused(node)
        if call is None:
            continue
        statistics = node.args[1]
        moments = statistics.args[0]  # type: ignore[union-attr]
        whole = facts(call[0], specs_in(call[1]), {})
        joined = Joined(position[moments], at, whole.hidden_bytes)  # type: ignore[index]
        for part in (moments, statistics, node):
            found[position[part]] = joined  # type: ignore[index]
    return found


def _boundaries(region: Region) -> list[int]:
    """Where a group may begin or end: where few bytes live.

    Local minima of the live bytes, a plateau counting as one level; on a plateau one boundary in front of every call
    that allocates much or reads much, never in front of a view, so that views stay with their producer.
    """
    n, small = len(region.nodes), max(region.threshold_bytes, 1)
    plateaus: list[list[int]] = []
    for p in range(n + 1):
        if plateaus and abs(region.live[p] - region.live[plateaus[-1][0]]) <= small:
            plateaus[-1].append(p)
        else:
            plateaus.append([p])
    levels = [min(region.live[p] for p in plateau) for plateau in plateaus]
    found = {0, n}
    for k, plateau in enumerate(plateaus):
        lowest = (k == 0 or levels[k - 1] > levels[k]) and (k == len(plateaus) - 1 or levels[k + 1] > levels[k])
        if lowest:
            found.update(p for p in plateau if p < n and _is_large(region, p, small))
    found.update(p for p, node in enumerate(region.nodes) if node.target in NORM_PARTS)
    for p, node in enumerate(region.nodes):
        if not isinstance(node_spec(node), TensorSpec):
            found.discard(p + 1)
    return sorted(found)


def _is_large(region: Region, p: int, small: int) -> bool:
    if region.owner[p] != p:
        return False
    return region.nbytes[p] > small or any(r.owner >= 0 and region.nbytes[r.owner] > small for r in region.reads[p])


def atom_strides(spec: TensorSpec, axes: Sequence[Sequence[int]], sizes: dict[int, int]) -> dict[int, int]:
    """The stride in elements of every atom of a tensor."""
    strides: dict[int, int] = {}
    for dim, axis in enumerate(axes):
        step = spec.stride[dim]
        for atom in reversed(axis):
            strides[atom] = step
            step *= sizes[atom]
    return strides
