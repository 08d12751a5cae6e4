"""Candidate groups: every run of operators between two boundaries with every nest of atoms that may loop over it.

One walk forward from a boundary prices all groups that begin there with the same nest, for every chunk size at once:
what a trip holds is ``fixed + sliced * chunk / size`` at each moment, and only the moments that may be the peak for
some chunk size are kept.

Halos: the ``depth`` of a call is how many rows of the innermost atom the halos up to it span, on the way with the most.
In a group that ends at depth D, a trip makes ``chunk + D - depth`` rows of a value of that depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, prod
from typing import NamedTuple

from fmecompile.analysis.axes import GraphAxes
from fmecompile.analysis.cost import fresh_s
from fmecompile.partition.nests import MAX_REACH, MAX_TRIPS, Nest, nests, role_of
from fmecompile.partition.region import Region
from fmecompile.runtime.host import to_device, to_host
from fmecompile.runtime.rates import KEPT_BYTES

TRIP_CALLS = 6
"""Slicing what a trip reads and writing what it makes cost about as much time as so many calls."""
MAX_HALO_SHARE = 8
"""A trip makes at least this many times the bytes of its chunk as of the halos that its neighbours make too."""


@dataclass(eq=False)
class Candidate:
    """Operators ``[start, stop)`` as one loop nest (``nest`` empty: run whole, one after another).

    ``base_bytes`` is what is held whole during the loop; ``moments`` are (fixed, sliced) bytes of one trip, sliced
    being what a trip over the whole last atom would hold. ``halo_rows`` is how many rows beyond its chunk a trip makes
    on average. ``least_bytes`` is held in front of the loop. ``joins`` counts the GroupNorms that operators run whole
    join again. Once a chunk size was built, ``known`` has what its trips hold, and ``scale`` by how much the estimate
    was short.

    Of time, ``fixed_s`` is what every trip costs however few rows it has, ``sliced_s`` what all trips share, and
    ``fresh_s`` what they share unless each holds little enough to be kept by the allocator; ``beside_s`` what the loop
    costs once, and ``whole_s`` what the operators cost run whole, by the parts. ``issue_s`` is what the host takes to
    ask for one trip, while the device works. ``unfolded`` has what convolutions cost more in chunks of fewer rows.
    """

    start: int
    stop: int
    nest: Nest
    base_bytes: int
    moments: tuple[tuple[float, float], ...]
    outer_trips: int = 1
    size: int = 1
    least_chunk: int = 1
    halo_rows: float = 0.0
    least_bytes: int = 0
    joins: int = 0
    fixed_s: float = 0.0
    sliced_s: float = 0.0
    fresh_s: float = 0.0
    beside_s: float = 0.0
    whole_s: float = 0.0
    issue_s: float = 0.0
    unfolded: tuple[tuple[int, float], ...] = ()
    scale: float = 1.0
    max_trips: int = MAX_TRIPS
    known: dict[int, int] = field(default_factory=dict)

    def peak_bytes(self, chunk: int) -> int:
        """Projected peak with ``chunk`` rows of the innermost atom a trip."""
        return max(self.least_bytes, int(self.base_bytes + self.trip_bytes(chunk)))

    def trip_bytes(self, chunk: int) -> float:
        """What one trip holds at most."""
        exact = self.known.get(chunk)
        if exact is not None:
            return exact
        return self.scale * max((fixed + sliced * chunk / self.size for fixed, sliced in self.moments), default=0.0)

    def learn(self, chunk: int, base_bytes: int, trip_bytes: int) -> None:
        """Take over what the built group holds; other chunk sizes are off by the same factor."""
        self.base_bytes = base_bytes
        estimate = self.trip_bytes(chunk)
        if estimate and chunk not in self.known:
            self.scale *= max(1.0, trip_bytes / estimate)
        self.known[chunk] = trip_bytes

    def fit(self, allowed_bytes: float) -> tuple[int, int] | None:
        """Fewest trips whose peak is at most ``allowed_bytes``, with the chunk size; None when one row is too much."""
        if self.least_bytes > allowed_bytes:
            return None
        chunk = self.size
        for fixed, sliced in self.moments:
            room = (allowed_bytes - self.base_bytes) / self.scale - fixed
            if room < 0:
                return None
            if sliced:
                chunk = min(chunk, int(room * self.size / sliced))
        while chunk >= self.least_chunk:
            count = -(-self.size // chunk)
            even = -(-self.size // count)
            if even >= self.least_chunk and self.base_bytes + self.known.get(even, 0) <= allowed_bytes:
                trips = self.outer_trips * count
                return (trips, even) if trips <= self.max_trips else None
            chunk -= 1
        return None

    def extra_s(self, trips: int, chunk: int) -> float:
        """Seconds beyond those of the operators run whole: what trips do again, rows that neighbours make too, and what
        the loop itself costs, or a GroupNorm in parts."""
        if not self.nest:
            return self.beside_s
        return max(self.trips_s(trips, chunk), trips * self.issue_s) + self.beside_s - self.whole_s

    def trips_s(self, trips: int, chunk: int) -> float:
        """Seconds in which the device runs all trips, one after another."""
        fresh_s = self.fresh_s if self.fresh_s and self.trip_bytes(chunk) >= KEPT_BYTES else 0.0
        unfolded_s = sum(seconds for rows, seconds in self.unfolded if chunk < rows)
        return trips * self.fixed_s + (1 + self.halo_rows / chunk) * self.sliced_s + fresh_s + unfolded_s


def plain(region: Region, start: int, stop: int) -> Candidate:
    """Operators ``[start, stop)`` run whole, each releasing what it reads last."""
    peak = max(region.live[p] + region.nbytes[p] + _hidden(region, p, start, stop) for p in range(start, stop))
    norms = {p: joined for p in range(start, stop) if (joined := region.joined[p]) is not None and p == joined.last}
    in_parts = [p for p, joined in norms.items() if joined.first < start]
    again_s = sum(region.costs[p].whole_s for p in in_parts)  # the parts read once more than the whole one
    return Candidate(start, stop, (), peak, (), joins=len(norms) - len(in_parts), beside_s=again_s)


def plain_norms(region: Region) -> Iterator[Candidate]:
    """Split GroupNorms run whole from their first part to the boundary behind their last."""
    for joined in sorted({joined for joined in region.joined if joined is not None}):
        yield plain(region, joined.first, next(b for b in region.boundaries if b > joined.last))


def _hidden(region: Region, p: int, start: int, stop: int) -> int:
    """A GroupNorm whose parts stay together is joined again, and holds what the whole one does."""
    joined = region.joined[p]
    if joined is None or joined.first < start or joined.last >= stop:
        return region.hidden[p]
    return joined.hidden_bytes if p == joined.last else 0


def candidates(
    region: Region, axes: GraphAxes, start: int, min_trip_bytes: int | None = 0, max_trips: int = MAX_TRIPS
) -> Iterator[Candidate]:
    """All groups that begin at ``start`` whose trips work on ``min_trip_bytes``; without a number, on any."""
    for nest, gaps in nests(region, axes, start).items():
        for candidate in _walk(region, start, nest):
            candidate.beside_s += gaps * candidate.sliced_s
            candidate.least_chunk = _least_chunk(candidate, min_trip_bytes)
            candidate.max_trips = max_trips
            if candidate.least_chunk <= candidate.size:
                yield candidate


def _least_chunk(candidate: Candidate, min_trip_bytes: int | None) -> int:
    """The fewest rows a trip that does enough work beside that of its neighbours; more than there are when even all of
    them do not. With 0 every trip does."""
    if min_trip_bytes == 0:
        return 1
    works = min(_rows(moment, min_trip_bytes or 0, candidate.size) for moment in candidate.moments)
    return max(works, ceil(candidate.halo_rows * MAX_HALO_SHARE))


def _rows(share: tuple[float, float], needed: float, size: int) -> int:
    """The fewest rows with which (fixed, sliced) bytes reach ``needed``."""
    fixed, sliced = share
    if fixed >= needed:
        return 1
    return ceil((needed - fixed) * size / sliced) if sliced else size + 1


def _walk(region: Region, start: int, nest: Nest) -> Iterator[Candidate]:
    """Price every group that begins at ``start`` and loops over ``nest``."""
    trip = _Trip(region, start, nest)
    stops = {b for b in region.boundaries if start < b <= start + MAX_REACH}
    for p in range(start, min(start + MAX_REACH, len(region.nodes))):
        if not trip.step(p):
            return
        if p + 1 in stops and trip.met == trip.atoms:
            yield trip.candidate(p + 1)


class _Trip:
    """The bytes of one trip of a growing group."""

    def __init__(self, region: Region, start: int, nest: Nest) -> None:
        self.region, self.start, self.nest = region, start, nest
        self.atoms = frozenset(nest)
        self.inner = nest[-1]
        self.size = region.sizes[self.inner]
        self.looped: dict[int, bool] = {}
        self.hoisted = self.least = 0
        self.held = self.made = _NOTHING
        self.share: dict[int, Bytes] = {}
        self.same: dict[int, int] = {}
        self.until: dict[int, int] = {}
        self.moments: list[Bytes] = []
        self.depth: dict[int, float] = {}
        self.deepest = 0.0
        self.outer_depth: dict[int, float] = {}
        self.whole_reads: set[int] = set()
        self.dying: list[int] = []
        self.met: set[int] = set()
        self.outer_trips = 1
        self.fixed_s = TRIP_CALLS * region.rates.call_s
        self.issue_s = TRIP_CALLS * region.rates.issue_s
        self.sliced_s = self.whole_s = self.fresh_s = 0.0
        self.unfolded: list[tuple[int, float]] = []
        for atom in nest[:-1]:
            self.outer_trips *= region.sizes[atom]

    def step(self, p: int) -> bool:
        """Add the operator at ``p``; False when it cannot be in this group."""
        region = self.region
        role = role_of(region, p, self.start, self.nest, self.looped)
        if role is None:
            return False
        self.looped[p] = role
        self._note_reads(p, role)
        if role:
            self.met |= self.atoms & region.carries[p]
            own = _NOTHING if self._stays(p) or self._writes_over(p) else self._split(p, region.nbytes[p])
            self.held = self.held.plus(own)
            self.made = self.made.plus(own)
            self._note_cost(p)
            self._moment(self.held.plus(self._split(p, _hidden(region, p, self.start, p + 1))))
            if region.owner[p] == p:
                self.share[p] = own
        else:
            self.hoisted += region.nbytes[p]
            self.least = max(self.least, self.hoisted + _hidden(region, p, self.start, p + 1))
        for dead in region.dies[p]:
            if dead < self.start:
                self.dying.append(dead)
            self._release(self.same.get(dead, dead), p)
        return True

    def _stays(self, p: int) -> bool:
        """Whether ``p`` moves a value of the trip to host memory, or takes it back: it stays where it is meanwhile."""
        region = self.region
        if region.nodes[p].target not in (to_host, to_device):
            return False
        moved = region.reads[p][0].owner
        if region.nodes[p].target is to_device and not self.looped.get(moved, False):
            return False
        root = self.same[p] = self.same.get(moved, moved)
        self.until[root] = max(self.until.get(root, moved), region.last[moved], region.last[p])
        return True

    def _writes_over(self, p: int) -> bool:
        """Whether ``p`` writes over a value of the trip, whose memory is its own from there on."""
        over = self.region.over[p]
        root = self.same.get(over, over)
        if root not in self.share:
            return False
        self.same[p] = root
        self.until[root] = self.region.last[p]
        return True

    def _note_cost(self, p: int) -> None:
        """What the trips spend on a call; what does not carry the innermost atom is done again by each."""
        cost = self.region.costs[p]
        fixed, sliced = cost.split(self.atoms)
        missing = self.atoms - self.region.carries[p]
        again = prod(self.region.sizes[atom] for atom in missing - {self.inner})
        self.whole_s += fixed + sliced + cost.fresh_s
        self.fresh_s += cost.fresh_s
        self.fixed_s += fixed
        self.issue_s += self.region.rates.issue_s
        if self.inner in missing:
            self.fixed_s += sliced * again / self.outer_trips
        else:
            self.sliced_s += sliced * again
        if cost.unfolding is not None:
            rows = cost.unfolding.least_rows(self.nest, self.region.sizes)
            self.unfolded += [(rows, cost.unfolding.extra_s)] if rows > 1 else []

    def _release(self, root: int, p: int) -> None:
        """Give back what a trip holds of a storage once all that stays in it is dead."""
        if root in self.share and self.until.get(root, p) <= p:
            self.held = self.held.minus(self.share.pop(root))

    def _note_reads(self, p: int, role: bool) -> None:
        """The depth of ``p``; and of outside storages, which are read beyond a trip's own slice and from what depth."""
        reads = self.region.reads[p]
        if role:
            self.depth[p] = max(
                (self.depth.get(r.producer, 0.0) + r.halo.get(self.inner, 0.0) for r in reads), default=0.0
            )
            self.deepest = max(self.deepest, self.depth[p])
        for read in reads:
            if read.owner >= self.start or read.producer in self.depth:
                continue
            if not role or read.reduced & self.atoms:
                self.whole_reads.add(read.owner)
            else:
                at = self.depth[p] - read.halo.get(self.inner, 0.0)
                self.outer_depth[read.owner] = min(at, self.outer_depth.get(read.owner, at))

    def _split(self, p: int, nbytes: int) -> Bytes:
        carried = self.region.carries[p]
        for atom in self.nest[:-1]:
            if atom in carried:
                nbytes = -(-nbytes // self.region.sizes[atom])
        if self.inner not in carried:
            return Bytes(nbytes, 0, 0.0)
        return Bytes(0, nbytes, nbytes * self.depth.get(p, 0.0) / self.size)

    def _moment(self, new: Bytes) -> None:
        if not any(m.covers(new) for m in self.moments):
            self.moments = [m for m in self.moments if not new.covers(m)]
            self.moments.append(new)

    def candidate(self, stop: int) -> Candidate:
        region = self.region
        outs = [r for r in self.share if region.last[r] >= stop]
        free = [region.nbytes[r] for r in self.dying if self._is_free(r)]
        made = list(outs)
        for r in outs:
            if region.nbytes[r] in free and self._whole_nest(r):
                free.remove(region.nbytes[r])
                made.remove(r)
        held = region.live[self.start] + self.hoisted + sum(region.nbytes[r] for r in made)
        rows = self.deepest / self.size
        makes = self.made.at(rows)
        written_s = sum(region.nbytes[r] for r in outs) * 2 / region.rates.bytes_per_s
        mapped_s = sum(fresh_s(region.nbytes[r], region.rates) for r in made)
        return Candidate(
            self.start,
            stop,
            self.nest,
            held,
            tuple({moment.at(rows) for moment in self.moments}),
            self.outer_trips,
            self.size,
            least_bytes=region.live[self.start] + self.least,
            halo_rows=(makes[0] - self.made.fixed) * self.size / makes[1] if self.deepest else 0.0,
            fixed_s=self.fixed_s,
            sliced_s=self.sliced_s,
            fresh_s=self.fresh_s,
            beside_s=written_s + mapped_s,
            whole_s=self.whole_s,
            issue_s=self.issue_s,
            unfolded=tuple(self.unfolded),
        )

    def _is_free(self, position: int) -> bool:
        """Dead after this group, which reads nothing of it but the slice of the trip that handles it."""
        reached = self.outer_depth.get(position, self.deepest) < self.deepest
        return position not in self.whole_reads and not reached and self._whole_nest(position)

    def _whole_nest(self, position: int) -> bool:
        """A slice of this storage belongs to exactly one trip."""
        return self.atoms <= self.region.carries[position]


class Bytes(NamedTuple):
    """``fixed`` bytes a trip, ``sliced`` of a trip over all rows, and by how much the depth of what is held lowers the
    bytes of its halos."""

    fixed: float
    sliced: float
    shallow: float

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.fixed + other.fixed, self.sliced + other.sliced, self.shallow + other.shallow)

    def minus(self, other: Bytes) -> Bytes:
        return Bytes(self.fixed - other.fixed, self.sliced - other.sliced, self.shallow - other.shallow)

    def covers(self, other: Bytes) -> bool:
        """Whether this holds at least as much at every chunk size and depth."""
        least = self.fixed - self.shallow >= other.fixed - other.shallow
        return least and self.sliced >= other.sliced

    def at(self, deepest: float) -> tuple[float, float]:
        """(fixed, sliced) when the group ends at this depth, given as a share of all rows."""
        return (self.fixed + self.sliced * deepest - self.shallow, self.sliced)


_NOTHING = Bytes(0, 0, 0.0)
