"""A module's ``forward`` without what stands around it: what is captured in the module's place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from fmecompile.runtime.exclusion import traced_here_only

INSIDE = "inside"
"""The name of the one sub-module of a shell."""


class Shell(nn.Module):
    """Calls ``forward``, a method of ``module``, and nothing else: no hooks, no dispatcher.

    ``module`` is untouched by a capture of its shell. Its weights and sub-modules are those of the shell, with
    ``inside.`` before their names; :func:`stripped` takes that off.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.add_module(INSIDE, module)
        self.training = module.training

        @functools.wraps(forward)  # the names of the arguments are read from its signature
        def call(*args: Any, **kwargs: Any) -> Any:
            with traced_here_only():
                return forward(*args, **kwargs)

        self.forward = call

    @property
    def module(self) -> nn.Module:
        return self.get_submodule(INSIDE)


def inner_name(module: nn.Module) -> str:
    """The class a person knows: that of the module inside a shell."""
    return type(module.module if isinstance(module, Shell) else module).__name__


def stripped(name: str) -> str:
    """A qualified name in the module, from one in its shell. Names of other modules pass unchanged."""
    return "" if name == INSIDE else name.removeprefix(f"{INSIDE}.")
