"""The page of an offer: work saved against bytes kept, and every set in a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fmecompile.analysis.cut_sets import CutSet
from fmecompile.backends.offer import Offer, brief
from fmecompile.errors import OptionError
from fmecompile.report import bytes_text, template
from fmecompile.reuse.calibration import Calibration, neighbours

_WIDTH, _HEIGHT = 1000, 400
_TICKS = 6


@dataclass(frozen=True)
class Dot:
    """A set in the drawing: its place in % from the left and the top, how it looks, and what it says."""

    x: float
    y: float
    style: str
    text: str


@dataclass(frozen=True)
class Scale:
    """Bytes from ``least`` to ``most``, both powers of two, over the width of the drawing: doublings are equally far
    apart."""

    least: int
    most: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Scale:
        low, high = math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes)))
        return cls(2**low, 2 ** max(high, low + 1))

    def percent(self, nbytes: int) -> float:
        return 100 * math.log2(nbytes / self.least) / math.log2(self.most / self.least)

    def ticks(self) -> list[tuple[float, str]]:
        """At most ``_TICKS`` powers of two: places in %, and the bytes in words."""
        powers = range(round(math.log2(self.least)), round(math.log2(self.most)) + 1)
        stride = -(-len(powers) // _TICKS)
        return [(self.percent(2**power), bytes_text(2**power)) for power in powers[::stride]]


class Similarities:
    """How much neighbouring steps are alike, in words, ``""`` where it is not known."""

    def __init__(self, offer: Offer, calibration: Calibration | None) -> None:
        if not isinstance(calibration, Calibration | None):
            raise OptionError(
                f"{calibration!r} is no calibration",
                next_step="give what fmecompile.calibrate returned, or leave it out",
            )
        records = calibration.records if calibration is not None else ()
        alone = (record for record in records if record.mode == "feature" and len(record.modules) == 1)
        self._of_module = {record.modules[0]: neighbours(record.trace.similarity) for record in alone}
        self._offer = offer

    def of(self, one: CutSet) -> str:
        """Those of what was chosen, or of a single value."""
        known = self._of_module.get(one.modules[0]) if len(one.values) == 1 else None
        known = known or (self._offer.alike if self._offer.is_chosen(one) else None)
        return f"{known[0]:.4f} to {known[1]:.4f}" if known is not None else ""


def page_of(offer: Offer, calibration: Calibration | None = None) -> str:
    """The page as HTML, with nothing to load. Raises OptionError where ``calibration`` is something else."""
    alike = Similarities(offer, calibration)
    rows = [
        (offer.is_chosen(one), one, brief(one.modules, 8), brief(one.running, 4), alike.of(one)) for one in offer.shown
    ]
    page = template("offer.html")
    return page.render(title="What steps could reuse", chosen=offer.chosen, rows=rows, figure=_figure(offer, alike))


def _figure(offer: Offer, alike: Similarities) -> Markup:
    sizes = [size for one in (*offer.sets, *offer.singles, offer.chosen) if (size := one.nbytes)] or [1]
    scale = Scale.of(sizes)
    figure = template("offer_plot.html").render(
        width=_WIDTH,
        height=_HEIGHT,
        line=_line(offer.sets, scale),
        dots=list(_dots(offer, scale, alike)),
        percents=[(100 - share, _HEIGHT * (100 - share) / 100, f"{share} %") for share in range(0, 101, 20)],
        ticks=scale.ticks(),
    )
    return Markup(figure)


def _line(sets: Sequence[CutSet], scale: Scale) -> str:
    """The most that was found to be saved within so many bytes, as SVG path data; empty where there is nothing."""
    steps = [f"H{_WIDTH * scale.percent(one.nbytes) / 100:.1f} V{_HEIGHT * (1 - one.saved):.1f}" for one in sets]
    return f"M0 {_HEIGHT} {' '.join(steps)} H{_WIDTH}" if steps else ""


def _dots(offer: Offer, scale: Scale, alike: Similarities) -> Iterator[Dot]:
    """Single values, then sets over them, and what was chosen on top."""
    listed = {one.names for one in offer.sets}
    singles = [CutSet((value,), value.nbytes, value.saved, ()) for value in offer.singles]
    singles = [one for one in singles if one.names not in listed]
    styles: dict[str, Sequence[CutSet]] = {
        "single": [one for one in singles if one.names not in listed],
        "set": offer.sets,
    }
    styles["chosen"] = [offer.chosen] if offer.chosen.nbytes else []
    for style, sets in styles.items():
        for one in sets:
            text = f"{bytes_text(one.nbytes)}, {one.saved:.1%} of the work saved: {brief(one.modules, 6)}"
            text += f"; neighbouring steps are alike by {similarity}" if (similarity := alike.of(one)) else ""
            yield Dot(scale.percent(one.nbytes), 100 * (1 - one.saved), style, text)
