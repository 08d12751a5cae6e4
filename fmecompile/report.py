"""Self-contained HTML pages: memory timelines as inline SVG, light and dark, no network.

Knows no compiler, only plans as data. The drawing of a timeline stretches with the page while its labels stay text of
the page, so they read at any width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

if TYPE_CHECKING:
    from fmecompile.graph.plan import Plan

KIB, MIB, GIB = 2**10, 2**20, 2**30
_WIDTH, _HEIGHT, _COLUMNS = 1000, 400, 800


@dataclass(frozen=True)
class Curve:
    """Bytes held over the course of a call. ``style`` is the CSS class that colours it: ``eager`` or ``ours``."""

    label: str
    style: str
    values: Sequence[int]


@dataclass(frozen=True)
class Mark:
    """A dashed line across the timeline at ``value`` bytes."""

    label: str
    value: int


@dataclass(frozen=True)
class Exhibit:
    """One model on the demo's page. ``facts`` are (name, value) texts; all exhibits of a page name the same ones."""

    name: str
    about: str
    facts: Sequence[tuple[str, str]]
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()


def write_plan(plan: Plan, path: Path) -> None:
    """Write the page of one plan: headline, timelines, what is held at the peak, groups, barriers."""
    curves = [Curve("eager", "eager", plan.eager_timeline), Curve("optimized", "ours", plan.timeline)]
    peak = max(plan.projected_peak_bytes, 1)
    page = template("plan.html").render(
        title="Memory plan",
        plan=plan,
        numbers=_numbers(plan),
        figure=timeline("Activation memory during one call", curves, [Mark("allowed", plan.allowed_bytes)]),
        owners=[(name, size, round(100 * size / peak)) for name, size in plan.owners],
    )
    path.write_text(page, encoding="utf-8")


def _numbers(plan: Plan) -> list[tuple[str, str]]:
    """The headline: activations first, then what exists before the call, then how much work the loops are."""
    eager = plan.eager_peak_bytes
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
    ]


def write_demo(title: str, machine: str, exhibits: Sequence[Exhibit], path: Path) -> None:
    """Write the demo's page: a table with a column a model, then both timelines of each.

    ``machine`` says what the figures were measured on.
    """
    names = [name for name, _ in exhibits[0].facts]
    columns = [[value for _, value in exhibit.facts] for exhibit in exhibits]
    page = template("demo.html").render(
        title=title,
        machine=machine,
        exhibits=exhibits,
        facts=list(zip(names, zip(*columns, strict=True), strict=True)),
        figures=[(e, timeline(f"Activation memory during one call: {e.name}", e.curves, e.marks)) for e in exhibits],
    )
    path.write_text(page, encoding="utf-8")


def timeline(title: str, curves: Sequence[Curve], marks: Sequence[Mark] = ()) -> Markup:
    """All curves on one axis of bytes, against the progress of a call; curves without values are left out.

    ``title`` says what is drawn to those who cannot see it.
    """
    drawn = [curve for curve in curves if curve.values]
    most = max([KIB, *(max(curve.values) for curve in drawn), *(mark.value for mark in marks)])
    unit, name = unit_of(most)
    ticks = ticks_up_to(most / unit)
    top = ticks[-1] * unit
    figure = template("timeline.html").render(
        title=title,
        width=_WIDTH,
        height=_HEIGHT,
        unit=name,
        ticks=[(100 - 100 * tick / ticks[-1], _y(tick * unit, top), f"{tick:g} {name}") for tick in ticks],
        curves=[(curve, bytes_text(max(curve.values)), *_paths(curve.values, top)) for curve in drawn],
        marks=[(mark.label, bytes_text(mark.value), _y(mark.value, top)) for mark in marks],
    )
    return Markup(figure)


def bytes_text(value: int) -> str:
    """Bytes in the largest unit that leaves a digit in front of the point: ``21.7 MiB``, ``3.27 GiB``."""
    unit, name = unit_of(value)
    return f"{value / unit:.{2 if unit == GIB else 1}f} {name}"


def unit_of(value: int) -> tuple[int, str]:
    """The largest unit that leaves a digit in front of the point: its bytes and its name."""
    if value >= GIB:
        return GIB, "GiB"
    return (MIB, "MiB") if value >= MIB else (KIB, "KiB")


def ticks_up_to(most: float) -> list[float]:
    """Zero and at most five equal steps of 1, 2 or 5 times a power of ten; the last is the first not below ``most``."""
    sizes = [digit * 10.0**power for power in range(-1, 6) for digit in (1, 2, 5)]
    step = next(size for size in sizes if 5 * size >= most)
    return [step * count for count in range(math.ceil(most / step) + 1)]


def _y(value: float, top: float) -> float:
    return round(_HEIGHT * (1 - value / top), 1)


def _paths(values: Sequence[int], top: float) -> tuple[str, str]:
    """(outline, area) of a step curve across the whole width, as SVG path data; one maximum a column."""
    stride = -(-len(values) // _COLUMNS)
    heights = [_y(max(values[i : i + stride]), top) for i in range(0, len(values), stride)]
    width = _WIDTH / len(heights)
    steps = " ".join(f"V{height:g} H{(i + 1) * width:.1f}" for i, height in enumerate(heights))
    return f"M0 {heights[0]:g} {steps}", f"M0 {_HEIGHT} {steps} V{_HEIGHT} Z"


def template(name: str) -> jinja2.Template:
    """A page of ``templates/``; what is put in is text, never markup, and ``bytes`` is a filter."""
    loader = jinja2.PackageLoader("fmecompile", "templates")
    pages = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["bytes"] = bytes_text
    return pages.get_template(name)
