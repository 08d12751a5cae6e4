"""One call of one component of a diffusion pipeline, on fake tensors or for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.errors import OptionError, TargetError
from fmecompile.offline.calls import Call, Inputs, calls_of, check_size
from fmecompile.offline.model import require_diffusers_class
from fmecompile.offline.question import Request, question_of


@dataclass(frozen=True)
class OneCall:
    """What is called, and with what."""

    name: str
    module: nn.Module
    inputs: Inputs


def call_of(request: Request, kind: str) -> Call:
    """Raises OptionError where the model has no call of this kind, or there is no clip of this size."""
    question = question_of(request)
    calls = calls_of(question.model, question.dtype, question.guidance)
    check_size(question.model, question.model.size, calls[0].scale)
    found = next((call for call in calls if call.kind == kind), None)
    if found is None:
        kinds = ", ".join(dict.fromkeys(call.kind for call in calls))
        raise OptionError(f"{question.model.name} has no call {kind!r}", next_step=f"give --call: there are {kinds}")
    return found


def fake(call: Call) -> OneCall:
    """Without values and weights: for plans."""
    component = call.build()
    with FakeTensorMode():
        return OneCall(call.name, call.part(component), call.inputs(component))


def real(call: Call, folder: Path | None, seed: int) -> OneCall:
    """With the weights of ``folder`` where it has them, and random ones otherwise; inputs are random."""
    torch.manual_seed(seed)
    component = _with_weights(call, folder)
    return OneCall(call.name, call.part(component), call.inputs(component))


def _with_weights(call: Call, folder: Path | None) -> nn.Module:
    dtype = getattr(torch, call.dtype)
    kind = require_diffusers_class(call.component.class_name)
    places = [] if folder is None else [folder / call.component.name, folder]
    saved = next((p for p in places if any(p.glob("diffusion_pytorch_model*"))), None)
    try:
        with _as_default(dtype) if saved is None else nullcontext():
            made = kind.from_config(call.component.settings) if saved is None else kind.from_pretrained(saved)  # type: ignore[attr-defined]
    except Exception as error:  # whatever diffusers raises at files that do not go together
        raise TargetError(
            f"{call.component.class_name} cannot be loaded: {error}",
            place=str(saved or call.component.name),
            next_step="give a folder that save_pretrained wrote",
        ) from error
    return made.to(dtype).eval().requires_grad_(False)


@contextmanager
def _as_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
