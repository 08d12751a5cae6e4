"""The command line: ``fmecompile demo | plan | explain | bench | calibrate | bisect | doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from fmecompile.commands.benching import bench
from fmecompile.commands.bisecting import bisect
from fmecompile.commands.calibrating import calibrate
from fmecompile.commands.demonstrate import demo
from fmecompile.commands.examining import doctor
from fmecompile.commands.explaining import explain
from fmecompile.commands.planning import plan
from fmecompile.pipeline import package_version

CODES = "Exits with 0, with 1 where a promise does not hold or something wrong was found, with 2 where it refuses."

app = typer.Typer(
    help="Video diffusion in a fraction of the activation memory.",
    epilog=CODES,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (demo, plan, explain, calibrate, bisect, doctor):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fmecompile {package_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Video diffusion in a fraction of the activation memory."""


def main() -> None:
    """The console script."""
    app()
