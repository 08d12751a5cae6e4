"""An explanation on a terminal: tables as wide as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fmecompile.explain.sheets import others_of
from fmecompile.graph.plan import Plan
from fmecompile.pipeline import Record
from fmecompile.report import bytes_text
from fmecompile.report.drawing import seconds_text
from fmecompile.report.peak import Part, parts_of

BLOCKS = " ▁▂▃▄▅▆▇█"
NARROW = 100
"""Below so many columns, tables leave out what explains their numbers."""


def rendered(record: Record, width: int) -> Iterator[RenderableType]:
    """One compiled signature, part by part."""
    yield from rendered_plan(record.plan, width, others_of(record))
    for said in (record.reuse, record.graphs, record.allowance):
        if said is not None:
            yield Text(str(said))
    for name, note in record.notes:
        yield Text(f"{name}: {note}", style="dim")


def rendered_plan(plan: Plan, width: int, others: Sequence[Part] = ()) -> Iterator[RenderableType]:
    """A plan, part by part; ``others`` is what is held beside it."""
    yield Text(f"inputs {plan.key.signature}", style="dim")
    yield _headline(plan)
    yield Padding(_spark(plan, max(min(width, 120) - 2, 10)), (0, 1))
    yield _peak(plan, others, width)
    if plan.groups:
        yield _groups(plan, width)
    if plan.barriers:
        yield _barriers(plan)


def _headline(plan: Plan) -> Text:
    eager = f"{bytes_text(plan.eager_peak_bytes)} eager, " if plan.eager_peak_bytes else ""
    text = Text(f"activations: {eager}")
    text.append(f"{bytes_text(plan.projected_peak_bytes)} projected", style="bold")
    text.append(f" ({bytes_text(plan.allowed_bytes)} allowed, floor {bytes_text(plan.floor_bytes)}); ")
    text.append(f"{len(plan.groups)} groups, {plan.trips} chunk trips; eager {seconds_text(plan.eager_s)}, ")
    text.append(f"run whole {seconds_text(plan.whole_s)}, loops {seconds_text(plan.extra_s, signed=True)} (projected)")
    return text


def _spark(plan: Plan, columns: int) -> Text:
    """The timeline as a line of blocks, the highest being the peak."""
    held = plan.timeline
    if not held:
        return Text("")
    edges = [k * len(held) // columns for k in range(columns + 1)]
    tops = [max(held[a : max(b, a + 1)]) for a, b in pairwise(edges) if a < len(held)]
    most = max(*tops, 1)
    return Text("".join(BLOCKS[-(-value * (len(BLOCKS) - 1) // most)] for value in tops), style="blue")


def _table(title: str, *columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for place, name in enumerate(columns):
        is_number = place in right
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    return table


def _peak(plan: Plan, others: Sequence[Part], width: int) -> Table:
    told = ("what could be done",) if width >= NARROW else ()
    table = _table("What the peak is made of", "part", "held", *told, right=(1,))
    for part in parts_of(plan, others):
        table.add_row(Text(part.name), bytes_text(part.nbytes), *(Text(part.advice) for _ in told))
    return table


def _groups(plan: Plan, width: int) -> Table:
    is_wide = width >= NARROW
    told = ("held whole", "time", "operators", "why") if is_wide else ()
    table = _table("Groups", "modules", "size/chunk", "trips", "in chunks", *told, right=(1, 2, 3, 4, 5, 6))
    for group in plan.groups:
        nest = " x ".join(f"{axis.size}/{axis.chunk}" for axis in group.axes)
        whole, time = bytes_text(group.whole_bytes), seconds_text(group.whole_s + group.extra_s)
        table.add_row(
            Text(", ".join(group.modules) or f"{group.first} ... {group.last}"),
            nest,
            f"{group.trips}" + (f", {group.slots} at once" if group.slots > 1 else ""),
            bytes_text(group.peak_bytes),
            *((whole, time, str(len(group.operators)), Text(group.because)) if is_wide else ()),
        )
    return table


def _barriers(plan: Plan) -> Table:
    table = _table("Barriers", "operator", "count", "reason", "for example at", right=(1,))
    for barrier in plan.barriers:
        table.add_row(Text(barrier.operator), str(barrier.count), Text(barrier.reason), Text(barrier.where))
    return table
