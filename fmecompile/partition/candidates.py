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
from math import ceil
from typing import NamedTuple

from fmecompile.analysis.axes import GraphAxes
from fmecompile.partition.nests import MAX_REACH, MAX_TRIPS, Nest, nests, role_of
from fmecompile.partition.region import Region
from fmecompile.runtime.host import to_device, to_host

MAX_WEIGHT_SHARE = 8
"""Bytes of weights that a trip may read for each byte it makes; above that, chunks cost more time than they save."""
MAX_HALO_SHARE = 8
"""A trip makes at least this many times the bytes of its chunk as of the halos that its neighbours make too."""


@dataclass(eq=False)
class Candidate:
    """Operators ``[start, stop)`` as one loop nest (``nest`` empty: run whole, one after another).

    ``base_bytes`` is what is held whole during the loop; ``moments`` are (fixed, sliced) bytes of one trip, sliced
    being what a trip over the whole last atom would hold. ``makes`` is (fixed, sliced) of all that a trip makes,
    ``halo_rows`` how many rows beyond its chunk on average, and ``weight_bytes`` what it reads of the model.
    ``least_bytes`` is held in front of the loop. ``joins`` and ``splits`` count the GroupNorms that operators run whole
    join again, or leave in parts. Once a chunk size was built, ``known`` has what its trips hold, and
    ``scale`` by how much the estimate was short.
    """

    start: int
    stop: int
    nest: Nest
    base_bytes: int
    moments: tuple[tuple[float, float], ...]
    outer_trips: int = 1
    size: int = 1
    least_chunk: int = 1
    weight_bytes: int = 0
    makes: tuple[float, float] = (0, 0)
    halo_rows: float = 0.0
    least_bytes: int = 0
    joins: int = 0
    splits: int = 0
    scale: float = 1.0
    max_trips: int = MAX_TRIPS
    weight: float = 1.0
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

    def cost(self, trips: int, chunk: int) -> float:
        """Trips, weighted by the share of the work that neighbours do twice; and a little for the loop itself, or for
        a GroupNorm in parts."""
        if not self.nest:
            return 0.25 * self.splits
        return self.weight * trips * (1 + MAX_HALO_SHARE * self.halo_rows / chunk) + 0.5


def plain(region: Region, start: int, stop: int) -> Candidate:
    """Operators ``[start, stop)`` run whole, each releasing what it reads last."""
    peak = max(region.live[p] + region.nbytes[p] + _hidden(region, p, start, stop) for p in range(start, stop))
    norms = [joined for p in range(start, stop) if (joined := region.joined[p]) is not None and p == joined.last]
    whole = sum(joined.first >= start for joined in norms)
    return Candidate(start, stop, (), peak, (), joins=whole, splits=len(norms) - whole)


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
    region: Region, axes: GraphAxes, start: int, min_trip_bytes: int = 0, max_trips: int = MAX_TRIPS
) -> Iterator[Candidate]:
    """All groups that begin at ``start`` whose trips do enough work; with 0 every trip does."""
    for nest, weight in nests(region, axes, start).items():
        for candidate in _walk(region, start, nest):
            candidate.weight = weight
            candidate.least_chunk = _least_chunk(candidate, min_trip_bytes)
            candidate.max_trips = max_trips
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
    least = max(works, _rows(candidate.makes, candidate.weight_bytes / MAX_WEIGHT_SHARE, candidate.size))
    return max(least, ceil(candidate.halo_rows * MAX_HALO_SHARE))


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
        self.weight_bytes = 0
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
            own = _NOTHING if self._stays(p) else self._split(p, region.nbytes[p])
            self.held = self.held.plus(own)
            self.made = self.made.plus(own)
            self.weight_bytes += region.weight_bytes[p]
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
        taken = 0
        for r in outs:
            if region.nbytes[r] in free and self._whole_nest(r):
                free.remove(region.nbytes[r])
                taken += region.nbytes[r]
        held = region.live[self.start] + self.hoisted + sum(region.nbytes[r] for r in outs) - taken
        rows = self.deepest / self.size
        makes = self.made.at(rows)
        return Candidate(
            self.start,
            stop,
            self.nest,
            held,
            tuple({moment.at(rows) for moment in self.moments}),
            self.outer_trips,
            self.size,
            weight_bytes=self.weight_bytes,
            makes=makes,
            least_bytes=region.live[self.start] + self.least,
            halo_rows=(makes[0] - self.made.fixed) * self.size / makes[1] if self.deepest else 0.0,
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
