"""``fmecompile bisect``: the first stage of the compiler that is wrong, on a call of a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import fmecompile
from fmecompile.commands.console import (
    BROKEN,
    CallOption,
    ClassOption,
    ConfigOption,
    FramesOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    ModelOption,
    WidthOption,
    progress,
    refusals,
    request,
    require_writable,
    tell_written,
    told_console,
    write_json,
)
from fmecompile.commands.one_call import call_of, real


def bisect(
    model: ModelOption = None,
    class_name: ClassOption = None,
    config: ConfigOption = None,
    call: CallOption = "denoise",
    frames: FramesOption = 2,
    height: HeightOption = 128,
    width: WidthOption = 128,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    guidance: GuidanceOption = True,
    seed: Annotated[int, typer.Option(help="Of the inputs, and of weights that a folder does not have.")] = 0,
    tolerance: Annotated[float | None, typer.Option(help="Relative to the largest value of the output.")] = None,
    json: JsonOption = None,
) -> None:
    """Run every stage of the compiler on one call beside eager; name the first pass and call that is wrong.

    Runs on the CPU, on random inputs. Exits with 1 when a stage leaves the tolerance, or its projection of memory.
    """
    asked = request(model, class_name, config, frames, height, width, dtype, guidance)
    with refusals(), progress() as say:
        require_writable(json)
        wanted = call_of(asked, call)
        say(f"building {wanted.name}, {wanted.size}")
        found = real(wanted, Path(model) if model else None, seed)
        say("running every stage")
        args, kwargs = found.inputs
        verdict = fmecompile.bisect(found.module, *args, tolerance=tolerance, **kwargs)
    told_console(json).print(str(verdict), markup=False, highlight=False, soft_wrap=True)
    write_json(asdict(verdict) | {"is_clean": verdict.is_clean}, json)
    tell_written(json)
    if not verdict.is_clean:
        raise typer.Exit(BROKEN)
