"""The page of compiled calls: timelines, what peaks are made of, groups, barriers, reuse, graphs, and plans as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from fmecompile.report.drawing import HUES, Curve, Mark, bytes_text, seconds_text, template, timeline
from fmecompile.report.peak import Part, parts_of

if TYPE_CHECKING:
    from fmecompile.graph.plan import Plan


@dataclass(frozen=True)
class Strip:
    """What the steps of one generation did: a row of cells a component, each with whether it was computed, and what is
    said of the step. ``about`` counts them."""

    about: str
    rows: Sequence[tuple[str, Sequence[tuple[bool, str]]]]


@dataclass(frozen=True)
class Sheet:
    """One compiled call on a page. ``title`` is empty where it is alone; ``budget`` says what a memory budget is made
    of, and leaves ``limit_bytes`` for activations; ``others`` are parts that are held beside the call. ``group_s`` are
    measured seconds by the place of a group. ``kinds`` are the plans of other kinds of steps, ``maps`` drawings of how
    much steps are alike, with their titles. ``notes`` are what passes said."""

    plan: Plan
    title: str = ""
    budget: str = ""
    limit_bytes: int | None = None
    others: Sequence[Part] = ()
    group_s: Mapping[int, float] = field(default_factory=dict)
    kinds: Sequence[tuple[str, Plan, str]] = ()
    strips: Sequence[Strip] = ()
    maps: Sequence[tuple[str, Markup]] = ()
    remarks: Sequence[str] = ()
    notes: Sequence[tuple[str, str]] = ()

    @property
    def figure(self) -> Markup:
        """Both timelines on one axis, and what was allowed."""
        plan = self.plan
        held = [value + plan.beside_bytes for value in plan.timeline]
        curves = [
            Curve("eager", "eager", plan.eager_timeline, plan.eager_bands),
            Curve("optimized", "ours", held, plan.bands),
        ]
        is_budget = self.limit_bytes == plan.allowed_bytes
        marks = [Mark("allowed by the budget" if is_budget else "allowed", plan.allowed_bytes)]
        if self.limit_bytes is not None and not is_budget:
            marks.append(Mark("left by the budget", self.limit_bytes))
        return timeline("Activation memory during one call", curves, marks)

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """The headline: activations first, then what exists before the call, then how much work the loops are."""
        plan, eager = self.plan, self.plan.eager_peak_bytes
        return [
            ("Eager peak", bytes_text(eager) if eager else "not measured"),
            ("Allowed", bytes_text(plan.allowed_bytes)),
            ("Projected peak", bytes_text(plan.projected_peak_bytes)),
            ("Floor", bytes_text(plan.floor_bytes)),
            ("Of eager", f"{100 * plan.projected_peak_bytes / eager:.1f} %" if eager else "not measured"),
            ("Weights", bytes_text(plan.weight_bytes)),
            ("Inputs", bytes_text(plan.input_bytes)),
            ("Groups", str(len(plan.groups))),
            ("Chunk trips", str(plan.trips)),
            ("Pipelined groups", str(plan.pipelined)),
            ("Time eager, projected", seconds_text(plan.eager_s)),
            ("Time run whole, projected", seconds_text(plan.whole_s)),
            ("Loops add, projected", seconds_text(plan.extra_s, signed=True)),
        ]

    @property
    def parts(self) -> list[tuple[Part, float, int]]:
        """Each part of the peak, its share of all of them in %, and its colour."""
        found = parts_of(self.plan, self.others)
        total = sum(part.nbytes for part in found)
        return [(part, 100 * part.nbytes / total, place % HUES) for place, part in enumerate(found)]

    @property
    def owners(self) -> list[tuple[str, int, float, str, str]]:
        """What is held at the peak: name, bytes, share of the peak in %, and where it comes from and goes."""
        peak = max(self.plan.projected_peak_bytes, 1)
        return [(o.name, o.nbytes, 100 * o.nbytes / peak, o.made_in, o.read_in) for o in self.plan.owners]

    @property
    def measured(self) -> list[str]:
        """Of each group, the measured time in words; empty where none is known."""
        return [seconds_text(self.group_s[k]) if k in self.group_s else "" for k in range(len(self.plan.groups))]

    @property
    def data(self) -> Markup:
        """The plan's JSON as it may stand in a page."""
        return Markup(_inert(self.plan.to_json()))


def write_page(path: Path, title: str, about: str, sheets: Sequence[Sheet], refused: Sequence[str] = ()) -> None:
    """Write one page of several compiled calls; ``refused`` are calls that run eagerly, and why."""
    page = template("plan.html").render(title=title, about=about, sheets=sheets, refused=refused)
    path.write_text(page, encoding="utf-8")


def _inert(text: str) -> str:
    """JSON without the characters that HTML and XML see."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
