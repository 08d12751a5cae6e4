"""relax-views: spell shape changes so that they also hold for a chunk and for a permuted layout.

    before  v = view(x, [28, -1, 5, 64]);  a, b = chunk(y, 2, -1)
    after   v = reshape(x, [28, 9216, 5, 64]);  a = slice(y, -1, 0, 1280);  b = slice(y, -1, 1280, 2560)

``reshape`` is ``view`` wherever a view is possible; ``repeat_interleave`` loses its redundant output size. Splitting
operators become slices, one result each, so that every value of the graph is one tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.tensor_split.sections}


@dataclass(frozen=True)
class RelaxViews:
    """``view`` to ``reshape`` with explicit sizes; splits to slices; ``unbind`` to selects."""

    def apply(self, program: Program, facts: FactTable) -> str:
        views = splits = 0
        for node in compute_nodes(program.graph):
            spec = node_spec(node)
            if node.target in _VIEWS and isinstance(spec, TensorSpec):
                edit.retarget(node, aten.reshape.default, (node.args[0], list(spec.shape)), {})
                views += 1
            elif "output_size" in node.kwargs:
                kwargs = {name: value for name, value in node.kwargs.items() if name != "output_size"}
                edit.retarget(node, node.target, node.args, kwargs)  # type: ignore[arg-type]
            elif node.target in _SPLITS:
                splits += _split_to_slices(node, facts)
            elif node.target is aten.unbind.int:
                splits += _unbind_to_selects(node, facts)
        return f"{views} views relaxed, {splits} splits turned into slices"


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem]


def _split_to_slices(node: fx.Node, facts: FactTable) -> int:
    parts: Sequence[TensorSpec] = node_spec(node)
    if len(_readers(node)) != len(node.users):
        return 0
    dim = _argument(node, 2, "dim", 0)
    assert isinstance(dim, int)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[dim])
    for reader in _readers(node):
        index = reader.args[1]
        assert isinstance(index, int)
        edit.retarget(reader, aten.slice.Tensor, (node.args[0], dim, ends[index], ends[index + 1]), {})
    edit.erase([node])
    return 1


def _unbind_to_selects(node: fx.Node, facts: FactTable) -> int:
    if len(_readers(node)) != len(node.users):
        return 0
    dim = _argument(node, 1, "dim", 0)
    for reader in _readers(node):
        edit.retarget(reader, aten.select.int, (node.args[0], dim, reader.args[1]), {})
    edit.erase([node])
    return 1
