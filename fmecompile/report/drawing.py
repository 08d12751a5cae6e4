"""What pages are drawn with: templates, bytes in words, axes, and memory timelines as inline SVG.

The drawing of a timeline stretches with the page while its labels stay text of the page, so they read at any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

KIB, MIB, GIB = 2**10, 2**20, 2**30
_WIDTH, _HEIGHT, _COLUMNS = 1000, 400, 800
HUES = 8
"""Colours of modules and of parts of a peak, ``h0`` and on in the style sheet."""


@dataclass(frozen=True)
class Curve:
    """Bytes held over the course of a call. ``style`` is the CSS class that colours it: ``eager`` or ``ours``.
    ``bands`` tell which module entries are of: its path, and the place of its first."""

    label: str
    style: str
    values: Sequence[int]
    bands: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Segment:
    """A run of operators of one module below a timeline: from where to where in % of the call, and its colour."""

    module: str
    start: float
    width: float
    hue: int


@dataclass(frozen=True)
class Mark:
    """A dashed line across the timeline at ``value`` bytes."""

    label: str
    value: int


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
        strips=[(curve, segments) for curve, segments in zip(drawn, _strips(drawn), strict=True) if segments],
    )
    return Markup(figure)


def _strips(curves: Sequence[Curve]) -> list[list[Segment]]:
    """The bands of each curve; a module has one colour in all of them."""
    hues: dict[str, int] = {}
    for curve in curves:
        for module, _ in curve.bands:
            hues.setdefault(module, len(hues) % HUES)
    return [[*_segments(curve, hues)] for curve in curves]


def _segments(curve: Curve, hues: dict[str, int]) -> Iterator[Segment]:
    starts = [start for _, start in curve.bands]
    percent = 100 / len(curve.values)
    for (module, start), end in zip(curve.bands, [*starts[1:], len(curve.values)], strict=False):
        if module and end > start:
            yield Segment(module, percent * start, percent * (end - start), hues[module])


def bytes_text(value: int) -> str:
    """Bytes in the largest unit that leaves a digit in front of the point: ``21.7 MiB``, ``3.27 GiB``."""
    unit, name = unit_of(value)
    return f"{value / unit:.{2 if unit == GIB else 1}f} {name}"


def seconds_text(seconds: float, *, signed: bool = False) -> str:
    """Seconds from 1 on, milliseconds below: ``1.52 s``, ``+3.10 ms``."""
    sign = "+" if signed else ""
    return f"{seconds:{sign}.2f} s" if abs(seconds) >= 1 else f"{1e3 * seconds:{sign}.2f} ms"


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
    pages.filters["bytes"], pages.filters["seconds"] = bytes_text, seconds_text
    return pages.get_template(name)
