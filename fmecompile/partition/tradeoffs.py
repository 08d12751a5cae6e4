"""What the search cannot do alone: give work or transfers for memory, where the peak is, as long as it pays.

A GroupNorm reads its operand twice, so its operand waits as a whole; making that operand twice (``recompute``) frees
it. Any other value may wait in host memory (``spill``). Where the floor is stuck, each is tried on a copy of the
program, and the copy kept when its floor is lower by enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import storages
from fmecompile.errors import PlanMismatch
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import node_spec
from fmecompile.operators.contraction import products
from fmecompile.partition.nests import MAX_TRIPS
from fmecompile.partition.partition import Partitioner
from fmecompile.passes.recompute import Chain, Recompute, chains
from fmecompile.passes.spill import Spill, Wait, in_parts, late_readers
from fmecompile.runtime.host import to_host

FREE_WORK, CHEAP_WORK = 0.05, 0.15
"""Products that may be computed twice, as a share of all: in the default plan, and for a budget before values are moved
to host memory."""
LEAST_GAIN = 0.05
"""By how much the floor must fall for the work that is given."""
LEAST_SHARE = 0.2
"""Operands of less than this share of the floor are not tried."""
MAX_STEPS = 40
LEAST_SPILL = 0.02
"""Values of less than this share of the floor are not moved to host memory, nor any for a smaller gain."""


@dataclass(frozen=True)
class Limits:
    """What a plan has to meet. ``activation_bytes``: what activations may hold at most, None for the default plan.
    ``may_spill``: whether values may wait in host memory where no plan meets that otherwise. ``max_trips``: in how many
    chunk trips a group may run. ``is_graphed``: whether the buffers of CUDA graphs count as activations."""

    activation_bytes: int | None = None
    may_spill: bool = False
    max_trips: int = MAX_TRIPS
    is_graphed: bool = False


@dataclass(frozen=True)
class Prepared:
    """A program ready for its loops. ``recomputed`` are the moments whose operands it makes twice, by name, ``extra``
    the products that takes; ``spilled`` the values that wait in host memory, and up to which call."""

    program: Program
    partitioner: Partitioner
    recomputed: tuple[str, ...] = ()
    spilled: tuple[Wait, ...] = ()
    extra: int = 0


Improve = Callable[[Prepared, FactTable], Iterator[Prepared]]


def prepare(program: Program, facts: FactTable, limits: Limits, *, may_write_over: bool = True) -> Prepared:
    """``program``, or a copy of it with values made twice or waiting in host memory, until its floor meets the limit.

    Without a limit values are made twice as long as that is cheap. With one that takes more, values are moved to host
    memory where that is allowed, and made twice at any price where it does not help. ``may_write_over``: whether calls
    in loops may write over their operands.
    """
    limit_bytes = limits.activation_bytes
    partitioner = Partitioner(program, facts, limits.max_trips, may_write_over=may_write_over)
    best = Prepared(program, partitioner)
    share = FREE_WORK if limit_bytes is None else CHEAP_WORK
    most = sum(map(products, compute_nodes(program.graph))) * share
    best = _improved(best, facts, limit_bytes, partial(_recomputing, most=most))
    if limit_bytes is None:
        return best
    if limits.may_spill:
        best = _improved(best, facts, limit_bytes, _spilling)
    return _improved(best, facts, limit_bytes, partial(_recomputing, most=None))


def replayed(program: Program, facts: FactTable, plan: Plan, *, may_write_over: bool = True) -> Prepared:
    """``program`` as a saved plan left it. Raises PlanMismatch where that is not possible."""
    Recompute(plan.recomputed).apply(program, facts)
    for wait in plan.spilled:
        _require_movable(program, facts, wait)
        Spill((wait,)).apply(program, facts)
    partitioner = Partitioner(program, facts, may_write_over=may_write_over)
    return Prepared(program, partitioner, plan.recomputed, plan.spilled)


def _require_movable(program: Program, facts: FactTable, wait: Wait) -> None:
    held = storages(compute_nodes(program.graph), program.outputs, facts)
    named = {node.name: node for node in held.nodes}
    value, until = (named.get(name) for name in wait)
    owns = value is not None and held.roots[value] is value and value.target is not to_host
    if not owns or until is None or value in in_parts(held):
        raise PlanMismatch(
            f"the saved plan does not fit: {wait[0]!r} cannot wait in host memory until {wait[1]!r}",
            next_step="make it again, or leave it out",
        )


def _improved(best: Prepared, facts: FactTable, limit_bytes: int | None, improve: Improve) -> Prepared:
    for _ in range(MAX_STEPS):
        if limit_bytes is not None and best.partitioner.meets(limit_bytes):
            break
        better = next(improve(best, facts), None)
        if better is None:
            break
        best = better
    return best


def _recomputing(best: Prepared, facts: FactTable, most: float | None) -> Iterator[Prepared]:
    """Copies with a lower floor that make the operands of some GroupNorms twice, with ``most`` extra products."""
    floor = best.partitioner.floor_bytes()
    for alike in [] if best.spilled else _norms_in_the_way(best, facts):
        extra = best.extra + sum(chain.work for chain in alike)
        if most is not None and extra > most:
            continue
        names = tuple(chain.moments.name for chain in alike)
        trial = best.program.copy()
        Recompute(names).apply(trial, facts)
        partitioner = best.partitioner.of(trial)
        if partitioner.floor_bytes() <= (1 - LEAST_GAIN) * floor:
            yield Prepared(trial, partitioner, best.recomputed + names, extra=extra)


def _norms_in_the_way(best: Prepared, facts: FactTable) -> list[list[Chain]]:
    """GroupNorms whose operand lives where the floor is stuck, each with all others alike."""
    known = chains(best.program, facts)
    storages, (at, end) = best.partitioner.storages, _stuck(best)
    least = LEAST_SHARE * best.partitioner.floor_bytes()
    large = [c for c in known if storages.nbytes[storages.position[c.value]] >= least]
    stuck = [c for c in large if storages.position[c.value] <= end + 1 and storages.last[c.value] >= at]
    found: dict[object, list[Chain]] = {}
    for chain in stuck:
        found.setdefault(_likeness(chain), [c for c in known if _likeness(c) == _likeness(chain)])
    return list(found.values())


def _likeness(chain: Chain) -> object:
    return (node_spec(chain.value).shape, tuple(call.target for call in chain.calls))


def _stuck(best: Prepared) -> tuple[int, int]:
    """The boundary where the floor is stuck, and the next."""
    at, boundaries = best.partitioner.bottleneck(), best.partitioner.region.boundaries
    return at, next((b for b in boundaries if b > at), boundaries[-1])


def _spilling(best: Prepared, facts: FactTable) -> Iterator[Prepared]:
    """Copies in which more values wait in host memory, and that get past where the floor is stuck."""
    below = (1 - LEAST_SPILL) * best.partitioner.floor_bytes()
    behind = len(best.partitioner.region.nodes) - _stuck(best)[1]
    for waits in _values_in_the_way(best):
        trial = best.program.copy()
        Spill(waits).apply(trial, facts)
        partitioner = best.partitioner.of(trial)
        if len(partitioner.region.nodes) - partitioner.stuck_at(below) <= behind:
            yield Prepared(trial, partitioner, best.recomputed, best.spilled + waits, best.extra)


def _values_in_the_way(best: Prepared) -> Iterator[tuple[Wait, ...]]:
    """What to move out where the floor is stuck: all values that only wait there; then each value there, largest first;
    then each and all of them right where they are made, so that whole loops read and write host memory."""
    held, (at, end) = best.partitioner.storages, _stuck(best)
    nodes, least = held.nodes, LEAST_SPILL * best.partitioner.floor_bytes()
    waiting: list[Wait] = []
    busy: dict[str, tuple[int, str, str]] = {}
    fixed = in_parts(held)
    for owner, last in held.last.items():
        here = held.position.get(owner, len(nodes))
        if (
            owner in fixed
            or owner.target is to_host
            or last == len(nodes)
            or here >= end
            or last < at
            or held.nbytes[here] < least
        ):
            continue
        if here >= at and end == len(nodes):
            continue
        until = nodes[at if here < at else end].name
        if here < at and held.position[late_readers(owner, at, held)[0][0]] >= end:
            waiting.append((owner.name, until))
        elif here < at or last >= end:
            busy[owner.name] = (held.nbytes[here], until, nodes[here + 1].name)
    if waiting:
        yield tuple(waiting)
    ordered = sorted(busy, key=lambda name: -busy[name][0])
    yield from (((name, busy[name][1]),) for name in ordered)
    yield from (((name, busy[name][2]),) for name in ordered)
    if len(ordered) > 1:
        yield tuple((name, busy[name][2]) for name in ordered)
