"""What the steps of one signature could reuse beside what they do: a list that ``explain`` prints and a page draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmecompile.analysis.cut_sets import CutSet, CutSets
from fmecompile.analysis.cuts import CutValue
from fmecompile.budget import mib
from fmecompile.reuse.calibration import Calibration

LINES = 7
"""As many sets are printed."""


@dataclass(frozen=True)
class Offer:
    """``sets`` of values by rising bytes and savings, ``singles`` the values that save something alone, and what the
    policy reuses, ``chosen``, with the least and the greatest similarity between neighbouring steps, if that is known.
    Bytes are those of the values once; a forecast keeps more of each."""

    sets: tuple[CutSet, ...]
    singles: tuple[CutValue, ...]
    chosen: CutSet
    alike: tuple[float, float] | None = None

    @classmethod
    def of(cls, sets: CutSets, values: Sequence[CutValue], alike: tuple[float, float] | None = None) -> Offer:
        return cls(sets.listed, sets.singles, sets.of(values), alike)

    def is_chosen(self, one: CutSet) -> bool:
        """Whether the policy reuses the values of ``one``, and no others."""
        return one.names == self.chosen.names

    @property
    def shown(self) -> tuple[CutSet, ...]:
        """``sets`` with what was chosen, though another set may save as much in fewer bytes."""
        others = [one for one in self.sets if not self.is_chosen(one)]
        chosen = [self.chosen] if self.chosen.values else []
        return tuple(sorted((*others, *chosen), key=lambda one: (one.nbytes, one.saved)))

    def __str__(self) -> str:
        """At most ``LINES`` sets, evenly from the list, the ends and what was chosen among them."""
        return "\n".join(["what could be kept, * is:", *self._lines()])

    def _lines(self) -> Iterator[str]:
        shown = self.shown
        for place in sorted(self._places(shown)):
            one = shown[place]
            mark = "*" if self.is_chosen(one) else " "
            runs = f"; runs {brief(one.running)}" if one.running else ""
            yield f"{mark} {mib(one.nbytes)}, {one.saved:.1%} of the work saved: {brief(one.modules)}{runs}"

    def _places(self, shown: Sequence[CutSet]) -> set[int]:
        """The places of those that are printed; what was chosen takes that of its nearest neighbour."""
        count = min(len(shown), LINES)
        places = {k * (len(shown) - 1) // max(count - 1, 1) for k in range(count)}
        for chosen in (k for k, one in enumerate(shown) if self.is_chosen(one) and k not in places):
            places.remove(min(places - {0, len(shown) - 1}, key=lambda place: abs(place - chosen)))
            places.add(chosen)
        return places

    def to_html(self, path: str | Path, calibration: Calibration | None = None) -> None:
        """Write a self-contained page that draws work saved against bytes kept, and tells how much neighbouring steps
        are alike: of what was chosen where the policy knows, and of the values that a ``calibration`` of the same model
        recorded alone. Raises OptionError where ``calibration`` is something else."""
        from fmecompile.backends.offer_page import page_of

        Path(path).write_text(page_of(self, calibration), encoding="utf-8")


NO_OFFER = Offer((), (), CutSet((), 0, 0.0, ()))
"""Where nothing is reused."""


def brief(paths: Sequence[str], most: int = 2) -> str:
    """The first of ``paths``, and how many more there are."""
    more = len(paths) - most
    return ", ".join(paths[:most]) + (f" and {more} more" if more > 0 else "")
