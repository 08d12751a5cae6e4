"""The words of the report, shared by the terminal and the page."""

from __future__ import annotations

from fmecompile.offline.answer import Answer, SweepRow
from fmecompile.offline.largest import Largest
from fmecompile.offline.model import Size
from fmecompile.report import bytes_text

VERDICTS = {
    "eager": "fits as it is",
    "planned": "fits optimized",
    "floor": "fits at the floor",
    "none": "does not fit",
}
RESIDENCES = {"resident": "everything resident", "offload": "model CPU offload"}
COLUMNS = {"eager": "eager", "planned": "optimized", "floor": "floor"}


def headline(answer: Answer) -> str:
    """The question in a line: model, clip, type."""
    guided = "guidance batch 2" if answer.guidance else "no guidance"
    return f"{answer.model}: {answer.size}, {answer.dtype}, {guided}"


def conclusion(answer: Answer) -> list[str]:
    """One sentence a residence: whether the whole pipeline fits the budget, and what it needs."""
    lines = []
    for residence, name in RESIDENCES.items():
        needs = {column: answer.needed_bytes(residence, column) for column in COLUMNS}
        figures = ", ".join(f"{bytes_text(needs[column])} {word}" for column, word in COLUMNS.items())
        if answer.budget_bytes is None:
            lines.append(f"{name}: needs {figures}")
        else:
            verdict = VERDICTS[answer.verdict(needs)]
            lines.append(f"{name}: {verdict} in {bytes_text(answer.budget_bytes)} (needs {figures})")
    return lines


def limit_text(found: Largest) -> str:
    """The largest clip of one search, with ``~`` where it is an estimate."""
    if found.size is None:
        return "none"
    text = _size(found.axis, found.size)
    return ("" if found.is_tried else "~") + text + (" (the most there can be)" if found.is_end else "")


def eager_limit_text(found: Largest) -> str:
    """The same without fmecompile; always an estimate."""
    return "none" if found.eager_size is None else f"~{_size(found.axis, found.eager_size)}"


def row_text(answer: Answer, row: SweepRow) -> str:
    """The swept value; ``~`` marks a row of estimates."""
    value = f"{row.size.height}x{row.size.width}" if answer.sweep_axis != "frames" else str(row.value)
    return value if row.is_planned else f"~{value}"


def _size(axis: str, size: Size) -> str:
    plural = "s" if size.frames != 1 else ""
    return f"{size.frames} frame{plural}" if axis == "frames" else f"{size.height}x{size.width}"
