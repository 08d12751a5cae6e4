"""Runs of operators that a kernel compiler may fuse: what stands between two calls of a library.

A run is a connected part of a stretch of operators without products: it writes each of its results once and nothing in
between, where eagerly every operator writes a tensor that the next one reads. Libraries multiply matrices as well from
inside a compiled graph as from outside, so their calls stay where they are, and with them the order of all allocations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import fx

from fmecompile.analysis.facts import CallFacts, FactTable
from fmecompile.analysis.storages import tensor_operands
from fmecompile.graph.specs import TensorSpec, node_spec, specs_in, tensor_spec
from fmecompile.runtime.measure import rounded_bytes
from fmecompile.runtime.norms import group_norm_apply, group_norm_statistics

aten = torch.ops.aten

_FUSED = {
    group_norm_apply,
    group_norm_statistics,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.cat.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.reshape.default,
    aten.repeat_interleave.self_int,
    aten.to.dtype,
    aten.upsample_nearest2d.vec,
}
"""Operators without products that are no pointwise ones, and that are compiled well."""


_STRIDED = 4
"""How many times over a library that multiplies a strided value would write it in the time it takes longer."""


@dataclass(frozen=True)
class Run:
    """``core`` are the operators that a kernel stands for, ``inside`` those and the views between them, both in order;
    ``results`` are the values of ``core`` that are read elsewhere. ``placed`` are those results that are views which
    library calls read badly: a kernel writes them contiguously. ``saved_bytes`` are no longer written, or copied by a
    library."""

    core: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    placed: frozenset[fx.Node]
    saved_bytes: int


def runs(graph: fx.Graph, facts: FactTable) -> list[Run]:
    """Every run of ``graph`` that has something to fuse."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    views = {node for node in nodes if _is_view(node, facts)}
    fused = {node for node in nodes if node not in views and _is_fused(node, facts)}
    found: list[Run] = []
    for is_fusible, stretch in groupby(nodes, lambda node: node in views or node in fused):
        if is_fusible:
            found += _runs_in(list(stretch), views, fused)
    return found


def _is_view(node: fx.Node, facts: FactTable) -> bool:
    """Whether ``node`` allocates nothing, writes nothing and returns one tensor."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node_spec(node), TensorSpec):
        return False
    return not node.target._schema.is_mutable and all(alias is not None for alias in _facts(node, facts).alias)


def _is_fused(node: fx.Node, facts: FactTable) -> bool:
    """Whether ``node`` makes one tensor on the device of all its operands, and a compiler may make it with others."""
    spec = node_spec(node)
    if not (_is_pointwise(node.target) or node.target in _FUSED) or not isinstance(spec, TensorSpec):
        return False
    devices = {node_spec(operand).device for operand in tensor_operands(node)}
    return devices == {spec.device} and not any(alias is not None for alias in _facts(node, facts).alias)


def _is_pointwise(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags and not target._schema.is_mutable


def _facts(node: fx.Node, facts: FactTable) -> CallFacts:
    return facts(node.target, specs_in(node.args), specs_in(node.kwargs))  # type: ignore[arg-type]


def _runs_in(stretch: list[fx.Node], all_views: set[fx.Node], fused: set[fx.Node]) -> Iterator[Run]:
    views = all_views.intersection(stretch)
    parts = _Parts(node for node in stretch if node not in views)
    for node in stretch:
        for operand in _through_views(node, views):
            parts.join(node if node not in views else None, operand)
    for core in parts.components():
        run = _run(set(core), stretch, views, fused)
        if len(core) > 1 or run.placed:
            yield run


def _through_views(node: fx.Node, views: set[fx.Node]) -> Iterator[fx.Node]:
    """What ``node`` reads, looking through views of the same stretch."""
    for operand in node.all_input_nodes:
        if operand in views:
            yield from _through_views(operand, views)
        else:
            yield operand


class _Parts:
    """Connected parts of some nodes, in their order."""

    def __init__(self, nodes: Iterator[fx.Node]) -> None:
        self._of: dict[fx.Node, list[fx.Node]] = {node: [node] for node in nodes}

    def join(self, one: fx.Node | None, other: fx.Node) -> None:
        if one not in self._of or other not in self._of or self._of[one] is self._of[other]:
            return
        joined = self._of[other] + self._of[one]
        for node in joined:
            self._of[node] = joined

    def components(self) -> list[list[fx.Node]]:
        return list({id(part): part for part in self._of.values()}.values())


def _run(core: set[fx.Node], stretch: list[fx.Node], views: set[fx.Node], fused: set[fx.Node]) -> Run:
    read = [node for node in core if _is_read_outside(node, core, views)]
    chains = [chain for node in read if (chain := _to_strided_view(node, core, views, fused))]
    saved = sum(map(_nbytes, core.difference(read))) + sum(_STRIDED * _nbytes(chain[-1]) for chain in chains)
    placed = {chain[-1] for chain in chains}
    core = core.union(*chains)
    results = placed.union(node for node in read if not any(node in chain[0].all_input_nodes for chain in chains))
    wanted: set[fx.Node] = set()
    inside: list[fx.Node] = []
    for node in reversed(stretch):
        if node in core or (node in views and node in wanted):
            inside.append(node)
            wanted.update(node.all_input_nodes)
    inside.reverse()
    within = set(inside)
    operands = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in within)
    in_order = tuple(node for node in inside if node in core)
    returned = tuple(node for node in in_order if node in results)
    return Run(in_order, tuple(inside), tuple(operands), returned, frozenset(placed), saved)


def _to_strided_view(node: fx.Node, core: set[fx.Node], views: set[fx.Node], fused: set[fx.Node]) -> list[fx.Node]:
    """The views of ``node`` that lead to the only one of it that is read, where that has all its values, is not
    contiguous, and is read by library calls alone; else none."""
    chain: list[fx.Node] = []
    readers = [user for user in node.users if user not in core]
    while len(readers) == 1 and readers[0] in views and _numel(readers[0]) == _numel(node):
        chain.append(readers[0])
        readers = list(chain[-1].users)
    if not chain or _is_contiguous(chain[-1]) or any(r.op != "call_function" or r in fused for r in readers):
        return []
    return chain


def _numel(node: fx.Node) -> int:
    return tensor_spec(node).numel


def _is_contiguous(node: fx.Node) -> bool:
    spec, step = tensor_spec(node), 1
    for size, stride in reversed(list(zip(spec.shape, spec.stride, strict=True))):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _is_read_outside(node: fx.Node, core: set[fx.Node], views: set[fx.Node]) -> bool:
    """Whether anything but ``core`` reads ``node``, be it through views."""
    return any(user not in core and (user not in views or _is_read_outside(user, core, views)) for user in node.users)


def _nbytes(node: fx.Node) -> int:
    spec = node_spec(node)
    storage = 1 + sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
    return rounded_bytes(storage * spec.dtype.itemsize)
