"""``torch.compile(module, backend="fmecompile")``: each graph that Dynamo hands over is its own program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import CompileContext, CompileId, compile_context

from fmecompile.backends.budgeted import Budget
from fmecompile.backends.eager import EagerCompiler
from fmecompile.backends.inductor import fuse_by
from fmecompile.errors import OptionError, near
from fmecompile.runtime.dispatch import Dispatcher

OPTIONS = ("memory_budget", "backend")


def fmecompile_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The entry point of the group ``torch_dynamo_backends``.

    The graph is captured and planned at its first call, once per input signature, like a module given to ``optimize``.
    ``options`` may hold a ``memory_budget``, which bounds weights, inputs and activations of each graph,
    and a ``backend``, as for ``optimize``.

    Raises OptionError for an unknown option, or one with a wrong value.
    """
    del example_inputs
    options = options or {}
    for name in options.keys() - OPTIONS:
        raise OptionError(
            f"the fmecompile backend has no option {name!r}",
            next_step=near(name, OPTIONS, f"leave it out; there is {', '.join(OPTIONS)}"),
        )
    amount = options.get("memory_budget")
    budget = None if amount is None else Budget.of(amount, graph_module)
    fuse = fuse_by(options.get("backend", "eager"))
    graph_module.training = False  # Dynamo has already decided what training mode means for its operators
    compiler = _InContext(EagerCompiler(budget=budget, fuse=fuse), CompileContext.current_compile_id())
    return torch.compiler.disable(Dispatcher(graph_module, graph_module.forward, compiler))


@dataclass(frozen=True)
class _InContext:
    """Compiles later what Dynamo found now: logs and artifacts belong to the same frame."""

    compiler: EagerCompiler
    compile_id: CompileId | None

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with nullcontext() if self.compile_id is None else compile_context(CompileContext(self.compile_id)):
            return self.compiler(module, forward, args, kwargs)
