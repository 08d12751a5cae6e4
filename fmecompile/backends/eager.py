"""The eager backend: loop bodies run operator by operator, as PyTorch runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from fmecompile.capture.example import Example
from fmecompile.graph.plan import Plan
from fmecompile.pipeline import Compilation, Record, compile_module
from fmecompile.runtime.dispatch import Compiler
from fmecompile.runtime.executable import Executable

Progress = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Given a module's class name, shows a compilation; what it yields is called with the name of each finished stage."""


def silent(_: str) -> AbstractContextManager[Callable[[str], None]]:
    return nullcontext(lambda stage: None)


def eager_compiler(saved: Sequence[Plan] = (), progress: Progress = silent) -> Compiler:
    """A compiler callback for the dispatcher. ``saved`` plans spare the search where they match."""

    def compiler(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Executable, Record]:
        example = Example.of(args, kwargs)
        notes: list[tuple[str, str]] = []
        with progress(type(module).__name__) as shown:

            def observe(name: str, compilation: Compilation) -> None:
                notes.append(compilation.notes[-1])
                shown(name)

            compiled, plan = compile_module(module, args, kwargs, saved=saved, observe=observe)
        return Executable(compiled, module), Record(plan, example, tuple(notes))

    return compiler
