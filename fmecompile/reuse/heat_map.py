"""The page of a calibration: how much the values of any two steps are alike, one map a cut."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from fmecompile.report import bytes_text, template
from fmecompile.reuse.calibration import Calibration, CutRecord, Matrix, Row

CELL = 10
"""Height and width of a cell, in units of the drawing."""

FAINTEST = 0.04
"""Opacity of the least similarity."""


@dataclass(frozen=True)
class Cell:
    """One pair of steps: its place, how much colour it has from 0 to 1, and what it says."""

    x: int
    y: int
    opacity: float
    text: str


def page_of(calibration: Calibration) -> str:
    """The page as HTML, with nothing to load."""
    key = calibration.key
    clip = " × ".join(map(str, key.shape))
    about = f"{key.model} ({key.config}), {key.sampler or 'sampler not known'}, {key.steps} steps, {clip}, {key.dtype}"
    exhibits = [
        (name, _facts(record), heat_map(f"Similarity of {name} between steps", record.trace.similarity), _steps(record))
        for name, record in zip(calibration.cuts, calibration.records, strict=True)
    ]
    return template("calibration.html").render(title="Calibration", about=about, exhibits=exhibits)


def _facts(record: CutRecord) -> list[tuple[str, str]]:
    exact = f"± {record.similarity_error:.2%} of the distance from 1" if record.sketch_entries else "exact"
    return [
        ("Kept between steps", bytes_text(record.nbytes) if record.nbytes else "nothing"),
        ("Work saved by a step", f"{record.saved:.1%}"),
        ("Branches", str(len(record.branches))),
        ("Similarities", exact),
    ]


def _steps(record: CutRecord) -> list[tuple[int, list[str]]]:
    """A row for each step: similarity to the one before, changes to later ones, ratio of magnitudes."""
    trace = record.trace
    before = ["", *(f"{row[i]:.4f}" for i, row in enumerate(trace.similarity[1:]))]
    return [
        (i, [before[i], *(_at(row, i) for row in trace.errors), f"{trace.ratios[i]:.4f}"])
        for i in range(len(trace.moved))
    ]


def _at(row: Row, place: int) -> str:
    return f"{row[place]:.4f}" if place < len(row) else ""


def heat_map(title: str, matrix: Matrix) -> Markup:
    """A square of cells, one a pair of steps, in full colour where they are alike. The scale ends at the least value.

    ``title`` says what is drawn to those who cannot see it.
    """
    least = min(map(min, matrix))
    spread = (1 - least) or 1.0
    cells = [
        Cell(j * CELL, i * CELL, _opacity((value - least) / spread), f"steps {i} and {j}: {value:.4f}")
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
    ]
    size = len(matrix) * CELL
    last = len(matrix) - 1
    return Markup(
        template("heat_map.html").render(
            title=title, cells=cells, size=size, cell=CELL, last=last, least=f"{least:.4f}", faintest=FAINTEST
        )
    )


def _opacity(share: float) -> float:
    return round(FAINTEST + (1 - FAINTEST) * share, 3)
