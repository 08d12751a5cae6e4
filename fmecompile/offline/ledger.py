"""What is known of each call, and what other sizes will hold by the sizes that are known.

Activations grow in proportion to frames and to pixels, to first order; so two sizes on a line tell the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from fmecompile.offline.calls import Call
from fmecompile.offline.figures import Held, Job
from fmecompile.offline.model import Size

Key = tuple[str, str, str]

COLUMNS = ("eager", "planned", "floor")
"""Ways to run a call: unmodified, by the default plan, by the plan that holds least."""


class Ledger:
    """Bytes by call, column and size. Columns: ``weights``, ``inputs``, ``eager``, ``planned``, ``floor``, ``spill``.

    The last four are activations: of the unmodified module, of the default plan, the least that any plan holds, and the
    least with values in host memory.
    """

    def __init__(self) -> None:
        self._known: dict[Key, dict[Size, int]] = {}

    def note(self, job: Job, held: Held) -> None:
        """Take over an answer. Weights hold at every size."""
        columns = {"weights": held.weight_bytes, "inputs": held.input_bytes}
        if job.is_eager:
            columns["eager"] = held.peak_bytes
        else:
            columns["spill" if job.may_spill else "floor"] = held.floor_bytes
        if not job.is_eager and job.limit_bytes is None:
            columns["planned"] = held.peak_bytes
        for column, value in columns.items():
            self._known.setdefault(_key(job.call, column), {})[job.call.size] = value

    def is_known(self, call: Call, column: str) -> bool:
        """Whether the figure was computed for this very size."""
        return call.size in self._known.get(_key(call, column), {})

    def value(self, call: Call, column: str) -> int:
        """Bytes: computed where the size is known, else along a line through known ones. KeyError where none is."""
        if column == "spill":
            floor = self.value(call, "floor")
            return min(self._along(call, column), floor) if _key(call, column) in self._known else floor
        return self._along(call, column)

    def _along(self, call: Call, column: str) -> int:
        known = self._known[_key(call, column)]
        if call.size in known:
            return known[call.size]
        if column == "weights":
            return next(iter(known.values()))
        points = [(size.volume, value) for size, value in known.items() if _is_in_line(size, call.size)]
        points = points or [(size.volume, value) for size, value in known.items()]
        return along(sorted(points), call.size.volume)


def _key(call: Call, column: str) -> Key:
    return call.kind, call.component.name, column


def _is_in_line(one: Size, other: Size) -> bool:
    """Whether two sizes differ in their number of frames or in their frames' size, and not in both."""
    return one.frames == other.frames or (one.height, one.width) == (other.height, other.width)


def along(points: Sequence[tuple[int, int]], x: int) -> int:
    """The value at ``x`` of the line through the two points around it, or the nearest two; through zero with one.

    ``points`` are sorted by x; those that share an x count once.
    """
    points = list(dict(points).items())
    if len(points) == 1:
        points = [(0, 0), *points]
    right = next((i for i, (known, _) in enumerate(points) if known >= x and i > 0), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0, round(y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
