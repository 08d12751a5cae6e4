"""Candidate groups: every run of operators between two boundaries with every nest of atoms that may loop over it.

One walk forward from a boundary prices all groups that begin there with the same nest, for every chunk size at once:
what a trip holds is ``fixed + sliced * chunk / size`` at each moment, and only the moments that may be the peak for
some chunk size are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from fmecompile.analysis.axes import GraphAxes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.partition.region import Region, atom_strides

MAX_TRIPS = 1024
MAX_WEIGHT_SHARE = 8
"""Bytes of weights that a trip may read for each byte it makes; above that, chunks cost more time than they save."""
MAX_REACH = 200
"""A group spans at most this many operators; search time stays linear in the size of the graph."""

Nest = tuple[int, ...]
"""Loop atoms, outermost first. All but the last run one row at a time."""


@dataclass(eq=False)
class Candidate:
    """Operators ``[start, stop)`` as one loop nest (``nest`` empty: run whole, one after another).

    ``base_bytes`` is what is held whole during the loop; ``moments`` are (fixed, sliced) bytes of one trip, sliced
    being what a trip over the whole last atom would hold. ``makes`` is (fixed, sliced) of all that a trip makes, and
    ``weight_bytes`` what it reads of the model. ``known`` holds exact peaks, once measured, by chunk size.
    """

    start: int
    stop: int
    nest: Nest
    base_bytes: int
    moments: tuple[tuple[int, int], ...]
    outer_trips: int = 1
    size: int = 1
    least_chunk: int = 1
    weight_bytes: int = 0
    makes: tuple[int, int] = (0, 0)
    known: dict[int, int] = field(default_factory=dict)

    def peak_bytes(self, chunk: int) -> int:
        """Projected peak with ``chunk`` rows of the innermost atom a trip."""
        exact = self.known.get(chunk)
        if exact is not None:
            return exact
        return int(self.base_bytes + self.trip_bytes(chunk))

    def trip_bytes(self, chunk: int) -> float:
        """What one trip holds at most."""
        return max((fixed + sliced * chunk / self.size for fixed, sliced in self.moments), default=0.0)

    def fit(self, allowed_bytes: float) -> tuple[int, int] | None:
        """Fewest trips whose peak is at most ``allowed_bytes``, with the chunk size; None when one row is too much."""
        chunk = self.size
        for fixed, sliced in self.moments:
            room = allowed_bytes - self.base_bytes - fixed
            if room < 0:
                return None
            if sliced:
                chunk = min(chunk, int(room * self.size / sliced))
        while chunk >= self.least_chunk:
            count = -(-self.size // chunk)
            even = -(-self.size // count)
            if even >= self.least_chunk and self.known.get(even, 0) <= allowed_bytes:
                trips = self.outer_trips * count
                return (trips, even) if 1 < trips <= MAX_TRIPS else None
            chunk = even - 1
        return None


def plain(region: Region, start: int, stop: int) -> Candidate:
    """Operators ``[start, stop)`` run whole, each releasing what it reads last."""
    peak = max(region.live[p] + region.nbytes[p] + _hidden(region, p, 0) for p in range(start, stop))
    return Candidate(start, stop, (), peak, ())


def _hidden(region: Region, p: int, start: int) -> int:
    """A GroupNorm whose two passes stay together is joined again and needs no wide temporary."""
    return 0 if region.paired[p] >= start and region.paired[p] >= 0 else region.hidden[p]


def candidates(region: Region, axes: GraphAxes, start: int, min_trip_bytes: int = 0) -> Iterator[Candidate]:
    """All groups that begin at ``start`` whose trips do enough work; with 0 every trip does."""
    for nest in nests(region, axes, start):
        for candidate in _walk(region, start, nest):
            candidate.least_chunk = _least_chunk(candidate, min_trip_bytes)
            if candidate.least_chunk <= candidate.size:
                yield candidate


def _least_chunk(candidate: Candidate, min_trip_bytes: int) -> int:
    """The fewest rows a trip that does enough work; more than there are when even all of them do not.

    A trip works on ``min_trip_bytes``, and makes at least one byte for every ``MAX_WEIGHT_SHARE`` of weights that it
    reads once more.
    """
    if not min_trip_bytes:
        return 1
    works = min(_rows(moment, min_trip_bytes, candidate.size) for moment in candidate.moments)
    return max(works, _rows(candidate.makes, candidate.weight_bytes / MAX_WEIGHT_SHARE, candidate.size))


def _rows(share: tuple[int, int], needed: float, size: int) -> int:
    """The fewest rows with which (fixed, sliced) bytes reach ``needed``."""
    fixed, sliced = share
    if fixed >= needed:
        return 1
    return ceil((needed - fixed) * size / sliced) if sliced else size + 1


def nests(region: Region, axes: GraphAxes, start: int) -> list[Nest]:
    """Loop nests worth trying from ``start``: of atoms that reach equally far, the prefixes in memory order."""
    end = min(start + MAX_REACH, len(region.nodes))
    first = next((b for b in region.boundaries if b > start), end)
    small = region.threshold_bytes
    big = [p for p in range(start, min(first + 40, end)) if region.owner[p] == p and region.nbytes[p] > small]
    atoms = {atom for p in big for atom in region.carries[p]}
    reach = {atom: _reach(region, start, (atom,), end) for atom in sorted(atoms)}
    reach = {atom: at for atom, at in reach.items() if at >= first}
    found: dict[Nest, None] = {}
    for level in sorted(set(reach.values()), reverse=True):
        group = {atom for atom, at in reach.items() if at >= level}
        order = _memory_order(region, axes, big, group)
        for k in range(1, len(order) + 1):
            found[order[:k]] = None
    return list(found)


def _memory_order(region: Region, axes: GraphAxes, big: list[int], atoms: set[int]) -> Nest:
    def rank(p: int) -> tuple[int, int]:
        return (len(atoms & region.carries[p]), region.nbytes[p])

    best = max((p for p in big if atoms & region.carries[p]), key=rank)
    node = region.nodes[best]
    spec = node_spec(node)
    assert isinstance(spec, TensorSpec)
    strides = atom_strides(spec, axes[node].axes, region.sizes)
    return tuple(sorted(atoms & strides.keys(), key=lambda atom: -strides[atom]))


def _reach(region: Region, start: int, nest: Nest, end: int) -> int:
    """The first position that cannot be in a loop over ``nest`` from ``start``."""
    looped: dict[int, bool] = {}
    atoms = frozenset(nest)
    for p in range(start, end):
        role = _role(region, p, start, atoms, looped)
        if role is None:
            return p
        looped[p] = role
    return end


def roles(region: Region, start: int, stop: int, nest: Nest) -> dict[int, bool]:
    """For each position of a valid group: True when it runs in the loop, False when it is hoisted."""
    looped: dict[int, bool] = {}
    for p in range(start, stop):
        role = _role(region, p, start, frozenset(nest), looped)
        assert role is not None, f"position {p} cannot be in a loop from {start}"
        looped[p] = role
    return looped


def _role(region: Region, p: int, start: int, atoms: frozenset[int], looped: dict[int, bool]) -> bool | None:
    """True: in the loop; False: hoisted in front of it; None: it cannot be in this group."""
    inside = [read for read in region.reads[p] if read.producer >= start and looped[read.producer]]
    if not inside:
        return bool(region.carries[p] & atoms) and not region.barred[p] & atoms
    if region.barred[p] & atoms or not region.carries[p] & atoms:
        return None
    return None if any(read.reduced & atoms for read in inside) else True


def _walk(region: Region, start: int, nest: Nest) -> Iterator[Candidate]:
    """Price every group that begins at ``start`` and loops over ``nest``."""
    trip = _Trip(region, start, nest)
    stops = {b for b in region.boundaries if start < b <= start + MAX_REACH}
    for p in range(start, min(start + MAX_REACH, len(region.nodes))):
        if not trip.step(p):
            return
        if p + 1 in stops and trip.has_loop:
            yield trip.candidate(p + 1)


class _Trip:
    """The bytes of one trip of a growing group."""

    def __init__(self, region: Region, start: int, nest: Nest) -> None:
        self.region, self.start, self.nest = region, start, nest
        self.atoms = frozenset(nest)
        self.inner = nest[-1]
        self.looped: dict[int, bool] = {}
        self.fixed = self.sliced = self.hoisted = 0
        self.share: dict[int, tuple[int, int]] = {}
        self.moments: list[tuple[int, int]] = []
        self.whole_reads: set[int] = set()
        self.dying: list[int] = []
        self.has_loop = False
        self.outer_trips = 1
        self.weight_bytes = 0
        self.makes = (0, 0)
        for atom in nest[:-1]:
            self.outer_trips *= region.sizes[atom]

    def step(self, p: int) -> bool:
        """Add the operator at ``p``; False when it cannot be in this group."""
        region = self.region
        role = _role(region, p, self.start, self.atoms, self.looped)
        if role is None:
            return False
        self.looped[p] = role
        self._note_reads(p, role)
        hidden = _hidden(region, p, self.start)
        if role:
            self.has_loop = True
            fixed, sliced = self._split(p, region.nbytes[p])
            extra_fixed, extra_sliced = self._split(p, hidden)
            self.fixed, self.sliced = self.fixed + fixed, self.sliced + sliced
            self.weight_bytes += region.weight_bytes[p]
            self.makes = (self.makes[0] + fixed, self.makes[1] + sliced)
            self._moment(self.fixed + extra_fixed, self.sliced + extra_sliced)
            if region.owner[p] == p:
                self.share[p] = (fixed, sliced)
        else:
            self.hoisted += region.nbytes[p]
        for dead in region.dies[p]:
            if dead < self.start:
                self.dying.append(dead)
            elif dead in self.share:
                fixed, sliced = self.share.pop(dead)
                self.fixed, self.sliced = self.fixed - fixed, self.sliced - sliced
        return True

    def _note_reads(self, p: int, role: bool) -> None:
        """Remember outside storages of which a trip reads more than its own slice."""
        for read in self.region.reads[p]:
            outside = read.owner < self.start
            if outside and (not role or read.reduced & self.atoms):
                self.whole_reads.add(read.owner)

    def _split(self, p: int, nbytes: int) -> tuple[int, int]:
        carried = self.region.carries[p]
        for atom in self.nest[:-1]:
            if atom in carried:
                nbytes = -(-nbytes // self.region.sizes[atom])
        return (0, nbytes) if self.inner in carried else (nbytes, 0)

    def _moment(self, fixed: int, sliced: int) -> None:
        if not any(f >= fixed and s >= sliced for f, s in self.moments):
            self.moments = [(f, s) for f, s in self.moments if f > fixed or s > sliced]
            self.moments.append((fixed, sliced))

    def candidate(self, stop: int) -> Candidate:
        region = self.region
        outs = [r for r in self.share if region.last[r] >= stop]
        free = [region.nbytes[r] for r in self.dying if r not in self.whole_reads and self._whole_nest(r)]
        taken = 0
        for r in outs:
            if region.nbytes[r] in free and self._whole_nest(r):
                free.remove(region.nbytes[r])
                taken += region.nbytes[r]
        held = region.live[self.start] + self.hoisted + sum(region.nbytes[r] for r in outs) - taken
        return Candidate(
            self.start,
            stop,
            self.nest,
            held,
            tuple(self.moments),
            self.outer_trips,
            region.sizes[self.inner],
            weight_bytes=self.weight_bytes,
            makes=self.makes,
        )

    def _whole_nest(self, position: int) -> bool:
        """A slice of this storage belongs to exactly one trip."""
        return self.atoms <= self.region.carries[position]
