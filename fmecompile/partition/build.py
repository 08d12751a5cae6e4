"""From a choice of the search to a :class:`Group`: bodies specialised to the chunk, slices, and take-overs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.axes import GraphAxes
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import Storages, storages
from fmecompile.errors import VerificationError
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.program import compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, specs_in, tensor_spec
from fmecompile.operators import RULES
from fmecompile.operators.registry import Halo, positional
from fmecompile.partition.layout import can_overlay, local_shape, piece_spec, slicing_of, unit_of
from fmecompile.partition.nests import Nest, roles
from fmecompile.partition.reach import Reach, Rows, reach
from fmecompile.partition.region import Region
from fmecompile.passes.fuse_norm import fuse_norms
from fmecompile.passes.write_over import WriteOver
from fmecompile.runtime.chunk_loop import LoopAxis, LoopSpec, Output, Slicing
from fmecompile.runtime.host import to_device, to_host

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """One way in which a loop reads a value from outside: sliced by ``slicing`` along the dimensions in ``kept``."""

    node: fx.Node
    kept: frozenset[int]
    slicing: Slicing | None
    halo: Halo = (0, 0)


@dataclass(frozen=True)
class Loop:
    """A group under construction: its span, its nest, the nodes that run in it, and how far its trips reach."""

    start: int
    stop: int
    nest: Nest
    chunk: int
    inside: tuple[fx.Node, ...]
    members: frozenset[fx.Node]
    reach: Reach


@dataclass(frozen=True)
class Trip:
    """The rows of the innermost atom that one trip handles."""

    loop: Loop
    start: int
    rows: int


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
    may_write_over: bool = True
    built: dict[tuple[int, int, Nest, int], Group] = field(default_factory=dict)

    def build(self, start: int, stop: int, nest: Nest, chunk: int) -> Group:
        """The group of operators ``[start, stop)`` looping over ``nest``, ``chunk`` rows of its last atom a trip."""
        key = (start, stop, nest, chunk)
        if key not in self.built:
            looped = roles(self.region, start, stop, nest)
            assert looped is not None, f"no loop over {nest} from {start} to {stop}"
            inside = tuple(self.region.nodes[p] for p in range(start, stop) if looped[p])
            hoisted = tuple(self.region.nodes[p] for p in range(start, stop) if not looped[p])
            members = frozenset(inside)
            loop = Loop(*key, inside, members, reach(inside, members, nest[-1], self.axes, self.region.sizes))
            self.built[key] = self._build(loop, hoisted)
        return self.built[key]

    def _build(self, loop: Loop, hoisted: tuple[fx.Node, ...]) -> Group:
        sizes = self.region.sizes
        results, outside, behind = self._escapes(loop)
        readings = self._readings(loop)
        kinds, trips = _kinds(loop, sizes[loop.nest[-1]])
        bodies = [self._body(trip, results, readings) for trip in trips]
        outputs = self._outputs(loop, results, readings, [alias for body in bodies for alias in body.aliases])
        axes = tuple(LoopAxis(sizes[atom], 1) for atom in loop.nest[:-1])
        nest = (*axes, LoopAxis(sizes[loop.nest[-1]], loop.chunk))
        return Group(
            inside=loop.inside,
            hoisted=hoisted,
            outside=tuple(outside),
            behind=tuple(behind),
            operands=tuple(r.node for r in readings),
            results=tuple(results),
            spec=LoopSpec(nest, tuple(r.slicing for r in readings), outputs, kinds),
            bodies=tuple(body.graph for body in bodies),
            body_bytes=max(body.held_bytes for body in bodies),
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
            chain = list(self._views_up(node, root, loop))
            if root in loop.members:
                results[root] = None
                behind.update(chain)
            else:
                outside.update(chain)
        return list(results), [n for n in loop.inside if n in outside], [n for n in loop.inside if n in behind]

    def _is_within(self, user: fx.Node, loop: Loop) -> bool:
        return self.storages.position.get(user, loop.stop) < loop.stop

    def _views_up(self, node: fx.Node, root: fx.Node, loop: Loop) -> Iterator[fx.Node]:
        """``node`` and the views of the loop between it and the owner of its storage."""
        while node is not root and node in loop.members:
            yield node
            node = next(n for n in node.all_input_nodes if self.storages.roots.get(n, n) is root)

    def _readings(self, loop: Loop) -> list[Reading]:
        found: dict[Reading, None] = {}
        for node in loop.inside:
            for n, use in enumerate(self.axes[node].uses):
                if use.node not in loop.members:
                    found[self._reading(loop, node, n)] = None
        return list(found)

    def _reading(self, loop: Loop, node: fx.Node, n: int) -> Reading:
        """How the n-th use of ``node`` reads a value from outside the loop."""
        use = self.axes[node].uses[n]
        kept = frozenset(d for d in use.kept_dims if set(use.axes[d]) & set(loop.nest))
        halo = loop.reach.wanted.get((node, n), (0, 0))
        slicing = slicing_of(use.axes, loop.nest, loop.chunk, self.region.sizes, kept, halo) if kept else None
        return Reading(use.node, kept if slicing else frozenset(), slicing, halo)

    def _body(self, trip: Trip, results: Sequence[fx.Node], readings: Sequence[Reading]) -> Body:
        """The operators of the group on the slices of one trip."""
        graph = fx.Graph()
        held: dict[Reading, fx.Node] = {}
        places = [graph.placeholder(_operand_name(k, r)) for k, r in enumerate(readings)]
        for place, reading in zip(places, readings, strict=True):
            held[reading] = self._placed(graph, place, reading, trip)
        env: dict[fx.Node, fx.Node] = {}
        for node in trip.loop.inside:
            self._copy(graph, node, env, held, trip)
        values = [self._core(graph, node, env, trip) for node in results]
        graph.output(tuple(values))
        edit.drop_dead(graph)
        fuse_norms(graph, self.facts)
        if self.may_write_over:
            WriteOver().apply(graph, self.facts)
        nodes = compute_nodes(graph)
        priced = storages(nodes, values, self.facts)
        moments = zip(priced.live_bytes(), priced.nbytes, priced.hidden, strict=False)
        peak = max((sum(moment) for moment in moments), default=0)
        index = {place: i for i, place in enumerate(places)}
        return Body(graph, peak, tuple(index.get(priced.roots.get(v, v)) for v in values))

    def _placed(self, graph: fx.Graph, place: fx.Node, reading: Reading, trip: Trip) -> fx.Node:
        """A slice as the body wants it: joined again where slicing had to split a dimension."""
        spec, sizes, nest = node_spec(reading.node), self.region.sizes, trip.loop.nest
        if reading.slicing is None:
            edit.set_spec(place, spec)
            return place
        axes = self.axes[reading.node].axes
        offsets = [0] * (len(nest) - 1) + [trip.start]
        edit.set_spec(place, piece_spec(tensor_spec(reading.node), axes, reading.slicing, offsets, trip.rows, sizes))
        unit = unit_of(tuple(axes[d] for d in sorted(reading.kept)), nest[-1], sizes) or 1
        first = max(trip.start * unit - reading.halo[0], 0)
        last = min((trip.start + trip.rows) * unit + reading.halo[1], sizes[nest[-1]] * unit)
        shape = local_shape(axes, nest, Fraction(last - first, unit), sizes, reading.kept)
        if tensor_spec(place).shape == shape:
            return place
        return self._called(graph, aten.reshape.default, place, list(shape))

    def _called(self, graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        edit.annotate([node], self.facts)
        return node

    def _core(self, graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node], trip: Trip) -> fx.Node:
        """The rows of a result that this trip alone writes."""
        unit = unit_of(self.axes[node].axes, trip.loop.nest[-1], self.region.sizes)
        if unit is None:
            return env[node]
        return self._part(graph, node, env, trip, (trip.start * unit, (trip.start + trip.rows) * unit))

    def _part(self, graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node], trip: Trip, rows: Rows) -> fx.Node:
        """``rows`` of a value of the body, which may have made more."""
        made = trip.loop.reach.rows_made(node, trip.start, trip.rows)
        if made is None or made == rows:
            return env[node]
        dim = next(d for d, axis in enumerate(self.axes[node].axes) if trip.loop.nest[-1] in axis)
        return self._called(graph, aten.slice.Tensor, env[node], dim, rows[0] - made[0], rows[1] - made[0])

    def _copy(
        self, graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node], held: dict[Reading, fx.Node], trip: Trip
    ) -> None:
        """One operator on the slices of a trip. What goes to host memory is written there by the loop itself."""
        loop, numbers = trip.loop, count()

        def local(operand: fx.Node) -> fx.Node:
            n = next(numbers)
            if operand not in loop.members:
                return held[self._reading(loop, node, n)]
            wanted = loop.reach.rows_wanted(node, n, trip.start, trip.rows)
            return self._part(graph, operand, env, trip, wanted[0]) if wanted else env[operand]

        args: tuple[Any, ...] = fx.map_arg(node.args, local)  # type: ignore[assignment]
        kwargs = fx.map_arg(node.kwargs, local)
        if node.target is to_host or (node.target is to_device and node.args[0] in loop.members):
            env[node] = args[0]
            return
        if (known := next((n for n in graph.nodes if n.target is to_device and n.args == args), None)) is not None:
            env[node] = known
            return
        shape = self._shape(node, trip)
        args, kwargs = self._localised(graph, node, args, kwargs, shape, trip)  # type: ignore[arg-type]
        copy = edit.copy_into(graph, node, env, args, kwargs)
        edit.annotate([copy], self.facts)
        if tensor_spec(copy).shape != shape:
            raise VerificationError(
                f"{node.name} gives {tensor_spec(copy).shape} for a slice whose axes say {shape}",
                place=str(node.target),
                next_step="the axis rule of this operator is wrong; please report it",
            )

    def _shape(self, node: fx.Node, trip: Trip) -> tuple[int, ...]:
        """The shape of what a trip makes of ``node``."""
        axes, nest, sizes = self.axes[node].axes, trip.loop.nest, self.region.sizes
        made, unit = trip.loop.reach.rows_made(node, trip.start, trip.rows), unit_of(axes, nest[-1], sizes)
        rows = Fraction(made[1] - made[0], unit) if made and unit else trip.rows
        return local_shape(axes, nest, rows, sizes)

    def _localised(
        self,
        graph: fx.Graph,
        node: fx.Node,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        trip: Trip,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Literal sizes for a chunk, and zeros at the borders of the whole tensor only."""
        rule = RULES[node.target]
        if rule.localise is not None:
            args, kwargs = positional(node.target, args, kwargs)
            args = (args[0], *rule.localise(specs_in(args), shape)[1:])
        borders = self._borders(node, trip)
        if rule.at_borders is not None and borders:
            args, kwargs = positional(node.target, args, kwargs)
            amounts, rest = rule.at_borders(specs_in(args), borders)
            x = self._called(graph, aten.constant_pad_nd.default, args[0], amounts) if any(amounts) else args[0]
            args = (x, *args[1:3], *rest)
        return args, kwargs

    def _borders(self, node: fx.Node, trip: Trip) -> dict[int, Halo]:
        """For each dimension along which a trip reaches over its chunk, the rows it wants that do not exist."""
        found: dict[int, Halo] = {}
        for n, use in enumerate(self.axes[node].uses):
            wanted = trip.loop.reach.rows_wanted(node, n, trip.start, trip.rows)
            if wanted:
                found |= {d: wanted[1] for d, _ in use.halo if trip.loop.nest[-1] in use.axes[d]}
        return found

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
            takes = None if node.target is to_host else takes
            if takes is not None:
                root = self._root(readings[takes].node)
                free = [i for i in free if self._root(readings[i].node) is not root]
            slicing = slicing_of(axes, loop.nest, loop.chunk, self.region.sizes)
            assert slicing is not None
            if node.target is to_host:
                home = tensor_spec(node.args[0]).device  # type: ignore[arg-type]
                outputs.append(Output(slicing, spec.shape, spec.stride, spec.dtype, host_of=home))
                continue
            like = next((i for i, d in enumerate(devices) if d == spec.device), None)
            device = spec.device if like is None else None
            outputs.append(Output(slicing, spec.shape, spec.stride, spec.dtype, like or 0, device, takes))
        return tuple(outputs)

    def _root(self, node: fx.Node) -> fx.Node:
        return self.storages.roots.get(node, node)

    def _may_take(self, loop: Loop, reading: Reading) -> bool:
        """The storage was allocated in this graph, dies in this loop, and each trip reads only its own slice of it."""
        root = self._root(reading.node)
        allocated = root in self.storages.position and self.storages.position[root] < loop.start
        if not allocated or root.target is to_host or self.storages.last[root] >= loop.stop:
            return False
        nest, reach = set(loop.nest), loop.reach.wanted
        return all(
            nest <= {atom for axis in use.axes for atom in axis}
            and not nest & use.reduced
            and reach.get((node, n), (0, 0)) == (0, 0)
            for node in loop.inside
            for n, use in enumerate(self.axes[node].uses)
            if self._root(use.node) is root
        )

    def _overlays(self, loop: Loop, node: fx.Node, over: fx.Node) -> bool:
        root = self._root(over)
        if not isinstance(node_spec(root), TensorSpec):  # one of several results: where it lies is not told
            return False
        return tensor_spec(over).numel == tensor_spec(root).numel and can_overlay(
            tensor_spec(node),
            self.axes[node].axes,
            tensor_spec(root),
            self.axes[root].axes,
            loop.nest,
            self.region.sizes,
        )


def _kinds(loop: Loop, size: int) -> tuple[tuple[int, ...], list[Trip]]:
    """Which body each chunk of the innermost atom runs, and one trip for each body."""
    found: dict[tuple[int, ...], Trip] = {}
    kinds: list[tuple[int, ...]] = []
    for start in range(0, size, loop.chunk):
        rows = min(loop.chunk, size - start)
        kinds.append(loop.reach.kind(start, rows))
        found.setdefault(kinds[-1], Trip(loop, start, rows))
    order = list(found)
    return tuple(order.index(kind) for kind in kinds), list(found.values())


def _operand_name(index: int, reading: Reading) -> str:
    """Bodies are shared by groups of equal structure, so operands are named by place and role."""
    return f"part_{index}" if reading.slicing else f"whole_{index}"
