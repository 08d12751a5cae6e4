"""``fmecompile plan``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fmecompile.commands.console import (
    ClassOption,
    ConfigOption,
    FramesOption,
    GuidanceOption,
    HeightOption,
    HtmlOption,
    JsonOption,
    ModelOption,
    WidthOption,
    progress,
    refusals,
    require_writable,
    tell_written,
    told_console,
    write_json,
)
from fmecompile.offline.answer import Answer, answer
from fmecompile.offline.page import write_answer
from fmecompile.offline.question import Request, question_of
from fmecompile.offline.terminal import tables

PROCESSES = min(os.cpu_count() or 1, 4)


def plan(
    model: ModelOption = None,
    class_name: ClassOption = None,
    config: ConfigOption = None,
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    guidance: GuidanceOption = True,
    budget: Annotated[str | None, typer.Option(help="What the device has, such as 8GiB: says what fits.")] = None,
    sweep: Annotated[str | None, typer.Option(help="frames=8:64, size=256:1024:128, height=... or width=...")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Plan every size of the sweep; estimate none.")] = False,
    html: HtmlOption = None,
    json: JsonOption = None,
    spill: Annotated[bool, typer.Option(help="Let values wait in host memory where nothing else fits.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that plan at the same time.")] = PROCESSES,
) -> None:
    """Tell what a diffusion pipeline needs and what fits a budget: no weights, no GPU, no downloads."""
    asked = Request(
        model, class_name, config, frames, height, width, dtype, guidance, budget, sweep, exact, jobs, spill
    )
    with refusals():
        require_writable(html, json)
        question = question_of(asked)
        with progress() as say:
            found = answer(question, say)
    _show(found, html, json)


def _show(found: Answer, html: Path | None, json: Path | None) -> None:
    """Print the tables and write the files that were asked for."""
    for part in tables(found):
        told_console(json).print(part)
    write_json(found.to_json(), json)
    if html is not None:
        write_answer(found, html)
    tell_written(html, json)
