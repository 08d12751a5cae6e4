"""Which values a step may take from an earlier one, what each costs to keep, and what it saves.

Cutting a value saves the work of every operator whose result reaches the outputs through that value alone: the
subtree below it in the tree of post-dominators. A value through which every path from the clip passes can only be cut
as a residual, whose source lets the clip of this step in: else a step would repeat the last one, whatever it was called
with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

import networkx as nx
import torch
from torch import fx

from fmecompile.analysis.axes import GraphAxes, propagate
from fmecompile.analysis.blocks import Block, before, behind, block_stack, is_large
from fmecompile.analysis.cut_sets import CutSets, limit_of
from fmecompile.analysis.mixing import Mixing, called_in, classes_in, clip_atoms, clips, mixes, mixing
from fmecompile.errors import OptionError, near
from fmecompile.graph.program import Input, Program, compute_nodes
from fmecompile.graph.specs import tensor_spec
from fmecompile.operators.contraction import all_products

aten = torch.ops.aten
_END = "end"
_PATHS = "see the paths in model.named_modules()"
CLASS = "class:"  # in front of a pattern of class names, where else patterns are of paths
SYMBOLS = (
    "auto",
    "auto:BYTES",
    "last_up_temporal",
    "deep_feature",
    "block_stack",
    "block_residuals",
    "attention",
    "spatial_attention",
    "temporal_attention",
    "cross_attention",
)
"""The names of cuts that are no module paths."""


@dataclass(frozen=True)
class CutValue:
    """A value by the name of its node, the outermost module that returns it, its bytes, and the share of all work that
    a step saves which takes it. ``is_temporal``: it is made by modules that mix frames, among others. Of a residual,
    ``source`` is the node that it is the difference to."""

    value: str
    module: str
    nbytes: int
    saved: float
    is_temporal: bool
    source: str | None = None


class Cuts:
    """The values of one normalised program that may be cut."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = compute_nodes(program.graph)
        self.products = {node: all_products(node) for node in self.nodes}
        self.work = sum(self.products.values())
        self.paths = {node: tuple(called_in(node)) for node in self.nodes}
        self.place = {node: place for place, node in enumerate(program.graph.nodes)}
        self.axes: GraphAxes = propagate(program.graph)
        self.mixing: Mixing = mixing(program, self.axes)
        self.clips = clips(program) or _largest_input(program)
        self.moving = behind(self.clips)
        self.blocks: list[Block] = block_stack(program, self.moving)
        self._by_name = {node.name: node for node in program.graph.nodes}
        self._above = _post_dominators(program)
        self._saved = self._savings()
        self._fatal = {node for clip in self.clips for node in self.chain(clip)}

    def _savings(self) -> dict[fx.Node, int]:
        """Products that are not computed where a value is cut."""
        found = dict(self.products)
        for node in self.nodes:
            above = self._above.get(node)
            if isinstance(above, fx.Node):
                found[above] = found.get(above, 0) + found[node]
        return found

    def chain(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values through which everything passes that starts at ``node``."""
        above = self._above.get(node)
        while isinstance(above, fx.Node):
            yield above
            above = self._above.get(above)

    @cached_property
    def sets(self) -> CutSets:
        """The sets of values that are worth keeping together."""
        return CutSets(self)

    def alive(self, cut: Mapping[str, str | None]) -> set[fx.Node]:
        """What a step runs and reads that takes the values ``cut`` (names of nodes), each with its source if any."""
        taken = {self._by_name[value]: source for value, source in cut.items()}
        found: set[fx.Node] = set()
        waiting = [value for value in self.program.outputs if isinstance(value, fx.Node)]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            source = taken.get(node)
            waiting += node.all_input_nodes if node not in taken else [self._by_name[source]] if source else []
        return found

    def named(
        self, name: str | Sequence[str], mode: str = "feature", copies: int = 1, *, or_unreached: bool = False
    ) -> list[CutValue]:
        """The values that symbolic names of a policy stand for, or patterns of module paths; in mode ``residual`` with
        their sources. Values that no clip reaches are left out (``or_unreached``: unless there are no others), and so
        are those that nothing reads once the others are cut. Where a name sets a limit of bytes, ``copies`` of each
        value fit in it.

        Raises OptionError where there are none, with near names, and where such a step would repeat the last one.
        """
        names = [name] if isinstance(name, str) else name
        found = [value for each in names for value in self._reached(each, copies, or_unreached)]
        if mode == "residual":
            found = [self._with_source(value) for value in found]
        else:
            found = [replace(value, source=None) for value in found]
        alive = self.alive({value.value: value.source for value in found})
        if not alive & set(self.clips):
            raise OptionError(
                f"everything passes through {name!r}, so a step that reuses it would repeat the last one",
                next_step='use mode="residual", or name another value',
            )
        return list({value.value: value for value in found if self._by_name[value.value] in alive}.values())

    def _reached(self, name: str, copies: int, or_unreached: bool) -> list[CutValue]:
        """The values of one name that a clip reaches. Where it reaches none of them, all, or OptionError."""
        found = self.found(name, copies)
        reached = [value for value in found if self._by_name[value.value] in self.moving]
        if or_unreached and not reached:
            return found
        if found and not reached:
            raise OptionError(
                f"{name!r} is made of nothing that changes with the clip: {found[0].module or found[0].value}",
                next_step="name a module that the clip goes through",
            )
        return reached

    def found(self, name: str, copies: int = 1) -> list[CutValue]:
        """The values of one name; a source is set where the name says what it is."""
        kind = name.partition(":")[0]
        if kind == "auto":
            limit_bytes = limit_of(name)
            found = self.sets.automatic(self.best()) if limit_bytes is None else self.sets.within(limit_bytes, copies)
            return list(found.values)
        if kind == "last_up_temporal":
            return [self.last_up_temporal()]
        if kind == "deep_feature":
            return [self.deep_feature(*numbers(name, 1))]
        if kind == "block_stack":
            return self.block_stack(*numbers(name, 2))
        if kind == "block_residuals":
            return self.block_residuals()
        if kind in ("attention", "spatial_attention", "temporal_attention", "cross_attention"):
            found = self.attention(kind.removesuffix("attention").rstrip("_"))
            if not found:
                why = "name another cut, or leave that component out; attention over one key is none"
                raise OptionError(f"this model has no {kind.replace('_', ' ')}", next_step=why)
            return found
        return self.results_of(name)

    def _with_source(self, value: CutValue) -> CutValue:
        """The same as a residual, with what it saves so."""
        if value.source is None:
            value = replace(value, source=self._entering(value).name)
        return replace(value, saved=self.saved_by([value]))

    def saved_by(self, values: Iterable[CutValue]) -> float:
        """The share of all work that is saved by a step that takes all of ``values``."""
        running = self.running({value.value: value.source for value in values})
        return 1 - sum(self.products[node] for node in running) / max(self.work, 1)

    def running(self, cut: Mapping[str, str | None]) -> set[fx.Node]:
        """The calls among :meth:`alive`."""
        return {node for node in self.alive(cut) if node.name not in cut and node.op == "call_function"}

    def _entering(self, value: CutValue) -> fx.Node:
        """What enters the module of ``value`` and has its shape, the latest of those."""
        inside = {node for node in self.nodes if value.module in called_in(node)}
        shape = tensor_spec(self._by_name[value.value]).shape
        entering = [n for n in self.nodes if n not in inside and is_large(n) and inside & set(n.users)]
        alike = [n for n in entering if tensor_spec(n).shape == shape and n in self.moving]
        if not value.module or not alike:
            raise OptionError(
                f"{value.module or value.value} returns another shape than it takes, so it has no residual",
                next_step='use mode="feature", or another cut',
            )
        return alike[-1]

    def block_stack(self, head: int = 0, tail: int = 0) -> list[CutValue]:
        """What the stack of blocks returns, without its first ``head`` and last ``tail``.

        The source is what enters the stack; where that has another shape, the latest state of that shape in front of it
        (a UNet ends with the shape it begins with, not with that behind its first downsampler).
        """
        stack = self.stack(head + tail + 1)
        first, last = head, len(stack) - tail - 1
        return [
            replace(self.cut_value(value, stack[last].path), source=self._state_like(value, first))
            for value in stack[last].returns
        ]

    def _state_like(self, value: fx.Node, first: int) -> str | None:
        shape = tensor_spec(value).shape
        states = (state for block in reversed(self.blocks[: first + 1]) for state in block.takes)
        return next((state.name for state in states if tensor_spec(state).shape == shape), None)

    def stack(self, least: int) -> list[Block]:
        """The blocks, at least so many. Raises OptionError where there are fewer."""
        if len(self.blocks) < least:
            raise OptionError(
                f"this model has {len(self.blocks)} blocks, and the cut needs {least}",
                next_step="take fewer blocks at the head and the tail, or name a module instead",
            )
        return self.blocks

    def block_residuals(self) -> list[CutValue]:
        """What is added to the hidden state, before it is added, of every sum in a block."""
        found = []
        for block in self.stack(1):
            inside = {node for node in self.nodes if block.path in called_in(node)}
            for node in self.nodes:
                if node in inside and node.target is aten.add.Tensor and node in self.moving:
                    found += [self.cut_value(part, block.path) for part in self._part(node, inside)]
        return found

    def _part(self, total: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
        """Of a sum of a state and what was made of it in a block, the latter; none where both are states, as in a
        blend. A state that takes a shortcut is the one with less work behind it."""
        operands = [n for n in total.all_input_nodes if n in self.moving]
        if len(operands) != 2 or tensor_spec(operands[0]).shape != tensor_spec(operands[1]).shape:
            return []
        one, other = ({n, *before([n], inside)} & inside for n in operands)
        work = [sum(map(all_products, own)) for own in (one - other, other - one)]
        part = operands[0] if work[0] > work[1] else operands[1]
        return [part] if part in inside and _is_made(part, self.moving) else []

    def offered(self) -> list[CutValue]:
        """Results of modules whose cut saves work and leaves the clip a way to the output; the most saved first."""
        found = [self.cut_value(node, module) for node, module in self.results]
        return sorted((cut for cut in found if cut.saved), key=lambda cut: (-cut.saved, cut.nbytes))

    def best(self, limit_bytes: int | None = None, share: float = 0.01) -> CutValue:
        """What saves most within ``limit_bytes``; of those that save as much within ``share``, the smallest."""
        fitting = [cut for cut in self.offered() if limit_bytes is None or cut.nbytes <= limit_bytes]
        if not fitting:
            raise OptionError("no value of this model can be reused", next_step="allow more bytes, or leave out reuse")
        return min((c for c in fitting if c.saved >= fitting[0].saved - share), key=lambda c: (c.nbytes, -c.saved))

    def last_up_temporal(self) -> CutValue:
        """The result of the last layer that mixes frames behind which the clip still enters."""
        temporal = [cut for cut in self.offered() if cut.is_temporal]
        if not temporal:
            raise OptionError(
                "no layer of this model mixes frames and nothing else", next_step='name the cut, or use cut="auto"'
            )
        return temporal[0]

    def deep_feature(self, branch: int) -> CutValue:
        """What is joined with the skip connection of ``branch``; 0 is the outermost."""
        joins = self._joins()[::-1]
        if branch >= len(joins):
            raise OptionError(
                f"branch {branch} is asked for, and this model has {len(joins)} skip connections",
                next_step="give a smaller branch",
            )
        deep = joins[branch][1]
        return self.cut_value(deep, next(iter(called_in(deep)), ""))

    def _joins(self) -> list[tuple[fx.Node, fx.Node]]:
        """Where a skip connection is joined: what waited, and what was made of it meanwhile; in execution order."""
        found = []
        for node in self.nodes:
            operands = node.all_input_nodes if node.target is aten.cat.default else []
            pairs = (operands, operands[::-1]) if len(operands) == 2 else ()
            found += [(early, late) for early, late in pairs if before([late]) & set(_waiting(early))]
        return found

    def results_of(self, pattern: str) -> list[CutValue]:
        """Results of the modules whose path matches ``pattern``, or whose class does that behind ``class:``.

        Raises OptionError with near matches for none.
        """
        wanted = pattern.removeprefix(CLASS)
        modules = {path: kind for node in self.nodes for path, kind in classes_in(node).items()}
        matching = {path for path, kind in modules.items() if fnmatchcase(path if wanted == pattern else kind, wanted)}
        names = {node.name: place for node, place in self.place.items()}
        if not matching:
            raise OptionError(
                f"no module of this model is called {pattern!r}",
                next_step=near(wanted, [*(modules if wanted == pattern else modules.values()), *SYMBOLS], _PATHS),
            )
        found = [self.cut_value(node, path) for path in matching for node in self._leaving(path)]
        return sorted(found, key=lambda cut: names[cut.value])

    def attention(self, kind: str) -> list[CutValue]:
        """Results of the modules right around attention: over keys that no clip reaches (``cross``), over those of
        other frames alone (``temporal``), over any others (``spatial``), or all."""
        frames, space = clip_atoms(self.program, self.axes)
        found: dict[str, CutValue] = {}
        for node in self.nodes:
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            is_temporal = mixes(node, self.axes, frames) and not mixes(node, self.axes, space)
            own = "cross" if node.args[1] not in self.moving else "temporal" if is_temporal else "spatial"
            path = list(called_in(node))[-1]
            if kind in ("", own):
                for result in self._leaving(path):
                    found[result.name] = self.cut_value(result, path)
        return list(found.values())

    @cached_property
    def results(self) -> list[tuple[fx.Node, str]]:
        """Large results of modules, each with the outermost module that returns it."""
        return list(self._results())

    def _results(self) -> Iterator[tuple[fx.Node, str]]:
        for node in self.nodes:
            if node in self._fatal or not is_large(node):
                continue
            module = next((path for path in self.paths[node] if self._leaves(node, path)), None)
            if module is not None and not any(module.startswith(t + ".") for t in self.mixing.temporal):
                yield node, module

    def _leaving(self, path: str) -> Iterator[fx.Node]:
        for node in self.nodes:
            if path in self.paths[node] and self._leaves(node, path) and is_large(node):
                yield node

    def _leaves(self, node: fx.Node, path: str) -> bool:
        return any(path not in self.paths.get(user, ()) for user in node.users)

    def cut_value(self, node: fx.Node, module: str) -> CutValue:
        """A node as a value on offer; ``module`` is the path that stands for it."""
        spec = tensor_spec(node)
        nbytes = spec.numel * spec.dtype.itemsize
        return CutValue(node.name, module, nbytes, self._saved[node] / max(self.work, 1), module in self.mixing.frames)


def _post_dominators(program: Program) -> dict[object, object]:
    """For each node, the next one through which all its ways to the outputs pass."""
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        graph.add_edges_from((_END if user.op == "output" else user, node) for user in node.users)
    return dict(nx.immediate_dominators(graph, _END))


def _is_made(value: fx.Node, moving: set[fx.Node]) -> bool:
    """Whether a contraction (a linear, a convolution) stands between ``value`` and the last sum of states."""
    while value.op == "call_function" and not all_products(value):
        operands = [node for node in value.all_input_nodes if node in moving]
        if len(operands) != 1:
            return False
        value = operands[0]
    return value.op == "call_function"


def _largest_input(program: Program) -> list[fx.Node]:
    """Of a model that is called with tokens, the clip among its inputs."""
    bound = zip(program.placeholders, program.bindings, strict=True)
    inputs = [node for node, binding in bound if isinstance(binding, Input)]
    return [max(inputs, key=lambda node: tensor_spec(node).numel)] if inputs else []


def _waiting(node: fx.Node) -> Iterator[fx.Node]:
    """What may wait as a skip connection: ``node``, and what an input was added to for it, as a ControlNet's is."""
    yield node
    if node.target is aten.add.Tensor and any(operand.op == "placeholder" for operand in node.all_input_nodes):
        yield from (operand for operand in node.all_input_nodes if operand.op != "placeholder")


def numbers(name: str, most: int) -> list[int]:
    """The numbers behind a symbolic name: ``block_stack:1:0`` -> [1, 0]."""
    given = name.split(":")[1:]
    if len(given) > most or not all(part.isdecimal() for part in given):
        raise OptionError(
            f"{name!r} is not understood", next_step=f"give at most {most} whole numbers, separated by colons"
        )
    return [int(part) for part in given]
