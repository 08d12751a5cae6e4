"""The report as tables of a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fmecompile.offline import wording
from fmecompile.offline.answer import Answer, CallRow
from fmecompile.report import GIB, bytes_text, unit_of


def tables(answer: Answer) -> Iterator[RenderableType]:
    """What to print, from top to bottom. All byte columns are in one unit."""
    yield Text(wording.headline(answer), style="bold")
    yield _calls(answer)
    yield _components(answer)
    if answer.largest:
        yield _largest(answer)
    if answer.sweep:
        yield _sweep(answer)
    yield from (Text(line) for line in (*wording.conclusion(answer), *answer.notes))


def _table(title: str, first: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True, vertical="bottom")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold", vertical="bottom")
    return table


def _calls(answer: Answer) -> Table:
    """Activations of each call, then everything on the device while it runs; with values in host memory where that was
    asked for.
    """
    places = {residence: any(residence in call.spill for call in answer.calls) for residence in wording.RESIDENCES}
    ways = [
        f"{place}\n{word}"
        for place, is_asked in places.items()
        for word in (*wording.COLUMNS.values(), *([wording.SPILL] if is_asked else []))
    ]
    table = _table(
        f"{_unit(answer)[1]}: activations, then everything on the device",
        "call",
        "inputs",
        *wording.COLUMNS.values(),
        *ways,
    )
    for call in answer.calls:
        activations = [amount(answer, call.activation_bytes[column]) for column in wording.COLUMNS]
        totals = [
            "-" if size is None else _judged(answer, size)
            for residence, is_asked in places.items()
            for size in _totals(call, residence, is_asked)
        ]
        table.add_row(call.name, amount(answer, call.input_bytes), *activations, *totals)
    return table


def _totals(call: CallRow, residence: str, has_spill: bool) -> list[int | None]:
    spill = call.spill.get(residence)
    found: list[int | None] = [call.total_bytes[residence][column] for column in wording.COLUMNS]
    return [*found, None if spill is None else spill.total_bytes] if has_spill else found


def _components(answer: Answer) -> Table:
    table = _table("Weights", "component", _unit(answer)[1], "class")
    for row in answer.components:
        table.add_row(
            row.name, "unknown" if row.weight_bytes is None else amount(answer, row.weight_bytes), row.class_name
        )
    return table


def _largest(answer: Answer) -> Table:
    assert answer.budget_bytes is not None
    title = f"The largest clip in {bytes_text(answer.budget_bytes)} (~ is an estimate; others were planned)"
    table = _table(title, "weights", "what grows", "optimized", "decided by", "eager")
    for found in answer.largest:
        table.add_row(
            wording.weights_text(found),
            "frames" if found.axis == "frames" else "height x width",
            wording.limit_text(found),
            found.bottleneck,
            wording.eager_limit_text(found),
        )
    return table


def _sweep(answer: Answer) -> Table:
    """Optimized activations of each call, and what the whole pipeline needs."""
    calls = [f"{call.name}\noptimized" for call in answer.calls]
    ways = [f"{place}\n{word}" for place in ("resident", "offload") for word in wording.COLUMNS.values()]
    table = _table(
        f"Sweep, {_unit(answer)[1]} (~ is an estimate between sizes that were planned)",
        answer.sweep_axis,
        *calls,
        *ways,
    )
    for row in answer.sweep:
        totals = [
            _judged(answer, row.total_bytes[residence][column])
            for residence in wording.RESIDENCES
            for column in wording.COLUMNS
        ]
        table.add_row(
            wording.row_text(answer, row), *(amount(answer, row.planned_bytes[c.name]) for c in answer.calls), *totals
        )
    return table


def _judged(answer: Answer, total_bytes: int) -> Text:
    """A total in green or red, by the budget."""
    if answer.budget_bytes is None:
        return Text(amount(answer, total_bytes))
    return Text(amount(answer, total_bytes), style="green" if total_bytes <= answer.budget_bytes else "red")


def amount(answer: Answer, value: int) -> str:
    """``value`` bytes in the unit of the report: two digits after the point for GiB, else one."""
    unit, _ = _unit(answer)
    return f"{value / unit:.{2 if unit == GIB else 1}f}"


def _unit(answer: Answer) -> tuple[int, str]:
    """The unit that suits the greatest total."""
    return unit_of(answer.needed_bytes("resident", "eager"))
