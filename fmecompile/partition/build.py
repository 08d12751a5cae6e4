"""From a choice of the search to a :class:`Group`: bodies specialised to the chunk, slices, and take-overs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.axes import GraphAxes, Use
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import Storages, storages
from fmecompile.errors import VerificationError
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.program import compute_nodes
from fmecompile.graph.specs import node_spec, specs_in, tensor_spec
from fmecompile.operators import RULES
from fmecompile.operators.registry import positional
from fmecompile.partition.candidates import Nest, roles
from fmecompile.partition.layout import can_overlay, cut_of, local_shape, piece_spec
from fmecompile.partition.region import Region
from fmecompile.passes.fuse_norm import fuse_norms
from fmecompile.runtime.chunk_loop import Cut, LoopAxis, LoopSpec, Output

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """One way in which a loop reads a value from outside: sliced by ``cut`` along the dimensions in ``kept``."""

    node: fx.Node
    kept: frozenset[int]
    cut: Cut | None


@dataclass(frozen=True)
class Loop:
    """A group under construction: its span, its nest, and the nodes that run in it."""

    start: int
    stop: int
    nest: Nest
    chunk: int
    inside: tuple[fx.Node, ...]
    members: frozenset[fx.Node]


@dataclass(frozen=True)
class Body:
    """One specialised body, what it holds at most, and per result the operand whose storage its value shares."""

    graph: fx.Graph
    held_bytes: int
    aliases: tuple[int | None, ...]


@dataclass
class Builder:
    """Builds groups of one graph. Calls are priced through the shared fact table."""

    region: Region
    storages: Storages
    axes: GraphAxes
    facts: FactTable
    built: dict[tuple[int, int, Nest, int], Group] = field(default_factory=dict)

    def build(self, start: int, stop: int, nest: Nest, chunk: int) -> Group:
        """The group of operators ``[start, stop)`` looping over ``nest``, ``chunk`` rows of its last atom a trip."""
        key = (start, stop, nest, chunk)
        if key not in self.built:
            looped = roles(self.region, start, stop, nest)
            inside = tuple(self.region.nodes[p] for p in range(start, stop) if looped[p])
            hoisted = tuple(self.region.nodes[p] for p in range(start, stop) if not looped[p])
            self.built[key] = self._build(Loop(*key, inside, frozenset(inside)), hoisted)
        return self.built[key]

    def _build(self, loop: Loop, hoisted: tuple[fx.Node, ...]) -> Group:
        sizes = self.region.sizes
        results, outside, behind = self._escapes(loop)
        readings = self._readings(loop)
        body = self._body(loop, results, readings, loop.chunk)
        rest = sizes[loop.nest[-1]] % loop.chunk
        tail = self._body(loop, results, readings, rest) if rest else None
        aliases = body.aliases + (tail.aliases if tail else ())
        outputs = self._outputs(loop, results, readings, aliases)
        axes = tuple(LoopAxis(sizes[atom], 1) for atom in loop.nest[:-1])
        return Group(
            inside=loop.inside,
            hoisted=hoisted,
            outside=tuple(outside),
            behind=tuple(behind),
            operands=tuple(r.node for r in readings),
            results=tuple(results),
            spec=LoopSpec((*axes, LoopAxis(sizes[loop.nest[-1]], loop.chunk)), tuple(r.cut for r in readings), outputs),
            body=body.graph,
            tail=tail.graph if tail else None,
            body_bytes=max(body.held_bytes, tail.held_bytes if tail else 0),
            result_bytes=tuple(self._nbytes(node) for node in results),
            hoisted_bytes=sum(self._nbytes(node) for node in hoisted),
        )

    def _nbytes(self, node: fx.Node) -> int:
        return self.storages.nbytes[self.storages.position[node]]

    def _escapes(self, loop: Loop) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """Storages to return, views of outside values to keep in front, and views of results to keep behind."""
        results: dict[fx.Node, None] = {}
        outside: set[fx.Node] = set()
        behind: set[fx.Node] = set()
        for node in loop.inside:
            if all(self._is_within(user, loop) for user in node.users):
                continue
            root = self.storages.roots[node]
            chain = list(self._views_up(node, root))
            if root in loop.members:
                results[root] = None
                behind.update(chain)
            else:
                outside.update(chain)
        return list(results), [n for n in loop.inside if n in outside], [n for n in loop.inside if n in behind]

    def _is_within(self, user: fx.Node, loop: Loop) -> bool:
        return self.storages.position.get(user, loop.stop) < loop.stop

    def _views_up(self, node: fx.Node, root: fx.Node) -> Iterator[fx.Node]:
        """``node`` and the views between it and the owner of its storage."""
        while node is not root and node in self.storages.roots:
            yield node
            node = next(n for n in node.all_input_nodes if self.storages.roots.get(n, n) is root)

    def _readings(self, loop: Loop) -> list[Reading]:
        found: dict[Reading, None] = {}
        for node in loop.inside:
            for use in self.axes[node].uses:
                if use.node not in loop.members:
                    found[self._reading(loop, use)] = None
        return list(found)

    def _reading(self, loop: Loop, use: Use) -> Reading:
        kept = frozenset(d for d in use.kept_dims if set(use.axes[d]) & set(loop.nest))
        cut = cut_of(use.axes, loop.nest, loop.chunk, self.region.sizes, kept) if kept else None
        return Reading(use.node, kept if cut else frozenset(), cut)

    def _body(self, loop: Loop, results: Sequence[fx.Node], readings: Sequence[Reading], rows: int) -> Body:
        """The operators of the group on slices of ``rows`` rows."""
        graph = fx.Graph()
        held: dict[Reading, fx.Node] = {}
        places = [graph.placeholder(_operand_name(k, r)) for k, r in enumerate(readings)]
        for place, reading in zip(places, readings, strict=True):
            held[reading] = self._placed(graph, place, reading, loop, rows)
        env: dict[fx.Node, fx.Node] = {}
        for node in loop.inside:
            self._copy(graph, node, env, held, loop, rows)
        graph.output(tuple(env[node] for node in results))
        edit.drop_dead(graph)
        fuse_norms(graph, self.facts)
        nodes = compute_nodes(graph)
        values = [env[node] for node in results]
        priced = storages(nodes, values, self.facts)
        moments = zip(priced.live_bytes(), priced.nbytes, priced.hidden, strict=False)
        peak = max((sum(moment) for moment in moments), default=0)
        index = {place: i for i, place in enumerate(places)}
        return Body(graph, peak, tuple(index.get(priced.roots.get(v, v)) for v in values))

    def _placed(self, graph: fx.Graph, place: fx.Node, reading: Reading, loop: Loop, rows: int) -> fx.Node:
        """A slice as the body wants it: joined again where slicing had to split a dimension."""
        spec, sizes = node_spec(reading.node), self.region.sizes
        if reading.cut is None:
            edit.set_spec(place, spec)
            return place
        axes = self.axes[reading.node].axes
        edit.set_spec(place, piece_spec(tensor_spec(reading.node), axes, reading.cut, rows, sizes))
        shape = local_shape(axes, loop.nest, rows, sizes, reading.kept)
        if tensor_spec(place).shape == shape:
            return place
        joined = graph.call_function(aten.reshape.default, (place, list(shape)))
        edit.annotate([joined], self.facts)
        return joined

    def _copy(
        self,
        graph: fx.Graph,
        node: fx.Node,
        env: dict[fx.Node, fx.Node],
        held: dict[Reading, fx.Node],
        loop: Loop,
        rows: int,
    ) -> None:
        uses = iter(self.axes[node].uses)

        def local(n: fx.Node) -> fx.Node:
            use = next(uses)
            return env[n] if n in loop.members else held[self._reading(loop, use)]

        args: tuple[Any, ...] = fx.map_arg(node.args, local)  # type: ignore[assignment]
        kwargs = fx.map_arg(node.kwargs, local)
        shape = local_shape(self.axes[node].axes, loop.nest, rows, self.region.sizes)
        rule = RULES[node.target]
        if rule.localise is not None:
            args, kwargs = positional(node.target, args, kwargs)  # type: ignore[arg-type]
            args = (args[0], *rule.localise(specs_in(args), shape)[1:])
        copy = edit.copy_into(graph, node, env, args, kwargs)  # type: ignore[arg-type]
        edit.annotate([copy], self.facts)
        if tensor_spec(copy).shape != shape:
            raise VerificationError(
                f"{node.name} gives {tensor_spec(copy).shape} for a slice whose axes say {shape}",
                place=str(node.target),
                next_step="the axis rule of this operator is wrong; please report it",
            )

    def _outputs(
        self,
        loop: Loop,
        results: Sequence[fx.Node],
        readings: Sequence[Reading],
        aliases: Sequence[int | None],
    ) -> tuple[Output, ...]:
        aliased = {self._root(readings[i].node) for i in aliases if i is not None}
        free = [i for i, r in enumerate(readings) if self._may_take(loop, r) and self._root(r.node) not in aliased]
        devices = [getattr(node_spec(reading.node), "device", None) for reading in readings]
        outputs = []
        for node in results:
            spec, axes = tensor_spec(node), self.axes[node].axes
            takes = next((i for i in free if self._overlays(loop, node, readings[i].node)), None)
            if takes is not None:
                root = self._root(readings[takes].node)
                free = [i for i in free if self._root(readings[i].node) is not root]
            cut = cut_of(axes, loop.nest, loop.chunk, self.region.sizes)
            assert cut is not None
            like = next((i for i, d in enumerate(devices) if d == spec.device), None)
            device = spec.device if like is None else None
            outputs.append(Output(cut, spec.shape, spec.stride, spec.dtype, like or 0, device, takes))
        return tuple(outputs)

    def _root(self, node: fx.Node) -> fx.Node:
        return self.storages.roots.get(node, node)

    def _may_take(self, loop: Loop, reading: Reading) -> bool:
        """The storage was allocated in this graph, dies in this loop, and each trip reads only its own slice of it."""
        root = self._root(reading.node)
        allocated = root in self.storages.position and self.storages.position[root] < loop.start
        if not allocated or self.storages.last[root] >= loop.stop:
            return False
        nest = set(loop.nest)
        return all(
            nest <= {atom for axis in use.axes for atom in axis} and not nest & use.reduced
            for node in loop.inside
            for use in self.axes[node].uses
            if self._root(use.node) is root
        )

    def _overlays(self, loop: Loop, node: fx.Node, over: fx.Node) -> bool:
        root = self._root(over)
        return tensor_spec(over).numel == tensor_spec(root).numel and can_overlay(
            tensor_spec(node),
            self.axes[node].axes,
            tensor_spec(root),
            self.axes[root].axes,
            loop.nest,
            self.region.sizes,
        )


def _operand_name(index: int, reading: Reading) -> str:
    """Bodies are shared by groups of equal structure, so operands are named by place and role."""
    return f"part_{index}" if reading.cut else f"whole_{index}"
