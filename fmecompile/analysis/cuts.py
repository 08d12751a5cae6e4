"""Which values a step may take from an earlier one, what each costs to keep, and what it saves.

Cutting a value saves the work of every operator whose result reaches the outputs through that value alone: the
subtree below it in the tree of post-dominators. A cut through which every path from the clip passes is none: such a
step would repeat the last one, whatever it was called with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import networkx as nx
import torch
from torch import fx

from fmecompile.analysis.axes import GraphAxes, propagate
from fmecompile.analysis.mixing import Mixing, called_in, clip_atoms, clips, mixes, mixing
from fmecompile.errors import OptionError
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.contraction import all_products

aten = torch.ops.aten
_END = "end"


@dataclass(frozen=True)
class CutValue:
    """A value by the name of its node, the outermost module that returns it, its bytes, and the share of all work that
    a step saves which takes it. ``is_temporal``: it is made by modules that mix frames, among others."""

    value: str
    module: str
    nbytes: int
    saved: float
    is_temporal: bool


class Cuts:
    """The values of one normalised program that may be cut."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = compute_nodes(program.graph)
        self.place = {node: place for place, node in enumerate(program.graph.nodes)}
        self.axes: GraphAxes = propagate(program.graph)
        self.mixing: Mixing = mixing(program, self.axes)
        self._above = _post_dominators(program)
        self._saved = self._savings()
        self._fatal = {node for clip in clips(program) for node in self._chain(clip)}

    def _savings(self) -> dict[fx.Node, int]:
        """Products that are not computed where a value is cut."""
        found = {node: all_products(node) for node in self.nodes}
        for node in self.nodes:
            above = self._above.get(node)
            if isinstance(above, fx.Node):
                found[above] = found.get(above, 0) + found[node]
        return found

    def _chain(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values through which everything passes that starts at ``node``."""
        above = self._above.get(node)
        while isinstance(above, fx.Node):
            yield above
            above = self._above.get(above)

    @property
    def work(self) -> int:
        """Products of a whole call."""
        return sum(map(all_products, self.nodes))

    def named(self, name: str) -> list[CutValue]:
        """The values that a symbolic name of a policy stands for, or a pattern of module paths."""
        kind, _, option = name.partition(":")
        if kind == "auto":
            return [self.best()]
        if kind == "last_up_temporal":
            return [self.last_up_temporal()]
        if kind == "deep_feature":
            return [self.deep_feature(int(option or 0))]
        if kind == "attention" or kind.endswith("_attention"):
            return self.attention(kind.removesuffix("attention").rstrip("_"))
        return self.results_of(name)

    def offered(self) -> list[CutValue]:
        """Results of modules whose cut saves work and leaves the clip a way to the output; the most saved first."""
        found = [self._cut_value(node, module) for node, module in self._results()]
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
        return self._cut_value(deep, next(iter(called_in(deep)), ""))

    def _joins(self) -> list[tuple[fx.Node, fx.Node]]:
        """Where a skip connection is joined: what waited, and what was made of it meanwhile; in execution order."""
        found = []
        for node in self.nodes:
            operands = node.all_input_nodes if node.target is aten.cat.default else []
            pairs = (operands, operands[::-1]) if len(operands) == 2 else ()
            found += [(early, late) for early, late in pairs if _ancestors(late) & set(_waiting(early))]
        return found

    def results_of(self, pattern: str) -> list[CutValue]:
        """Results of the modules whose path matches ``pattern``. Raises OptionError with near matches for none."""
        paths = {path for node in self.nodes for path in called_in(node)}
        matching = {path for path in paths if fnmatchcase(path, pattern)}
        names = {node.name: place for node, place in self.place.items()}
        if not matching:
            raise OptionError(f"no module of this model is called {pattern!r}", next_step=_near(pattern, paths))
        found = [self._cut_value(node, path) for path in matching for node in self._leaving(path)]
        return sorted(found, key=lambda cut: names[cut.value])

    def attention(self, kind: str) -> list[CutValue]:
        """Results of the modules right around attention: over ``spatial``, ``temporal`` or ``cross`` keys, or all."""
        frames, space = clip_atoms(self.program, self.axes)
        found: dict[str, CutValue] = {}
        for node in self.nodes:
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            is_temporal, is_spatial = mixes(node, self.axes, frames), mixes(node, self.axes, space)
            own = "temporal" if is_temporal else "spatial" if is_spatial else "cross"
            path = list(called_in(node))[-1]
            if kind in ("", own):
                for result in self._leaving(path):
                    found[result.name] = self._cut_value(result, path)
        return list(found.values())

    def _results(self) -> Iterator[tuple[fx.Node, str]]:
        """Large results of modules, each with the outermost module that returns it."""
        for node in self.nodes:
            if node in self._fatal or not _is_large(node):
                continue
            module = next((path for path in called_in(node) if self._leaves(node, path)), None)
            if module is not None and not any(module.startswith(t + ".") for t in self.mixing.temporal):
                yield node, module

    def _leaving(self, path: str) -> Iterator[fx.Node]:
        for node in self.nodes:
            if path in called_in(node) and self._leaves(node, path) and _is_large(node):
                yield node

    def _leaves(self, node: fx.Node, path: str) -> bool:
        return any(path not in called_in(user) for user in node.users)

    def _cut_value(self, node: fx.Node, module: str) -> CutValue:
        spec = node_spec(node)
        nbytes = spec.numel * spec.dtype.itemsize
        return CutValue(node.name, module, nbytes, self._saved[node] / max(self.work, 1), module in self.mixing.frames)


def _post_dominators(program: Program) -> dict[object, object]:
    """For each node, the next one through which all its ways to the outputs pass."""
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        graph.add_edges_from((_END if user.op == "output" else user, node) for user in node.users)
    return dict(nx.immediate_dominators(graph, _END))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def _waiting(node: fx.Node) -> Iterator[fx.Node]:
    """What may wait as a skip connection: ``node``, and what an input was added to for it, as a ControlNet's is."""
    yield node
    if node.target is aten.add.Tensor and any(operand.op == "placeholder" for operand in node.all_input_nodes):
        yield from (operand for operand in node.all_input_nodes if operand.op != "placeholder")


def _is_large(node: fx.Node) -> bool:
    spec = node_spec(node)
    return isinstance(spec, TensorSpec) and len(spec.shape) > 1


def _near(wanted: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(wanted, list(names), 3, 0.4)
    return f"near it are {', '.join(near)}" if near else "see the paths in model.named_modules()"
