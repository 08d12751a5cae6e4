"""The longest and the largest clip that fit a budget: estimated along a line, then tried with a real plan."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from fmecompile.offline.calls import Call, frames_limit
from fmecompile.offline.model import Model, Size
from fmecompile.offline.survey import RESIDENCES, Survey

MOST_FRAMES, MOST_HEIGHT, STEP = 1024, 4096, 64
ROUNDS = 3
"""How often an answer is tried before an estimate has to do: each costs the plan of one call, seconds."""

MARGIN = 0.04
"""By how much of the activations an estimate has to stay below the budget once one has failed."""


@dataclass(frozen=True)
class Largest:
    """The most frames (``axis`` is ``frames``), or the largest frame (``size``), of a residence; if it ``may_spill``,
    with values in host memory.

    ``size`` is None where not even the smallest clip fits. ``is_tried``: a plan of ``bottleneck`` at this size was
    made within the budget; otherwise all of it is an estimate. ``eager_size`` is always one. ``is_end``: the model or
    the search takes no larger one.
    """

    axis: str
    residence: str
    may_spill: bool
    size: Size | None
    is_tried: bool
    is_end: bool
    bottleneck: str
    eager_size: Size | None


def line(model: Model, axis: str) -> list[Size]:
    """Clips that differ from the model's in one thing only, from the smallest to the largest.

    Frame sizes are multiples of 64 with the aspect ratio that is nearest.
    """
    own = model.size
    if axis == "frames":
        most = frames_limit(model) or MOST_FRAMES
        return [Size(frames, own.height, own.width) for frames in range(1, most + 1)]
    heights = range(STEP, MOST_HEIGHT + 1, STEP)
    return [Size(own.frames, height, width_of(own, height)) for height in heights]


def width_of(size: Size, height: int) -> int:
    """The multiple of 64 that comes nearest to the aspect ratio of ``size``."""
    return max(1, round(height * size.width / size.height / STEP)) * STEP


class Search:
    """One question: its candidates, and what has been tried. Totals grow along the line, so fitting ones come first."""

    def __init__(
        self, model: Model, survey: Survey, budget_bytes: int, axis: str, residence: str, may_spill: bool = False
    ) -> None:
        self.axis, self.residence, self.may_spill = axis, residence, may_spill
        self._column = "spill" if may_spill else "floor"
        self._survey, self._budget_bytes, self._line = survey, budget_bytes, line(model, axis)
        self._fits: dict[Size, bool] = {}

    def best(self) -> Size | None:
        """The largest candidate that fits by all that is known now. What was tried and failed does not."""
        failed = [size.volume for size, fits in self._fits.items() if not fits]
        return self._last(self._column, min(failed, default=None))

    def _last(self, column: str, below: int | None = None) -> Size | None:
        """The last candidate in front of the first that does not fit, or is not ``below`` a volume."""
        small = takewhile(lambda size: below is None or size.volume < below, self._line)
        return next(iter(reversed(list(takewhile(lambda size: self._holds(size, column), small)))), None)

    def _holds(self, size: Size, column: str) -> bool:
        call, total = self._survey.bottleneck(size, column, self.residence)
        has_failed = column == self._column and not all(self._fits.values())
        margin = MARGIN * (total - self._survey.base_bytes(call, self.residence)) if has_failed else 0
        return total + margin <= self._budget_bytes

    def question(self) -> Size | None:
        """What to try next; None when the best answer has been, or when a plan of that size is there already."""
        best = self.best()
        if best is not None and not self.may_spill and self._survey.is_planned(best) and self._holds(best, "planned"):
            self._fits[best] = True
        is_enough = self.may_spill and any(self._fits.values())
        return None if best is None or best in self._fits or is_enough else best

    def limit(self, size: Size) -> tuple[Call, int, bool]:
        """The call that decides at ``size``, the activations it may hold, and whether it may spill."""
        call, _ = self._survey.bottleneck(size, self._column, self.residence)
        return call, self._budget_bytes - self._survey.base_bytes(call, self.residence), self.may_spill

    def tell(self, size: Size, fits: bool) -> None:
        """The answer to the question ``size``."""
        self._fits[size] = fits

    def answer(self) -> Largest:
        """The best size of the last estimate, or a smaller one that was tried and fits."""
        tried = [size for size, fits in self._fits.items() if fits]
        size = max(tried, key=lambda size: size.volume) if tried else self.best()
        bottleneck = self.limit(size or self._line[0])[0].name
        return Largest(
            axis=self.axis,
            residence=self.residence,
            may_spill=self.may_spill,
            size=size,
            is_tried=size in tried,
            is_end=size == self._line[-1],
            bottleneck=bottleneck,
            eager_size=self._last("eager"),
        )


def largest(model: Model, survey: Survey, budget_bytes: int) -> list[Largest]:
    """Both axes, with all weights on the device and with model CPU offload; and as many frames as one or two tries find
    with values in host memory, where the model's own size needs that. What a round asks is planned at once.
    """
    searches = [
        Search(model, survey, budget_bytes, axis, residence, may_spill)
        for residence in RESIDENCES
        for axis, may_spill in (("frames", False), ("size", False), ("frames", True))
        if not may_spill or survey.needs_spill(residence)
    ]
    for _ in range(ROUNDS):
        asked = [(search, size) for search in searches if (size := search.question()) is not None]
        if not asked:
            break
        limits = [search.limit(size) for search, size in asked]
        for (search, size), fits in zip(asked, survey.try_limits(limits), strict=True):
            search.tell(size, fits)
    return [search.answer() for search in searches]
