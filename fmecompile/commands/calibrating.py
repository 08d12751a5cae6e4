"""``fmecompile calibrate``: how far the values of a saved pipeline move from step to step."""

from __future__ import annotations

import inspect
import json as json_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fmecompile
from fmecompile import reuse
from fmecompile.commands.console import (
    FramesOption,
    HeightOption,
    HtmlOption,
    WidthOption,
    progress,
    refusals,
    require_writable,
    tell_written,
    told_console,
)
from fmecompile.errors import OptionError, near
from fmecompile.offline.calls import DTYPES
from fmecompile.reuse.policy import Policy

POLICIES = {
    name: kind for name in reuse.__all__ if isinstance(kind := getattr(reuse, name), type) and issubclass(kind, Policy)
}


def calibrate(
    folder: Annotated[Path, typer.Argument(help="A diffusion pipeline that save_pretrained wrote.")],
    out: Annotated[Path, typer.Option(help="Where the calibration goes: StepRehash(calibration=...) reads it.")] = Path(
        "calibration.json"
    ),
    html: HtmlOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Once or more: the mean over all is taken.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="For pipelines that animate one; once or more.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policies it is for; by default StepRehash.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of one generation.")] = 25,
    frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32; by default fp16 on a GPU, else fp32.")] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu; by default a GPU where there is one.")] = "",
    seed: Annotated[int, typer.Option(help="Of the first generation; each further one takes the next.")] = 0,
    argument: Annotated[
        list[str] | None, typer.Option(help="name=JSON, given to the pipeline's call; once or more.")
    ] = None,
) -> None:
    """Run a sampler on prompts or images, and write down how much each step changes: what policies are tuned by."""
    with refusals(), progress() as say:
        require_writable(out, html)
        policies = [_policy(name) for name in policy or ["StepRehash"]]
        say(f"loading {folder}")
        pipeline = _pipeline(folder, dtype, device)
        given = {"num_inference_steps": steps, "num_frames": frames, "height": height, "width": width}
        common = {name: value for name, value in given.items() if value is not None} | dict(
            map(_argument, argument or ())
        )
        runs = [
            common | varied | {"generator": torch.Generator("cpu").manual_seed(seed + k)}
            for k, varied in enumerate(_varied(prompt or [], image or []))
        ]
        _require_taken(pipeline, runs[0])
        say(f"running {len(runs)} generations of {steps} steps")
        found = fmecompile.calibrate(pipeline, runs, policies=policies)
    found.save(out)
    if html is not None:
        found.to_html(html)
    told_console(None).print(str(found), markup=False, highlight=False, soft_wrap=True)
    tell_written(out, html)


def _policy(name: str) -> type[Policy]:
    if name not in POLICIES:
        raise OptionError(
            f"there is no policy {name!r}", next_step=near(name, POLICIES, f"there are {', '.join(POLICIES)}")
        )
    return POLICIES[name]


def _pipeline(folder: Path, dtype: str, device: str) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not (folder / "model_index.json").is_file():
        raise OptionError(
            f"{str(folder)!r} is no diffusion pipeline", next_step="give a folder that save_pretrained wrote"
        )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = dtype or ("fp16" if place.startswith("cuda") else "fp32")
    if wanted.lower() not in DTYPES:
        raise OptionError(f"there is no type {wanted!r}", next_step=f"give one of {', '.join(DTYPES)}")
    try:
        return DiffusionPipeline.from_pretrained(folder).to(place, DTYPES[wanted.lower()])
    except Exception as error:  # whatever diffusers or the device raises
        raise OptionError(
            f"{str(folder)!r} cannot be loaded on {place}: {error}", next_step="load it with diffusers first, then here"
        ) from error


def _argument(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    try:
        return name.strip(), json_module.loads(value) if sign else None
    except json_module.JSONDecodeError as error:
        raise OptionError(f"--argument {text!r} is not name=JSON", next_step="quote texts: name='\"text\"'") from error


def _varied(prompts: list[str], images: list[Path]) -> list[dict[str, Any]]:
    """What differs between generations; one of them where there is neither."""
    loaded = [_image(path) for path in images]
    if prompts and loaded and len(prompts) != len(loaded):
        raise OptionError(
            f"{len(prompts)} prompts and {len(loaded)} images do not go together", next_step="give one image a prompt"
        )
    count = max(len(prompts), len(loaded), 1)
    return [
        ({"prompt": prompts[k]} if prompts else {}) | ({"image": loaded[k]} if loaded else {}) for k in range(count)
    ]


def _image(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise OptionError(f"{str(path)!r} is no image: {error}", next_step="give a PNG or JPEG file") from error


def _require_taken(pipeline: Any, run: dict[str, Any]) -> None:
    """Raises OptionError for an argument that the pipeline's call does not take, or one that it lacks."""
    signature = inspect.signature(type(pipeline).__call__)
    for name in run:
        if name not in signature.parameters:
            raise OptionError(
                f"{type(pipeline).__name__} takes no {name!r}",
                next_step=near(name, signature.parameters, "leave it out"),
            )
    for name in ("prompt", "image"):
        if name in signature.parameters and name not in run and "prompt_embeds" not in run:
            parameter = signature.parameters[name]
            if parameter.default is inspect.Parameter.empty or name == "prompt":
                raise OptionError(f"{type(pipeline).__name__} needs a {name}", next_step=f"give --{name}, once or more")
