"""``fmecompile explain``: the plan of one call, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fmecompile
from fmecompile.commands.console import (
    CallOption,
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
    request,
    require_writable,
    tell_written,
    told_console,
    write_json,
)
from fmecompile.commands.one_call import call_of, fake
from fmecompile.errors import OptionError
from fmecompile.explain.terminal import rendered_plan
from fmecompile.graph.plan import Plan


def explain(
    saved: Annotated[Path | None, typer.Argument(metavar="[PLAN.json]", help="A plan that was saved.")] = None,
    model: ModelOption = None,
    class_name: ClassOption = None,
    config: ConfigOption = None,
    call: CallOption = "denoise",
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    guidance: GuidanceOption = True,
    budget: Annotated[str | None, typer.Option(help="Of weights, inputs and activations, such as 8GiB.")] = None,
    html: HtmlOption = None,
    json: JsonOption = None,
) -> None:
    """Show which loops one call of a model becomes, why, and what cannot be sliced: from its configuration alone.

    The JSON is the plan itself: optimize(module, plan=fmecompile.Plan.load("plan.json")) skips the search.
    """
    with refusals():
        require_writable(html, json)
        if saved is not None:
            plan = _loaded(saved)
        else:
            asked = request(model, class_name, config, frames, height, width, dtype, guidance)
            with progress() as say:
                found = fake(call_of(asked, call))
                say(f"planning {found.name}")
                args, kwargs = found.inputs
                plan = fmecompile.plan(found.module, *args, memory_budget=budget, **kwargs)
    console = told_console(json)
    for part in rendered_plan(plan, console.width):
        console.print(part)
    if html is not None:
        plan.to_html(html)
    write_json(plan.to_json(), json)
    tell_written(html, json)


def _loaded(path: Path) -> Plan:
    try:
        return Plan.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{str(path)!r} cannot be read: {error}", next_step="give a file that plan.save wrote"
        ) from error
