"""``fmecompile demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from fmecompile.commands.console import (
    BROKEN,
    JsonOption,
    progress,
    refusals,
    require_writable,
    tell_written,
    told_console,
    write_json,
)
from fmecompile.demo import DemoRow, run_demo

MIB = 2**20


def demo(
    html: Annotated[Path, typer.Option(help="Where the page with both memory timelines goes.")] = Path("demo.html"),
    json: JsonOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small models of the same classes: a minute at most.")] = False,
) -> None:
    """Run real video UNets eager and optimized on this machine's CPU; compare memory, time and output.

    Takes minutes and 15 GB of memory. Exits with 1 when a promise does not hold: measured <= projected <= 1.02
    measured, the optimized output at most 1.5 times as far from float64 as eager's, the wrapper below 1 % of a call.
    """
    with refusals():
        require_writable(html, json)
    with progress() as say:
        found = run_demo(quick, html, say)
    told_console(json).print(_table(found.rows))
    write_json(found.to_json(), json)
    tell_written(html, json)
    for text in found.broken:
        typer.echo(f"broken promise: {text}", err=True)
    if found.broken:
        raise typer.Exit(BROKEN)


def _table(rows: Sequence[DemoRow]) -> Table:
    table = Table(
        title="Activation memory of one denoising call", box=box.SIMPLE_HEAD, padding=0, caption_justify="left"
    )
    table.caption = (
        "MiB of activations; weights and inputs are apart. memory: eager over measured. time: optimized over eager.\n"
        "error: relative L2 norm against float64. wrapper: its part of a call. float32 on CPU, seeded weights."
    )
    table.add_column("\nmodel", no_wrap=True)
    heads = ("eager\nMiB", "projected\nMiB", "measured\nMiB", "memory\nratio", "time\nratio")
    for head in (*heads, "error\neager", "error\noptimized", "\ngroups", "\ntrips", "compile\ns", "wrapper\n%"):
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            row.model,
            *(f"{size / MIB:.1f}" for size in (row.eager_bytes, row.projected_bytes, row.measured_bytes)),
            f"{row.memory_ratio:.2f}",
            f"{row.time_ratio:.2f}",
            f"{row.eager_error:.1e}",
            f"{row.optimized_error:.1e}",
            str(row.groups),
            str(row.trips),
            f"{row.compile_s:.1f}",
            f"{100 * row.overhead_share:.3f}",
        )
    return table
