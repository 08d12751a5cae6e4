"""recompute: make a value twice, once for the statistics of its GroupNorm and once for what reads it after.

    before  h = conv(a);  m = group_norm_moments(h, 32);  s = group_norm_statistics(m, eps);  y = group_norm_apply(h, s)
    after   k = conv(a);  m = group_norm_moments(k, 32);  s = group_norm_statistics(m, eps);  h = conv(a);
            y = group_norm_apply(h, s)

Each half then fits in a loop of its own, and ``h`` never exists as a whole. Costs the work of the calls made twice, so
the partition asks for it by name, where the peak is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import Storages, storages
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY, GROUP_NORM_MOMENTS
from fmecompile.operators.contraction import products
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments

MAX_CHAIN = 12
"""Calls made twice for one GroupNorm, at most."""

_MOMENTS, _APPLY = (group_norm_moments, GROUP_NORM_MOMENTS), (group_norm_apply, GROUP_NORM_APPLY)


@dataclass(frozen=True)
class Chain:
    """What would be made twice for the ``moments`` of a GroupNorm: calls in execution order, the last of which gives
    its operand; ``lifted`` are other readers that would move in front of ``apply``; ``work`` counts products."""

    moments: fx.Node
    apply: fx.Node
    calls: tuple[fx.Node, ...]
    lifted: tuple[fx.Node, ...]
    work: int

    @property
    def value(self) -> fx.Node:
        return self.calls[-1]


@dataclass(frozen=True)
class Recompute:
    """Make the operands of the moments called ``names`` twice."""

    names: Sequence[str]

    def apply(self, program: Program, facts: FactTable) -> str:
        done = 0
        for name in self.names:
            chain = next((c for c in chains(program, facts) if c.moments.name == name), None)
            if chain is not None:
                _rewrite(chain)
                edit.drop_dead(program.graph)  # a copy that only the present one read
                edit.annotate(compute_nodes(program.graph), facts)
                done += 1
        return f"{done} values made twice" if done else "no value made twice"


def _rewrite(chain: Chain) -> None:
    copies: dict[fx.Node, fx.Node] = {}
    for call in chain.calls:
        copies[call] = edit.clone_before(call, chain.moments, copies)
    edit.read_instead(chain.moments, chain.value, copies[chain.value])
    for call in (*chain.calls, *chain.lifted):
        edit.move_before(call, chain.apply)


def chains(program: Program, facts: FactTable) -> list[Chain]:
    """Every GroupNorm whose operand may be made twice, and what that takes."""
    nodes = compute_nodes(program.graph)
    held = storages(nodes, program.outputs, facts)
    found = (_chain(node, held) for node in nodes if node.target in _MOMENTS)
    return [chain for chain in found if chain is not None]


def _chain(moments: fx.Node, held: Storages) -> Chain | None:
    value = moments.args[0]
    apply = next((user for s in moments.users for user in s.users if user.target in _APPLY), None)
    if apply is None or not isinstance(value, fx.Node) or value not in held.position:
        return None
    lifted = [user for user in value.users if user not in (moments, apply)]
    if any(not _may_lift(user, value, apply, held) for user in lifted):
        return None
    calls = _private(value, apply, held)
    if not calls or len(calls) > MAX_CHAIN or held.roots[value] is not value:
        return None
    return Chain(moments, apply, calls, tuple(lifted), sum(map(products, calls)))


def _may_lift(user: fx.Node, value: fx.Node, apply: fx.Node, held: Storages) -> bool:
    """Whether a reader behind ``apply`` can run in front of it and leaves less than it reads."""
    ready = all(held.position.get(n, -1) < held.position[apply] for n in user.all_input_nodes)
    own = held.roots.get(user) is user and held.nbytes[held.position[user]] < held.nbytes[held.position[value]]
    return ready and own


def _private(value: fx.Node, apply: fx.Node, held: Storages) -> tuple[fx.Node, ...]:
    """``value`` and the large values in front of it that nothing else needs, in execution order."""
    size, end = held.nbytes[held.position[value]], held.position[apply]
    taken = {value}
    waiting = list(value.all_input_nodes)
    while waiting:
        node = waiting.pop()
        at = held.position.get(node)
        if at is None or node in taken:
            continue
        root = held.roots[node]
        is_large = root in held.position and 2 * held.nbytes[held.position[root]] > size
        stays = root not in held.position or held.last[root] > end
        if is_large and not stays and all(user in taken for user in node.users):
            taken.add(node)
            waiting += node.all_input_nodes
    return tuple(sorted(taken, key=lambda node: held.position[node]))
