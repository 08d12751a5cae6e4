"""What a kernel is, and where it runs: on CUDA with Triton; the eager reference takes its place elsewhere.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import) kernels run on CPU tensors too, slowly.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from fmecompile.errors import OptionError

NAMESPACE = "fmecompile"


def _triton() -> tuple[Any, Any]:
    """Triton and its language; None and a stand-in for annotations where it is not installed."""
    try:
        return import_module("triton"), import_module("triton.language")
    except ImportError:
        return None, SimpleNamespace(constexpr=float)


triton, tl = _triton()
IS_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the function itself, which is never called."""
    return function if triton is None else triton.jit(function)


@dataclass(frozen=True)
class Kernel:
    """``target`` is what a graph calls. ``reference`` computes the same in plain torch, ``empty`` checks the arguments
    and makes the result's memory, ``launch`` fills that, for arguments that ``is_served`` does not turn down.
    """

    name: str
    target: Any
    reference: Callable[..., torch.Tensor]
    empty: Callable[..., torch.Tensor]
    launch: Callable[..., None]
    is_served: Callable[..., bool]


KERNELS: dict[str, Kernel] = {}
"""Every kernel by its name."""


def register(
    reference: Callable[..., torch.Tensor],
    empty: Callable[..., torch.Tensor],
    launch: Callable[..., None],
    is_served: Callable[..., bool] = lambda *_: True,
) -> Any:
    """Make an operator of a kernel, with the schema of its reference, and return what a graph calls."""
    name = reference.__name__

    def run(*args: Any) -> torch.Tensor:
        out = empty(*args)
        if is_launched(out.device) and is_served(*args) and out.numel():
            with torch.cuda.device_of(out):
                launch(out, *args)
            return out
        value = reference(*args)
        return value if value.stride() == out.stride() else out.copy_(value)

    schema = torch.library.infer_schema(reference, mutates_args=())
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(empty)
    target = getattr(getattr(torch.ops, NAMESPACE), name).default
    KERNELS[name] = Kernel(name, target, reference, empty, launch, is_served)
    return target


def why_not(device: torch.device) -> str:
    """Why no kernel runs on ``device``; an empty string where they do."""
    if triton is None:
        return "Triton is not installed; next: pip install triton"
    if IS_INTERPRETED or device.type == "cuda":
        return ""
    return f"kernels need a CUDA device, and this is {device.type}"


def why_not_planned(device: torch.device) -> str:
    """Why a program for ``device`` has no kernels; an empty string where it has.

    Where no CUDA device is there, a program for one is on fake tensors, and planned as where it would run. A CUDA
    device without Triton is told once.
    """
    if device.type != "cuda":
        return f"kernels need a CUDA device, and this is {device.type}"
    if triton is None and torch.cuda.is_available():
        _warn_once(why_not(device))
        return why_not(device)
    return ""


def is_launched(device: torch.device) -> bool:
    """Whether kernels run on ``device``; a CUDA device without Triton is told once, and runs the references."""
    reason = why_not(device)
    if reason and device.type == "cuda":
        _warn_once(reason)
    return not reason


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fmecompile runs eager references in place of its kernels: {reason}", stacklevel=2)


def require(holds: bool, fact: str, next_step: str) -> None:
    """Raises OptionError with ``fact`` where a call of a kernel does not hold to its terms."""
    if not holds:
        raise OptionError(fact, next_step=next_step)
