"""The memory model: projected bytes of a finished program, plain calls and chunk loops alike.

A call holds what lives across it, its results, and what it needs while it runs; a loop holds its whole operands and
outputs and the most that the trips under way at once hold. All of it is arithmetic over facts that were measured once
per distinct call.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import tensor_operands
from fmecompile.graph.group import Group
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import specs_in


@dataclass(frozen=True)
class Moment:
    """What is held while one node runs: ``live_bytes`` across it, ``own_bytes`` of it."""

    node: fx.Node
    live_bytes: int
    own_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.live_bytes + self.own_bytes


@dataclass(frozen=True)
class Projection:
    """Projected bytes of activations, node by node; weights and inputs are not in it."""

    moments: tuple[Moment, ...]
    owners: tuple[tuple[str, int], ...]
    """Storages that live at the peak and their bytes, largest first; the last entry may be the running call itself."""

    @property
    def peak_bytes(self) -> int:
        return max((m.total_bytes for m in self.moments), default=0)

    @property
    def peak_node(self) -> fx.Node | None:
        return max(self.moments, key=lambda m: m.total_bytes).node if self.moments else None


@dataclass(frozen=True)
class _Effect:
    """What one node allocates (bytes by owner), which storages it touches, and what it holds while it runs."""

    allocates: dict[Hashable, int]
    touches: frozenset[Hashable]
    hidden_bytes: int


class _Owners:
    """Follows which storage every value lives in through views, loops and take-overs."""

    def __init__(self, groups: Mapping[str, Group], facts: FactTable) -> None:
        self._groups, self._facts = groups, facts
        self._of: dict[fx.Node, Hashable] = {}
        self._loops: dict[fx.Node, list[Hashable]] = {}

    def of(self, value: object) -> Hashable:
        """The owner of a value; graph inputs own themselves."""
        return self._of.get(value, value) if isinstance(value, fx.Node) else value

    def effect(self, node: fx.Node) -> _Effect:
        touched = frozenset(self.of(n) for n in node.all_input_nodes)
        if node.op == "call_module":
            return self._loop(node, touched)
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and source in self._loops:
            self._of[node] = self._loops[source][node.args[1]]  # type: ignore[index]
            return _Effect({}, frozenset([self._of[node]]), 0)
        call = self._facts(node.target, specs_in(node.args), specs_in(node.kwargs))  # type: ignore[arg-type]
        operands = tensor_operands(node)
        shared = next((operands[a] for a in call.alias if a is not None), None)
        self._of[node] = node if shared is None else self.of(shared)
        allocates: dict[Hashable, int] = {node: sum(call.nbytes)} if shared is None else {}
        return _Effect(allocates, touched | {self._of[node]}, call.hidden_bytes)

    def _loop(self, node: fx.Node, touched: frozenset[Hashable]) -> _Effect:
        group = self._groups[str(node.target)]
        owners: list[Hashable] = []
        allocates: dict[Hashable, int] = {}
        for k, output in enumerate(group.spec.outputs):
            if output.takes is None:
                owners.append((node, k))
                allocates[owners[-1]] = group.result_bytes[k]
            else:
                owners.append(self.of(node.args[output.takes]))
        self._loops[node] = owners
        return _Effect(allocates, touched | frozenset(owners), group.working_bytes)


def project(program: Program, groups: Mapping[str, Group], facts: FactTable) -> Projection:
    """Project ``program``, whose ``call_module`` nodes are the loops of ``groups`` by name."""
    nodes = compute_nodes(program.graph)
    owners = _Owners(groups, facts)
    effects = [owners.effect(node) for node in nodes]
    last: dict[Hashable, int] = {}
    for at, effect in enumerate(effects):
        for owner in (*effect.allocates, *effect.touches):
            last[owner] = at
    for value in program.outputs:
        last[owners.of(value)] = len(nodes)
    return _accumulate(nodes, effects, last)


def _accumulate(nodes: list[fx.Node], effects: list[_Effect], last: dict[Hashable, int]) -> Projection:
    expire: dict[int, list[Hashable]] = {}
    for owner, at in last.items():
        expire.setdefault(at, []).append(owner)
    live: dict[Hashable, int] = {}
    moments, peak, owners = [], -1, ()
    total = 0
    for at, (node, effect) in enumerate(zip(nodes, effects, strict=True)):
        own = sum(effect.allocates.values()) + effect.hidden_bytes
        moments.append(Moment(node, total, own))
        live.update(effect.allocates)
        total += sum(effect.allocates.values())
        if moments[-1].total_bytes > peak:
            peak = moments[-1].total_bytes
            held = [(_label(owner), size) for owner, size in live.items() if size]
            owners = (*held, (f"{node.name} while it runs", effect.hidden_bytes))
        for owner in expire.get(at, ()):
            total -= live.pop(owner, 0)
    return Projection(tuple(moments), tuple(sorted(owners, key=lambda item: -item[1])))


def _label(owner: Hashable) -> str:
    if isinstance(owner, tuple):
        return f"{owner[0]}[{owner[1]}]"
    return str(owner)
