"""What commands share: options, progress, refusals without tracebacks, and JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fmecompile.demo import Say
from fmecompile.errors import FmeError, OptionError
from fmecompile.offline.question import Request

BROKEN, REFUSED = 1, 2
"""Exit codes beside 0: a promise does not hold, or something wrong was found; an option was refused."""
STDOUT = Path("-")

ModelOption = Annotated[
    str | None, typer.Option("--model", help="svd, svd-xt, animatediff, animatediff-sdxl, or a diffusers folder.")
]
ClassOption = Annotated[str | None, typer.Option("--class", help="A diffusers model class, with --config.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="The config.json of a diffusers model.")]
FramesOption = Annotated[int | None, typer.Option("--frames", help="Frames of the clip; by default as many as usual.")]
HeightOption = Annotated[int | None, typer.Option("--height", help="In pixels.")]
WidthOption = Annotated[int | None, typer.Option("--width", help="In pixels.")]
GuidanceOption = Annotated[bool, typer.Option(help="Guidance doubles the denoiser's batch.")]
CallOption = Annotated[str, typer.Option("--call", help="denoise, decode or encode.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Where a self-contained page goes.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Where the figures go as JSON; - is the output.")]


def request(
    model: str | None,
    class_name: str | None,
    config: Path | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    dtype: str,
    guidance: bool,
) -> Request:
    """The options that say which model and which clip, of a command that has no others of a question."""
    return Request(
        model, class_name, config, frames, height, width, dtype, guidance, None, None, exact=False, processes=1,
        may_spill=False,
    )  # fmt: skip


@contextmanager
def refusals() -> Iterator[None]:
    """What is refused is told without a traceback, and the command exits with 2."""
    try:
        yield
    except FmeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(REFUSED) from error


def require_writable(*paths: Path | None) -> None:
    """Raises OptionError where a file cannot be written, before minutes of work."""
    for path in paths:
        if path is not None and path != STDOUT and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise OptionError(f"{str(path)!r} cannot be written", next_step="give a file in a folder that exists")


def wide_console() -> Console:
    """The output, for tables: as wide as the terminal, or as a table wants."""
    return Console(width=None if Console().is_terminal else 140)


def told_console(json_path: Path | None) -> Console:
    """The output for people; stderr where JSON goes to the output."""
    return Console(stderr=json_path == STDOUT, width=None if Console().is_terminal else 140)


def write_json(data: Any, path: Path | None) -> None:
    """Write ``data``, a JSON text or what becomes one; nothing without a path."""
    text = data if isinstance(data, str) else json.dumps(data, indent=1)
    if path == STDOUT:
        sys.stdout.write(text + "\n")
    elif path is not None:
        path.write_text(text + "\n", encoding="utf-8")


def tell_written(*paths: Path | None) -> None:
    """Name the files that were written."""
    for path in paths:
        if path is not None and path != STDOUT:
            typer.echo(f"written: {path}", err=True)


@contextmanager
def progress() -> Iterator[Say]:
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
