"""A compiled program bound to a live module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from fmecompile.runtime.graphed import Graphs
from fmecompile.runtime.signature import fake_mode_of

Slot = tuple[str, Any]
"""Where an operand comes from: ``("weight", name)``, ``("input", leaf)``, ``("literal", index)``,
``("constant", index)``, ``("kept", (name, order))`` or ``("coefficient", (component, order))``."""

Keep = Mapping[tuple[str, int], torch.Tensor]
"""What earlier steps kept, by name and order of the divided difference."""

Coefficients = Mapping[tuple[str, int], torch.Tensor]
"""What differences are multiplied with, by component and order."""

_NOTHING: Keep = {}


@dataclass(frozen=True)
class Compiled:
    """What a backend returns: the rewritten graph, its operands' sources, and the graph of constants. Behind the
    results, the graph returns a value for each name in ``keeps``."""

    graph_module: fx.GraphModule
    slots: tuple[Slot, ...]
    constants: fx.GraphModule | None
    literals: tuple[torch.Tensor, ...]
    out_spec: TreeSpec
    keeps: tuple[str, ...] = ()


class Executable:
    """Runs one compiled program on the weights the module has at the moment of the call, replayed by ``graphs`` if they
    are given."""

    def __init__(self, compiled: Compiled, module: nn.Module, graphs: Graphs | None = None) -> None:
        self._compiled = compiled
        self._forward: Callable[..., Any] = compiled.graph_module.forward
        if graphs is not None:
            self._forward = graphs.graphed(compiled.graph_module, [kind for kind, _ in compiled.slots])
        self._sources = [_source(slot, module) for slot in compiled.slots]
        self._made: dict[Any, dict[str, tuple[torch.Tensor, ...]]] = {}

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names of what a run keeps for later steps."""
        return self._compiled.keeps

    def weights(self) -> list[torch.Tensor]:
        """The weights that it reads, as they are now."""
        return [table[key] for kind, table, key in self._sources if kind == "weight"]

    @property
    def takes(self) -> frozenset[str]:
        """The names of what a run takes from earlier."""
        return frozenset(key[0] for kind, key in self._compiled.slots if kind == "kept")

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run on the flattened arguments of a call; the result has the structure the module returned at capture."""
        return self.run(leaves)[0]

    def run(
        self, leaves: Sequence[Any], kept: Keep = _NOTHING, coefficients: Coefficients = _NOTHING
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """The same, on what earlier steps kept; also what this one keeps, by name."""
        mode = fake_mode_of(list(leaves))
        held = {"input": leaves, "kept": kept, "coefficient": coefficients, **self._made_in(mode)}
        operands = [held[kind][key] if kind in held else table[key] for kind, table, key in self._sources]
        with mode if mode is not None else nullcontext():
            values = list(self._forward(*operands))
        del operands
        names = self._compiled.keeps
        new = dict(zip(names, values[len(values) - len(names) :], strict=True))
        return tree_unflatten(values[: len(values) - len(names)], self._compiled.out_spec), new

    def _made_in(self, mode: Any) -> dict[str, tuple[torch.Tensor, ...]]:
        """Literals and constants: made on first use, once for real tensors and once for the latest fake mode."""
        key = None if mode is None else weakref.ref(mode)
        if key not in self._made:
            self._made = {known: made for known, made in self._made.items() if known is None}
            literals, graph = self._compiled.literals, self._compiled.constants
            if mode is not None:
                literals = tuple(mode.from_tensor(t) for t in literals)
            with mode if mode is not None else nullcontext(), torch.no_grad():
                constants = graph(*literals) if graph is not None else ()
            self._made[key] = {"literal": literals, "constant": constants}
        return self._made[key]


def _source(slot: Slot, module: nn.Module) -> tuple[str, Any, Any]:
    kind, key = slot
    if kind != "weight":
        return (kind, None, key)
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    table = owner._parameters if name in owner._parameters else owner._buffers
    return (kind, table, name)
