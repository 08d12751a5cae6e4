"""The command line: ``fmecompile demo`` and ``fmecompile plan``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fmecompile.demo import DemoRow, Say, run_demo
from fmecompile.errors import FmeError
from fmecompile.offline.answer import Answer, answer
from fmecompile.offline.page import write_answer
from fmecompile.offline.question import Request, question_of, require_writable
from fmecompile.offline.terminal import tables
from fmecompile.pipeline import package_version

app = typer.Typer(help="Video diffusion in a fraction of the activation memory.", no_args_is_help=True)
MIB = 2**20
PROCESSES = min(os.cpu_count() or 1, 4)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fmecompile {package_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Video diffusion in a fraction of the activation memory."""


@app.command()
def demo(
    html: Annotated[Path, typer.Option(help="Where the page with both memory timelines goes.")] = Path("demo.html"),
    json: Annotated[Path | None, typer.Option(help="Where the figures go as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small models of the same classes: a minute at most.")] = False,
) -> None:
    """Run real video UNets eager and optimized on this machine's CPU; compare memory, time and output.

    Takes minutes and 15 GB of memory. Exits with 1 when a promise does not hold: measured <= projected <= 1.02
    measured, the optimized output at most 1.5 times as far from float64 as eager's, the wrapper below 1 % of a call.
    """
    with _progress() as say:
        rows, broken = run_demo(quick, html, json, say)
    Console(width=None if Console().is_terminal else 120).print(_table(rows))
    typer.echo(f"page: {html}" + (f", figures: {json}" if json else ""))
    for text in broken:
        typer.echo(f"broken promise: {text}", err=True)
    if broken:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Option(help="svd, svd-xt, animatediff, animatediff-sdxl, or the path of a diffusers folder.")
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="A diffusers model class, with --config.")] = None,
    config: Annotated[Path | None, typer.Option(help="The config.json of a diffusers model.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip; by default as many as usual.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    guidance: Annotated[bool, typer.Option(help="Guidance doubles the denoiser's batch.")] = True,
    budget: Annotated[str | None, typer.Option(help="What the device has, such as 8GiB: says what fits.")] = None,
    sweep: Annotated[str | None, typer.Option(help="frames=8:64, size=256:1024:128, height=... or width=...")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Plan every size of the sweep; estimate none.")] = False,
    html: Annotated[Path | None, typer.Option(help="Where a self-contained page goes.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where the figures go as JSON.")] = None,
    spill: Annotated[bool, typer.Option(help="Let values wait in host memory where nothing else fits.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that plan at the same time.")] = PROCESSES,
) -> None:
    """Tell what a diffusion pipeline needs and what fits a budget: no weights, no GPU, no downloads."""
    request = Request(
        model, class_name, config, frames, height, width, dtype, guidance, budget, sweep, exact, jobs, spill
    )
    try:
        require_writable(html, json)
        question = question_of(request)
        with _progress() as say:
            found = answer(question, say)
    except FmeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    _show(found, html, json)


def _show(found: Answer, html: Path | None, json: Path | None) -> None:
    """Print the tables and write the files that were asked for."""
    console = Console(width=None if Console().is_terminal else 140)
    for part in tables(found):
        console.print(part)
    if json is not None:
        found.save(json)
    if html is not None:
        write_answer(found, html)
    for path in (path for path in (html, json) if path is not None):
        typer.echo(f"written: {path}")


@contextmanager
def _progress() -> Iterator[Say]:
    """One live line on a terminal, plain lines elsewhere; both on stderr."""
    console = Console(stderr=True)
    start = time.perf_counter()

    def plain(text: str, *, live: bool = True) -> None:
        console.print(f"[{time.perf_counter() - start:4.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield plain
        return
    with console.status("starting") as status:

        def follow(text: str, *, live: bool = True) -> None:
            status.stop()
            plain(text)
            if live:
                status.update(text)
                status.start()

        yield follow


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


def main() -> None:
    """The console script."""
    app()
