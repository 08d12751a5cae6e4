"""From what was typed to a question: every option is read here, and refused here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fmecompile.budget import parse_bytes
from fmecompile.errors import OptionError
from fmecompile.offline.answer import Question, at_size
from fmecompile.offline.calls import DTYPES
from fmecompile.offline.model import Model, class_model, folder_model, named_model
from fmecompile.offline.named import NAMED
from fmecompile.offline.sweep import Sweep


@dataclass(frozen=True)
class Request:
    """The options of ``fmecompile plan``, as typed."""

    model: str | None
    class_name: str | None
    config: Path | None
    frames: int | None
    height: int | None
    width: int | None
    dtype: str
    guidance: bool
    budget: str | None
    sweep: str | None
    exact: bool
    processes: int
    may_spill: bool


def question_of(request: Request) -> Question:
    """The question. Raises OptionError or TargetError at the first option that is not understood."""
    return Question(
        model=at_size(_model(request), request.frames, request.height, request.width),
        dtype=_dtype(request.dtype),
        guidance=request.guidance,
        budget_bytes=None if request.budget is None else parse_bytes(request.budget),
        sweep=None if request.sweep is None else Sweep.parse(request.sweep),
        exact=request.exact,
        processes=request.processes,
        may_spill=request.may_spill,
    )


def _model(request: Request) -> Model:
    if (request.model is None) == (request.config is None) or (request.class_name and request.config is None):
        raise OptionError(
            "give either --model, or --config with --class",
            next_step=f"there are --model {', '.join(NAMED)}, --model FOLDER, and --class CLASS --config FILE",
        )
    if request.config is not None:
        return class_model(request.class_name, request.config)
    assert request.model is not None
    if request.model in NAMED:
        return named_model(request.model)
    is_path = Path(request.model).exists() or "/" in request.model or "\\" in request.model
    return folder_model(Path(request.model)) if is_path else named_model(request.model)


def _dtype(name: str) -> torch.dtype:
    if name.lower() not in DTYPES:
        raise OptionError(f"there is no type {name!r}", next_step=f"give one of {', '.join(DTYPES)}")
    return DTYPES[name.lower()]
