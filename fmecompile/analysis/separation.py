"""Minimum cuts: which values to keep of one run so that the next one has least left to do.

A value runs or does not. One that runs takes its work, and needs each of its operands run or kept; one that is kept and
read takes its bytes. For given weights of work and bytes the cheapest choice is a minimum cut between what does not run
and what does:

    nothing -> value         the work of the value, where it runs
    value -> kept            its bytes, where it does not run and something reads it
    kept -> reader           no cut: whoever runs reads what is there
    value -> result          no cut, where the value has to run

Sweeping the weights gives the lower convex hull of all pairs (bytes, work). Two neighbours of it are looked for a third
one between them with the weights for which both cost the same, so every corner is found, and weights are whole numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

Value = Any
"""Whatever stands for a value; hashable."""

_NOTHING, _RESULT = "nothing", "result"


@dataclass(frozen=True)
class Flow:
    """Values in topological order with the operands that each is made of, the work of making it, the bytes of those
    that may be kept, and the ``results`` that are wanted. Operands that are no values are always there."""

    operands: Mapping[Value, Sequence[Value]]
    work: Mapping[Value, int]
    nbytes: Mapping[Value, int]
    results: Collection[Value]

    @cached_property
    def users(self) -> Mapping[Value, tuple[Value, ...]]:
        """Who reads each value."""
        found: dict[Value, dict[Value, None]] = {value: {} for value in self.operands}
        for value, operands in self.operands.items():
            for operand in operands:
                if operand in found:
                    found[operand][value] = None
        return {value: tuple(users) for value, users in found.items()}

    def keeping(self, kept: Collection[Value]) -> Separation:
        """What is left to do with ``kept``; those that nothing reads are left out."""
        met: set[Value] = set()
        waiting = list(self.results)
        while waiting:
            value = waiting.pop()
            if value not in met and value in self.operands:
                met.add(value)
                waiting += self.operands[value] if value not in kept else ()
        read = frozenset(met.intersection(kept))
        return Separation(
            read, sum(self.nbytes[value] for value in read), sum(self.work[value] for value in met - read)
        )


@dataclass(frozen=True)
class Separation:
    """Values that are kept, their bytes, and the work that is left."""

    kept: frozenset[Value]
    nbytes: int
    work: int


def ways(flow: Flow, entries: Collection[Value], most: int = 4) -> list[frozenset[Value]]:
    """Paths from one of ``entries`` to a result: through every value the one of least work, without those that ask for
    more than another does; at most so many, the one of least work first."""
    order = list(flow.operands)
    begun = _paths(order, flow.operands, entries, flow.work)
    ended = _paths(order[::-1], flow.users, flow.results, flow.work)
    asking = {value for value in order if flow.work[value] or value in flow.nbytes}
    found: dict[frozenset[Value], frozenset[Value]] = {}
    for value in order:
        if value in begun and value in ended and (value in asking or value in flow.results):
            path = frozenset((*_followed(value, begun), *_followed(value, ended)))
            found.setdefault(path & asking, path)
    least: list[frozenset[Value]] = []
    for asked in sorted(found, key=lambda asked: (sum(flow.work[v] for v in asked), len(asked))):
        if not any(other <= asked for other in least):
            least.append(asked)
    return [found[asked] for asked in least[:most]]


Step = tuple[int, Value | None]


def _paths(
    order: Iterable[Value],
    before: Mapping[Value, Sequence[Value]],
    starts: Collection[Value],
    work: Mapping[Value, int],
) -> dict[Value, Step]:
    """For each value that is reached from ``starts``, the least work on a path to it, and the value before it there."""
    found: dict[Value, Step] = {}
    for value in order:
        options: list[Step] = [(found[v][0], v) for v in before[value] if v in found]
        options += [(0, None)] if value in starts else []
        if options:
            least, previous = min(options, key=lambda option: option[0])
            found[value] = (least + work[value], previous)
    return found


def _followed(value: Value | None, paths: Mapping[Value, Step]) -> Iterator[Value]:
    while value is not None:
        yield value
        value = paths[value][1]


def separations(flow: Flow, way: Collection[Value] = (), least_work: int = 0) -> list[Separation]:
    """The corners of the hull of (bytes, work) over all sets of values that leave ``way`` running, bytes rising: a path
    to a result. Corners within ``least_work`` of both neighbours may be left out."""
    problem = _Problem(flow, way)
    first, last = flow.keeping(()), problem.cheapest(sum(flow.nbytes.values()) + 1, 1)
    if last.work >= first.work:
        return [first]
    return [first, *_between(problem, first, last, least_work), last]


def _between(problem: _Problem, left: Separation, right: Separation, least_work: int) -> Iterator[Separation]:
    gain, more = left.work - right.work, right.nbytes - left.nbytes
    if gain <= least_work:
        return
    found = problem.cheapest(more, gain)
    if more * found.work + gain * found.nbytes < more * left.work + gain * left.nbytes:
        yield from _between(problem, left, found, least_work)
        yield found
        yield from _between(problem, found, right, least_work)


class _Problem:
    """The values of a flow in groups that run or do not run together.

    A value that only one group reads belongs to it, unless it could be kept in fewer bytes than what the group ends in:
    whoever would keep it may as well keep that, and save more.
    """

    def __init__(self, flow: Flow, way: Collection[Value]) -> None:
        self._flow = flow
        self._must = {*way, *flow.results}
        self._nbytes = {value: size for value, size in flow.nbytes.items() if value not in self._must}
        self._ends = self._grouped()
        self._work: dict[Value, int] = {}
        self._reads: dict[Value, set[Value]] = {}
        for value, end in self._ends.items():
            self._work[end] = self._work.get(end, 0) + flow.work[value]
            read = {o for o in flow.operands[value] if o in self._ends and self._ends[o] != end}
            self._reads.setdefault(end, set()).update(read)

    def _grouped(self) -> dict[Value, Value]:
        """For each value the last one of its group; none for a value that leads to no result."""
        ends: dict[Value, Value] = {}
        for value in reversed(list(self._flow.operands)):
            read = {ends[user] for user in self._flow.users[value] if user in ends}
            if value in self._flow.results or len(read) > 1:
                ends[value] = value
            elif read:
                (end,) = read
                ends[value] = end if self._is_no_better(value, end) else value
        return ends

    def _is_no_better(self, value: Value, end: Value) -> bool:
        """Whether nothing is lost where ``value`` cannot be kept without ``end``."""
        mine = self._nbytes.get(value)
        return mine is None or self._nbytes.get(end, mine + 1) <= mine

    def cheapest(self, of_work: int, of_bytes: int) -> Separation:
        """The set of least ``of_work`` * work + ``of_bytes`` * bytes."""
        graph = nx.DiGraph()
        graph.add_nodes_from((_NOTHING, _RESULT))
        for end, work in self._work.items():
            if work:
                graph.add_edge(_NOTHING, end, capacity=of_work * work)
            if end in self._must:
                graph.add_edge(end, _RESULT)
            graph.add_edges_from((self._given(operand), end) for operand in self._reads[end])
        for value in self._nbytes.keys() & self._work.keys():
            graph.add_edge(value, self._given(value), capacity=of_bytes * self._nbytes[value])
        _, (still, _) = nx.minimum_cut(graph, _NOTHING, _RESULT)
        kept = {v for v in self._nbytes.keys() & self._work.keys() if v in still and self._given(v) not in still}
        return self._flow.keeping(kept)

    def _given(self, value: Value) -> Value:
        """Where readers find ``value``: as it is made, or kept."""
        return ("kept", value) if value in self._nbytes else value
