"""Hooks that other libraries put around a module's ``forward``, and hooks on the modules inside it.

Accelerate and diffusers replace ``module.forward`` by a ``functools.partial`` and keep what stood there before in a
place of their own. The places form a chain from the outermost call to the innermost; a dispatcher stands in the last
one, so that hooks which move weights have done so when a compiled program reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

_LISTENERS = ("_forward_pre_hooks", "_forward_hooks")

HOOK_PLACES = frozenset(
    {
        "forward",
        "_old_forward",
        "_hf_hook",
        "_diffusers_hook",
        *_LISTENERS,
        *(f"{name}_with_kwargs" for name in _LISTENERS),
        "_forward_hooks_always_called",
    }
)
"""Attributes of a module that hooks around its ``forward`` use; they do not change what ``forward`` itself computes."""


class Place(NamedTuple):
    """Where one callable of the chain is kept: ``table[name]``; absent where the class's own method stands."""

    table: dict[str, Any]
    name: str

    @property
    def held(self) -> Any:
        return self.table.get(self.name)


def places(module: nn.Module) -> Iterator[Place]:
    """The chain of ``module.forward``, outermost first."""
    place: Place | None = Place(vars(module), "forward")
    while place is not None:
        yield place
        place = _inside(module, place.held)


def innermost(module: nn.Module) -> Place:
    *_, last = places(module)
    return last


def _inside(module: nn.Module, wrapper: Any) -> Place | None:
    """Where ``wrapper`` keeps what it calls; None for what is no wrapper, or not one that is known."""
    function = wrapper.func if isinstance(wrapper, functools.partial) else None
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    if "_old_forward" in code.co_names and "_old_forward" in vars(module):
        return Place(vars(module), "_old_forward")
    for cell in getattr(function, "__closure__", None) or ():
        reference = getattr(cell.cell_contents, "__dict__", {})
        if {"pre_forward", "forward", "original_forward"} <= set(reference):
            return Place(reference, "forward" if reference["original_forward"] is None else "original_forward")
    return None


def hook_inside(module: nn.Module) -> str:
    """What hooks into a module inside ``module``, in words; empty where nothing does.

    Such hooks move weights, change values or remember them while ``forward`` runs; a compiled program, which calls no
    inner module, would bypass them.
    """
    for name, inner in module.named_modules():
        if inner is not module and (kind := _hook_of(inner)):
            return f"{name} has {kind}"
    return ""


def _hook_of(module: nn.Module) -> str:
    state = vars(module)
    if "_hf_hook" in state:
        return f"the accelerate hook {type(state['_hf_hook']).__name__}"
    registry = getattr(state.get("_diffusers_hook"), "hooks", None)
    if registry:
        return f"the diffusers hook {next(iter(registry))!r}"
    if any(state.get(listeners) for listeners in _LISTENERS):
        return "a forward hook"
    return ""
