"""Atom propagation: which axes every operator of a graph keeps, reduces and bars.

One walk in topological order applies each operator's rule; atoms are resolved to their finest parts at the end, since
a later reshape may split an atom that earlier operators carried.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from fmecompile.graph.atoms import AtomTable
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators import RULES
from fmecompile.operators.registry import Axes, Call, Halo, Operand, Result, positional


@dataclass(frozen=True)
class Use:
    """One occurrence of a tensor among a call's arguments: its axes, which of them the call keeps, the atoms it
    reduces, and the halos of kept dimensions. A tensor that occurs twice (the query and the key of an attention) has
    two uses, in argument order."""

    node: fx.Node
    axes: Axes
    reduced: frozenset[int]
    kept_dims: frozenset[int]
    halo: tuple[tuple[int, Halo], ...] = ()


@dataclass(frozen=True)
class NodeAxes:
    """The axes of a node's result, and the atoms a loop may (``carries``) and may not (``barred``) slice it along."""

    axes: Axes
    carries: frozenset[int]
    barred: frozenset[int]
    uses: tuple[Use, ...]
    reason: str = ""


@dataclass(frozen=True)
class GraphAxes:
    """Axes of every tensor node of one graph. ``barriers`` are the operators without a rule, with their reason."""

    table: AtomTable
    nodes: dict[fx.Node, NodeAxes]
    barriers: dict[fx.Node, str]

    def __getitem__(self, node: fx.Node) -> NodeAxes:
        return self.nodes[node]


def propagate(graph: fx.Graph) -> GraphAxes:
    """Axes of every node of ``graph``, whose specs must be known."""
    table = AtomTable()
    raw: dict[fx.Node, tuple[Result, tuple[Operand, ...]]] = {}
    barriers: dict[fx.Node, str] = {}
    for node in graph.nodes:
        spec = node_spec(node)
        if node.op == "output" or spec is None:
            continue
        operands: list[Operand] = []

        def occurrence(n: fx.Node, operands: list[Operand] = operands) -> Any:
            operands.append(_operand(n, raw))
            return operands[-1]

        args, kwargs = fx.map_arg(node.args, occurrence), fx.map_arg(node.kwargs, occurrence)
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not isinstance(spec, TensorSpec):
            if node.op == "call_function":
                barriers[node] = f"no axis rule for {node.target}"
            result = _opaque(table, spec)
        elif not spec.shape and all(operand.spec and not operand.spec.shape for operand in operands):
            result = Result(())  # a number made of numbers, whatever dimensions the call names
        else:
            args, kwargs = positional(node.target, args, kwargs)
            result = rule.rule(Call(table, operands, spec.shape), *args, **kwargs)
        raw[node] = (result, tuple(operands))
    return GraphAxes(table, {node: _resolved(table, *found) for node, found in raw.items()}, barriers)


def _operand(node: fx.Node, raw: dict[fx.Node, tuple[Result, tuple[Operand, ...]]]) -> Operand:
    spec = node_spec(node)
    if isinstance(spec, TensorSpec):
        return Operand(node, spec, raw[node][0].axes)
    return Operand(node, spec, ())


def _opaque(table: AtomTable, spec: Any) -> Result:
    """Graph inputs carry fresh axes; so do results of operators without a rule, which come whole."""
    shape = spec.shape if isinstance(spec, TensorSpec) else ()
    return Result(tuple(table.fresh(size) for size in shape), frozenset(range(len(shape))), "no axis rule")


def _resolved(table: AtomTable, result: Result, operands: tuple[Operand, ...]) -> NodeAxes:
    axes = tuple(table.resolve(axis) for axis in result.axes)
    atoms = [atom for axis in axes for atom in axis]
    whole = {atom for d in result.whole for atom in axes[d]}
    twice = {atom for atom in atoms if atoms.count(atom) > 1}
    inner = {atom for o in operands for d in o.halo for atom in table.resolve(o.axes[d])[1:]}
    barred = frozenset(whole | twice | inner)
    reason = result.reason or ("one axis occurs in two dimensions" if twice else "")
    reason = reason or ("rows of an inner part have their neighbours in another row of the outer one" if inner else "")
    return NodeAxes(axes, frozenset(atoms) - barred, barred, tuple(_use(table, o, atoms) for o in operands), reason)


def _use(table: AtomTable, operand: Operand, made: Collection[int]) -> Use:
    """``made`` are the atoms of the result: whatever the call keeps of others, all of it goes into each row."""
    axes = tuple(table.resolve(axis) for axis in operand.axes)
    atoms = [atom for axis in axes for atom in axis]
    reduced = {atom for d, axis in enumerate(axes) for atom in axis if d not in operand.kept or atom not in made}
    reduced |= {atom for atom in atoms if atoms.count(atom) > 1}
    reduced |= {atom for d in operand.halo for atom in axes[d][1:]}  # inner atoms: their rows have neighbours elsewhere
    return Use(
        operand.node,
        axes,
        frozenset(reduced),
        frozenset(operand.kept),
        tuple((d, rows) for d, rows in operand.halo.items() if axes[d]),
    )
