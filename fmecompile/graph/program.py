"""A captured module: its graph, and where each graph input comes from at every call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, read from the live module at each call by its qualified name."""

    name: str


@dataclass(frozen=True)
class Input:
    """A tensor argument: the position of the leaf among the flattened ``(args, kwargs)``."""

    leaf: int


@dataclass(frozen=True)
class Literal:
    """A tensor the module created from Python values while it was captured."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A value that depends on no input and no weight: the position in what the constants graph returns."""

    index: int


@dataclass(frozen=True)
class Kept:
    """What an earlier step kept under a name; of a forecast also its ``order``-th divided difference."""

    name: str
    order: int = 0


@dataclass(frozen=True)
class Coefficient:
    """A 0-d float64 tensor: what the ``order``-th divided differences of a component are multiplied with at a step."""

    order: int
    component: str = "cut"


Binding = Weight | Input | Literal | Constant | Kept | Coefficient


@dataclass
class Program:
    """One graph for one input signature.

    Placeholders stand in the order of ``bindings``. The output node's argument is a flat tuple that ``out_spec``
    unflattens; behind those that it takes follow the values kept for later steps, named by ``keeps``. ``constants``
    maps the values of ``literals``, in order, to the values of :class:`Constant` bindings.
    ``prologue`` makes once per generation what some :class:`Kept` bindings take.
    """

    graph: fx.Graph
    bindings: list[Binding]
    out_spec: TreeSpec
    literals: dict[str, torch.Tensor]
    constants: fx.GraphModule | None = None
    keeps: tuple[str, ...] = ()
    prologue: Program | None = None

    def copy(self) -> Program:
        """The same program with a graph of its own; nodes keep their names."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, graph=graph, bindings=list(self.bindings), literals=dict(self.literals))

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The flat output values: nodes, or literals such as None."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]


def compute_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that run: everything but placeholders and the output."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]
