"""The search: the cheapest way to run the whole graph under a limit, and the least limit that can be met.

Dynamic programming over boundaries: the cheapest plan of the first i operators is extended by one candidate. The limit
is found by bisection, since a plan that meets a limit meets every larger one. Cost is time: seconds beyond those of all
operators run whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from fmecompile.partition.candidates import Candidate
from fmecompile.runtime.rates import KEPT_BYTES

KNEE = 1.03
"""The default plan is the fastest one within 3 % of the least peak,"""
MAX_LOSS = 0.02
"""unless a call takes longer than eager's, less what loops save at best, by a larger share than this: then it may hold
as much more as it takes."""
MORE_LOSS = 0.03
"""The share that it may lose beyond, where activations are all that is held; in proportion where weights are too."""


@dataclass(frozen=True)
class Eager:
    """The unmodified module: how long a call takes, projected, and what its weights hold."""

    seconds: float = 0.0
    weight_bytes: int = 0

    def most_s(self, whole_s: float, limit_bytes: float, fastest_s: float = 0.0) -> float:
        """Seconds beyond ``whole_s``, what all operators of the rewritten graph take, that a default plan may take that
        holds ``limit_bytes``. The more of all bytes those are, the more it is worth to have fewer. What loops save at
        best (``fastest_s``, not above 0) is not there to be lost."""
        share = limit_bytes / max(limit_bytes + self.weight_bytes, 1)
        return (MAX_LOSS + MORE_LOSS * share) * whole_s + max(self.seconds - whole_s, 0.0) + fastest_s


@dataclass(frozen=True)
class Choice:
    """One candidate with its chunk size (0 when it runs whole)."""

    candidate: Candidate
    chunk: int
    trips: int

    @property
    def peak_bytes(self) -> int:
        return self.candidate.peak_bytes(self.chunk)

    @property
    def extra_s(self) -> float:
        return self.candidate.extra_s(self.trips, self.chunk)


def cheapest(by_stop: dict[int, list[Candidate]], stops: list[int], allowed_bytes: float) -> list[Choice] | None:
    """The fastest plan of which no part peaks above ``allowed_bytes``; None if there is none."""
    return _trace(_sweep(by_stop, stops, allowed_bytes), stops[-1])


def stuck_at(by_stop: dict[int, list[Candidate]], stops: list[int], allowed_bytes: float) -> int:
    """How many operators can be run under a limit, from the first on; every way to go on holds more."""
    return max(_sweep(by_stop, stops, allowed_bytes))


def _sweep(
    by_stop: dict[int, list[Candidate]], stops: list[int], allowed_bytes: float
) -> dict[int, tuple[float, Choice | None]]:
    """For each position that can be reached, the least cost and the last choice on the way."""
    best: dict[int, tuple[float, Choice | None]] = {0: (0.0, None)}
    for stop in stops:
        found: tuple[float, Choice | None] | None = None
        for candidate in by_stop.get(stop, ()):
            before = best.get(candidate.start)
            if before is None or (found is not None and before[0] - candidate.fresh_s >= found[0]):
                continue  # a loop saves no more than that
            for choice in _choices(candidate, allowed_bytes):
                cost = before[0] + choice.extra_s
                if found is None or cost < found[0]:
                    found = (cost, choice)
        if found is not None:
            best[stop] = found
    return best


def _choices(candidate: Candidate, allowed_bytes: float) -> Iterator[Choice]:
    """Run whole; or in the fewest trips there is room for, and in the fewest whose memory the allocator keeps."""
    if not candidate.nest:
        if candidate.base_bytes <= allowed_bytes:
            yield Choice(candidate, 0, 0)
        return
    kept_bytes = candidate.base_bytes + KEPT_BYTES - 1
    for limit in (allowed_bytes, kept_bytes) if candidate.fresh_s and kept_bytes < allowed_bytes else (allowed_bytes,):
        if fit := candidate.fit(limit):
            yield Choice(candidate, fit[1], fit[0])


def _trace(best: dict[int, tuple[float, Choice | None]], end: int) -> list[Choice] | None:
    if end not in best:
        return None
    path: list[Choice] = []
    at = end
    while at:
        choice = best[at][1]
        assert choice is not None
        path.append(choice)
        at = choice.candidate.start
    return path[::-1]


def extra_s(plan: list[Choice]) -> float:
    """By how much the loops of a plan are slower than its operators run whole."""
    return sum(choice.extra_s for choice in plan)


def knee(by_stop: dict[int, list[Candidate]], stops: list[int], floor: float, whole_s: float, eager: Eager) -> float:
    """The limit of the default plan in bytes: near ``floor``, or the least whose plan does not lose too much time."""
    low, high = KNEE * floor, _whole_bytes(by_stop)
    fastest_s = _loss_s(by_stop, stops, max(low, high))
    if low >= high or _loss_s(by_stop, stops, low) <= eager.most_s(whole_s, low, fastest_s):
        return low
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        if _loss_s(by_stop, stops, middle) <= eager.most_s(whole_s, middle, fastest_s):
            high = middle
        else:
            low = middle
    return high


def _loss_s(by_stop: dict[int, list[Candidate]], stops: list[int], allowed_bytes: float) -> float:
    plan = cheapest(by_stop, stops, allowed_bytes)
    return inf if plan is None else extra_s(plan)


def _whole_bytes(by_stop: dict[int, list[Candidate]]) -> float:
    """What is held at most where every operator runs whole."""
    return float(max(c.base_bytes for found in by_stop.values() for c in found if not c.nest))


def least_limit(by_stop: dict[int, list[Candidate]], stops: list[int], resolution: float = 0.004) -> float:
    """The least limit in bytes that some plan meets, within ``resolution``."""
    low, high = 0.0, _whole_bytes(by_stop)
    while high - low > resolution * high:
        middle = (low + high) / 2
        if cheapest(by_stop, stops, middle) is None:
            low = middle
        else:
            high = middle
    return high
