"""The report as a self-contained page: bars against the budget, tables, and the sweep as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fmecompile.offline import wording
from fmecompile.offline.answer import Answer, CallRow
from fmecompile.report import template, ticks_up_to, unit_of

_WIDTH, _HEIGHT = 1000, 400
_STYLES = {"eager": "eager", "planned": "ours"}


@dataclass(frozen=True)
class Bar:
    """What lies on the device at the peak of a call: weights and inputs, then activations, in % of the axis."""

    label: str
    style: str
    base: float
    activations: float
    total_bytes: int


def write_answer(answer: Answer, path: Path) -> None:
    """Write the page of one answer."""
    page = template("offline.html").render(
        title=wording.headline(answer),
        answer=answer,
        wording=wording,
        conclusion=wording.conclusion(answer),
        figures=[(name, bars(answer, residence)) for residence, name in wording.RESIDENCES.items()],
        sweep=sweep_figure(answer) if answer.sweep else "",
    )
    path.write_text(page, encoding="utf-8")


def bars(answer: Answer, residence: str) -> Markup:
    """Two bars a call, eager and optimized, on an axis that all figures of the page share, and the budget across."""
    most = max(answer.needed_bytes(place, "eager") for place in wording.RESIDENCES)
    top, ticks = _axis(max(most, answer.budget_bytes or 0))
    drawn = [(call, [_bar(call, residence, column, top) for column in _STYLES]) for call in answer.calls]
    budget = None if answer.budget_bytes is None else 100 * answer.budget_bytes / top
    figure = template("bars.html").render(answer=answer, drawn=drawn, ticks=ticks, budget=budget)
    return Markup(figure)


def _bar(call: CallRow, residence: str, column: str, top: int) -> Bar:
    total, activations = call.total_bytes[residence][column], call.activation_bytes[column]
    return Bar(
        wording.COLUMNS[column], _STYLES[column], 100 * (total - activations) / top, 100 * activations / top, total
    )


def sweep_figure(answer: Answer) -> Markup:
    """What the pipeline needs with everything resident, over the swept values; dots are sizes that were planned."""
    values = [row.value for row in answer.sweep]
    totals = {column: [row.total_bytes["resident"][column] for row in answer.sweep] for column in _STYLES}
    top, ticks = _axis(max(*totals["eager"], answer.budget_bytes or 0))
    across = [_WIDTH * (value - values[0]) / max(values[-1] - values[0], 1) for value in values]
    dots = [row.is_planned for row in answer.sweep]
    curves = [_curve(column, across, totals[column], dots, top) for column in _STYLES]
    budget = None if answer.budget_bytes is None else _y(answer.budget_bytes, top)
    figure = template("sweep.html").render(
        answer=answer,
        width=_WIDTH,
        height=_HEIGHT,
        ticks=[(share, _HEIGHT * share / 100, text) for share, text in ((100 - s, t) for s, t in ticks)],
        curves=curves,
        budget=budget,
        ends=(values[0], values[-1]),
    )
    return Markup(figure)


def _curve(
    column: str, across: Sequence[float], totals: Sequence[int], dots: Sequence[bool], top: int
) -> tuple[str, str, str, list[tuple[float, float]]]:
    """(label, style, path, dots); a dot is (x, y) in % of the drawing."""
    points = [(x, _y(total, top)) for x, total in zip(across, totals, strict=True)]
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    shown = [(100 * x / _WIDTH, 100 * y / _HEIGHT) for (x, y), dot in zip(points, dots, strict=True) if dot]
    return wording.COLUMNS[column], _STYLES[column], path, shown


def _y(value: int, top: int) -> float:
    return round(_HEIGHT * (1 - value / top), 1)


def _axis(most: int) -> tuple[int, list[tuple[float, str]]]:
    """The end of an axis of bytes, and its ticks: (% from its start, text)."""
    unit, name = unit_of(most)
    ticks = ticks_up_to(most / unit)
    return round(ticks[-1] * unit), [(100 * tick / ticks[-1], f"{tick:g} {name}") for tick in ticks]
