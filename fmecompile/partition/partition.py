"""The partition: which runs of operators become chunk loops, over which axes, in how many trips.

Search by estimates, build what was chosen, measure it exactly, and search again where the estimate was wrong; so what
is returned holds what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil

from fmecompile.analysis.axes import GraphAxes, propagate
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import Storages, storages
from fmecompile.config import min_trip_bytes
from fmecompile.errors import BudgetInfeasible
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import module_path
from fmecompile.graph.plan import Barrier
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.partition.build import Builder
from fmecompile.partition.candidates import Candidate, candidates, plain, plain_norms
from fmecompile.partition.nests import MAX_TRIPS
from fmecompile.partition.region import Region, region
from fmecompile.partition.search import (
    KNEE,
    Choice,
    Eager,
    cheapest,
    knee,
    least_limit,
    stuck_at,
)

MAX_ROUNDS = 12
NO_EAGER = Eager()


@dataclass(frozen=True)
class Chosen:
    """One group of the answer: the built group, its peak, what the same operators hold when run whole, and by how much
    those are faster."""

    group: Group
    choice: Choice
    peak_bytes: int
    whole_bytes: int
    extra_s: float


@dataclass(frozen=True)
class Answer:
    """Groups in execution order, the least peak that was found, the limit the groups were chosen under, and the
    GroupNorms outside groups to be joined again, by the names of their last parts."""

    chosen: tuple[Chosen, ...]
    floor_bytes: int
    allowed_bytes: int
    joined: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(c.group for c in self.chosen)


class Partitioner:
    """One graph, ready to be partitioned: axes, storages, and the builder of groups."""

    def __init__(
        self, program: Program, facts: FactTable, max_trips: int = MAX_TRIPS, *, may_write_over: bool = True
    ) -> None:
        nodes = compute_nodes(program.graph)
        self.axes: GraphAxes = propagate(program.graph)
        self.storages: Storages = storages(nodes, program.outputs, facts)
        self.region: Region = region(self.storages, self.axes, facts, may_write_over=may_write_over)
        self.facts, self.max_trips, self.may_write_over = facts, max_trips, may_write_over
        self.builder = Builder(self.region, self.storages, self.axes, facts, may_write_over)

    def of(self, program: Program) -> Partitioner:
        """The partitioner of another program, under the same conditions."""
        return Partitioner(program, self.facts, self.max_trips, may_write_over=self.may_write_over)

    def search(self, limit_bytes: int | None = None, eager: Eager = NO_EAGER) -> Answer:
        """The fastest plan that holds at most ``limit_bytes``; by default near the least peak (the knee), and hardly
        slower than ``eager``, or than all operators run whole where those are slower themselves.

        Raises BudgetInfeasible when every plan holds more; its ``floor_bytes`` are what the best one holds.
        """
        if not self.region.nodes:
            return Answer((), 0, limit_bytes or 0)
        for _ in range(MAX_ROUNDS):
            floor = self.floor_bytes()
            if limit_bytes is not None and floor > limit_bytes:
                raise BudgetInfeasible(floor, limit_bytes)
            allowed = self._knee(floor, eager) if limit_bytes is None else limit_bytes
            plan = cheapest(self.table, self._stops, allowed)
            assert plan is not None
            if all(self._exact(choice) <= allowed for choice in plan if choice.trips):
                break
        whole = [choice.candidate for choice in plan if not choice.trips]
        joined = tuple(name for candidate in whole for name in self._joined(candidate))
        return Answer(tuple(self._chosen(c) for c in plan if c.trips), floor, int(allowed), joined)

    def meets(self, limit_bytes: int) -> bool:
        """Whether a plan holds at most ``limit_bytes``, as built; where not, the floor is higher than was estimated."""
        try:
            self.search(limit_bytes)
        except BudgetInfeasible:
            return False
        return True

    def _knee(self, floor: int, eager: Eager) -> float:
        """The limit of the default plan."""
        if min_trip_bytes() is not None:
            return floor * KNEE
        return knee(self.table, self._stops, floor, self.region.whole_s, eager)

    def _joined(self, candidate: Candidate) -> Iterator[str]:
        """The last parts of GroupNorms that lie within operators run whole."""
        for p in range(candidate.start, candidate.stop):
            joined = self.region.joined[p]
            if joined is not None and joined.first >= candidate.start and joined.last == p:
                yield self.region.nodes[p].name

    def floor_bytes(self) -> int:
        """The least that any plan holds, as far as is known."""
        return ceil(least_limit(self.table, self._stops)) if self.region.nodes else 0

    def bottleneck(self) -> int:
        """The position in front of the operators that keep the floor where it is."""
        return self.stuck_at(0.98 * self.floor_bytes())

    def stuck_at(self, limit_bytes: float) -> int:
        """The position in front of the operators that no plan runs within a limit."""
        return stuck_at(self.table, self._stops, limit_bytes)

    @property
    def _stops(self) -> list[int]:
        return self.region.boundaries[1:]

    def barriers(self) -> tuple[Barrier, ...]:
        """Operators that no axis of a large result can be sliced through, with the reason."""
        found: dict[tuple[str, str], list[str]] = {}
        for node, reason in self.axes.barriers.items():
            found.setdefault((str(node.target), reason), []).append(module_path(node) or node.name)
        return tuple(Barrier(op, reason, len(at), at[0]) for (op, reason), at in found.items())

    @cached_property
    def table(self) -> dict[int, list[Candidate]]:
        """All candidates, by the position where they stop."""
        found: dict[int, list[Candidate]] = {}
        least = min_trip_bytes()
        boundaries = self.region.boundaries
        for start, stop in pairwise(boundaries):
            found.setdefault(stop, []).append(plain(self.region, start, stop))
        for candidate in plain_norms(self.region):
            found.setdefault(candidate.stop, []).append(candidate)
        for start in boundaries[:-1]:
            for candidate in candidates(self.region, self.axes, start, least, self.max_trips):
                found.setdefault(candidate.stop, []).append(candidate)
        return found

    def _exact(self, choice: Choice) -> int:
        """The peak of a choice by building and pricing it; the search is told."""
        candidate = choice.candidate
        group = self.builder.build(candidate.start, candidate.stop, candidate.nest, choice.chunk)
        candidate.learn(choice.chunk, self._base_bytes(candidate.start, group), group.body_bytes)
        return candidate.peak_bytes(choice.chunk)

    def _base_bytes(self, start: int, group: Group) -> int:
        return self.region.live[start] + group.hoisted_bytes + group.output_bytes

    def peak_bytes(self, start: int, group: Group) -> int:
        """What the operators before, in and around a built group hold at most while it runs."""
        return self._base_bytes(start, group) + group.working_bytes

    def _chosen(self, choice: Choice) -> Chosen:
        candidate = choice.candidate
        group = self.builder.build(candidate.start, candidate.stop, candidate.nest, choice.chunk)
        whole = plain(self.region, candidate.start, candidate.stop).base_bytes
        return Chosen(group, choice, choice.peak_bytes, whole, candidate.extra_s(choice.trips, choice.chunk))
