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
    "spill": "fits",
    "none": "does not fit",
}
RESIDENCES = {"resident": "everything resident", "offload": "model CPU offload"}
COLUMNS = {"eager": "eager", "planned": "optimized", "floor": "floor"}
SPILL = "with spill"


def headline(answer: Answer) -> str:
    """The question in a line: model, clip, type."""
    guided = "guidance batch 2" if answer.guidance else "no guidance"
    return f"{answer.model}: {answer.size}, {answer.dtype}, {guided}"


def conclusion(answer: Answer) -> list[str]:
    """One sentence a residence: whether the whole pipeline fits the budget, and what it needs."""
    return [_concluded(answer, residence, name) for residence, name in RESIDENCES.items()]


def _concluded(answer: Answer, residence: str, name: str) -> str:
    needs = [f"{bytes_text(answer.needed_bytes(residence, column))} {word}" for column, word in COLUMNS.items()]
    if answer.budget_bytes is None:
        return f"{name}: needs {', '.join(needs)}"
    verdict, spilled = answer.verdict(residence), answer.spilled_bytes(residence)
    said = f"{VERDICTS[verdict]} in {bytes_text(answer.budget_bytes)}"
    if spilled is not None:
        device_bytes, host_bytes = spilled
        needs.append(f"{bytes_text(device_bytes)} {SPILL}")
        if verdict == "spill":
            said += f" with {bytes_text(host_bytes)} of values waiting in host memory"
    return f"{name}: {said} (needs {', '.join(needs)})"


def weights_text(found: Largest) -> str:
    """Where the weights are, and whether values may leave the device."""
    return RESIDENCES[found.residence] + (f", {SPILL}" if found.may_spill else "")


def limit_text(found: Largest) -> str:
    """The largest clip of one search, with ``~`` where it is an estimate; what fits with spill, no larger one tried."""
    if found.size is None:
        return "none"
    text = ("at least " if found.may_spill and found.is_tried else "") + _size(found.axis, found.size)
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
