"""What the search cannot do alone: give work for memory, where the peak is, as long as it pays.

A GroupNorm reads its operand twice, so its operand waits as a whole. Making that operand twice (``recompute``) frees
it. The partition looks where the floor is stuck, tries the GroupNorms there on a copy of the program, and keeps the
copy when its floor is lower by enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fmecompile.analysis.facts import FactTable
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import node_spec
from fmecompile.operators.contraction import products
from fmecompile.partition.partition import Partitioner
from fmecompile.passes.recompute import Chain, Recompute, chains

MAX_EXTRA_WORK = 0.15
"""Without a budget, products that may be computed twice, as a share of all."""
LEAST_GAIN = 0.05
"""By how much the floor must fall for the work that is given."""
LEAST_SHARE = 0.2
"""Operands of less than this share of the floor are not tried."""
MAX_STEPS = 8


@dataclass(frozen=True)
class Prepared:
    """A program ready for its loops; ``recomputed`` are the moments whose operands it makes twice, by name."""

    program: Program
    partitioner: Partitioner
    recomputed: tuple[str, ...] = ()


def prepare(program: Program, facts: FactTable, limit_bytes: int | None = None) -> Prepared:
    """``program`` or a copy of it with values made twice, until its floor meets the limit or nothing more pays."""
    best = Prepared(program, Partitioner(program, facts))
    whole = sum(map(products, compute_nodes(program.graph)))
    spent = 0
    for _ in range(MAX_STEPS):
        if limit_bytes is not None and best.partitioner.floor_bytes() <= limit_bytes:
            break
        better = next(_improvements(best, facts, whole * MAX_EXTRA_WORK - spent if limit_bytes is None else None), None)
        if better is None:
            break
        best, work = better
        spent += work
    return best


def replayed(program: Program, facts: FactTable, recomputed: tuple[str, ...]) -> Prepared:
    """``program`` as a saved plan left it."""
    if recomputed:
        Recompute(recomputed).apply(program, facts)
    return Prepared(program, Partitioner(program, facts), recomputed)


def _improvements(best: Prepared, facts: FactTable, may_spend: float | None) -> Iterator[tuple[Prepared, int]]:
    """Copies with a lower floor, and the products that each computes twice."""
    floor = best.partitioner.floor_bytes()
    for alike in _proposals(best, facts):
        work = sum(chain.work for chain in alike)
        if may_spend is not None and work > may_spend:
            continue
        names = tuple(chain.moments.name for chain in alike)
        trial = best.program.copy()
        Recompute(names).apply(trial, facts)
        partitioner = Partitioner(trial, facts)
        if partitioner.floor_bytes() <= (1 - LEAST_GAIN) * floor:
            yield Prepared(trial, partitioner, best.recomputed + names), work


def _proposals(best: Prepared, facts: FactTable) -> list[list[Chain]]:
    """GroupNorms whose operand lives where the floor is stuck, each with all others alike."""
    known = chains(best.program, facts)
    storages, at = best.partitioner.storages, best.partitioner.bottleneck()
    boundaries = best.partitioner.region.boundaries
    end = next((b for b in boundaries if b > at), boundaries[-1]) + 1
    least = LEAST_SHARE * best.partitioner.floor_bytes()
    large = [c for c in known if storages.nbytes[storages.position[c.value]] >= least]
    stuck = [c for c in large if storages.position[c.value] <= end and storages.last[c.value] >= at]
    found: dict[object, list[Chain]] = {}
    for chain in stuck:
        found.setdefault(_likeness(chain), [c for c in known if _likeness(c) == _likeness(chain)])
    return list(found.values())


def _likeness(chain: Chain) -> object:
    return (node_spec(chain.value).shape, tuple(call.target for call in chain.calls))
