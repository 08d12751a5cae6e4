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

from fmecompile.analysis.facts import CallFacts, FactTable
from fmecompile.analysis.storages import owners_of_parts, part_of, tensor_operands
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import module_path
from fmecompile.graph.plan import OPERAND, RESULT, RUNNING, WAITING, Owner
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
    owners: tuple[Owner, ...]
    """What lives at the peak, largest first."""

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
        self._parts: dict[fx.Node, list[Hashable]] = {}

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
        parts = self._parts[node] = self._owners_of_parts(node, call)
        part = part_of(node)
        self._of[node] = self._parts[part[0]][part[1]] if part else node if node in parts else parts[0]
        allocates: dict[Hashable, int] = {node: sum(call.nbytes)} if node in parts and part is None else {}
        return _Effect(allocates, touched | {self._of[node]}, call.hidden_bytes)

    def _owners_of_parts(self, node: fx.Node, call: CallFacts) -> list[Hashable]:
        return owners_of_parts(node, call, [self.of(operand) for operand in tensor_operands(node)])

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
    moments, peak, at_peak, held = [], -1, -1, {}
    total = 0
    for at, (node, effect) in enumerate(zip(nodes, effects, strict=True)):
        own = sum(effect.allocates.values()) + effect.hidden_bytes
        moments.append(Moment(node, total, own))
        live.update(effect.allocates)
        total += sum(effect.allocates.values())
        if moments[-1].total_bytes > peak:
            peak, at_peak, held = moments[-1].total_bytes, at, dict(live)
        for owner in expire.get(at, ()):
            total -= live.pop(owner, 0)
    return Projection(tuple(moments), _owners(nodes, effects, at_peak, held))


def _owners(
    nodes: list[fx.Node], effects: list[_Effect], at_peak: int, held: Mapping[Hashable, int]
) -> tuple[Owner, ...]:
    """What is ``held`` while the call at ``at_peak`` runs, by what it has to do with that call."""
    if at_peak < 0:
        return ()
    node, effect = nodes[at_peak], effects[at_peak]
    readers: dict[Hashable, str] = {}
    for later, touching in zip(nodes[at_peak + 1 :], effects[at_peak + 1 :], strict=True):
        for owner in touching.touches & held.keys():
            readers.setdefault(owner, module_path(later))
    found = [Owner(f"{node.name} while it runs", effect.hidden_bytes, RUNNING, module_path(node), "")]
    for owner, nbytes in held.items():
        if nbytes:
            role = RESULT if owner in effect.allocates else OPERAND if owner in effect.touches else WAITING
            maker = owner[0] if isinstance(owner, tuple) else owner
            made_in = module_path(maker) if isinstance(maker, fx.Node) else ""
            found.append(Owner(_label(owner), nbytes, role, made_in, readers.get(owner, "")))
    return tuple(sorted((owner for owner in found if owner.nbytes), key=lambda owner: -owner.nbytes))


def _label(owner: Hashable) -> str:
    if isinstance(owner, tuple):
        return f"{owner[0]}[{owner[1]}]"
    return str(owner)
