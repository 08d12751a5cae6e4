"""``torch.compile(module, backend="fmecompile")``: each graph that Dynamo hands over is its own program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fmecompile.backends.budgeted import Budget
from fmecompile.backends.eager import EagerCompiler
from fmecompile.backends.inductor import fuse_by
from fmecompile.errors import OptionError
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
    for name in (options or {}).keys() - OPTIONS:
        raise OptionError(
            f"the fmecompile backend has no option {name!r}", next_step=f"leave it out; there is {', '.join(OPTIONS)}"
        )
    amount = (options or {}).get("memory_budget")
    budget = None if amount is None else Budget.of(amount, graph_module)
    fuse = fuse_by((options or {}).get("backend", "eager"))
    graph_module.training = False  # Dynamo has already decided what training mode means for its operators
    dispatcher = Dispatcher(graph_module, graph_module.forward, EagerCompiler(budget=budget, fuse=fuse))
    return torch.compiler.disable(dispatcher)
