"""The page of the demo: a table with a column a model, and both timelines of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fmecompile.report.drawing import Curve, Mark, template, timeline


@dataclass(frozen=True)
class Exhibit:
    """One model on the demo's page. ``facts`` are (name, value) texts; all exhibits of a page name the same ones."""

    name: str
    about: str
    facts: Sequence[tuple[str, str]]
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()


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
