"""step-reuse: graphs for steps that compute everything, and for steps that take values from an earlier one.

    before   a = down(x);  b = middle(a);  y = up(b, a)
    full     a = down(x);  b = middle(a);  y = up(b, a)    and b is kept
    shallow  a = down(x);  y = up(b', a)                   b' is what an earlier step kept

What only led to ``b`` is gone from the shallow graph. A residual (``source``) is kept as ``b - s`` and taken as
``s + r'``, so the source of this step enters; a forecast takes ``b'`` and its divided differences, and sums up a Taylor
polynomial whose coefficients are inputs, so that one graph serves every distance. What is kept in a smaller dtype
(``store``) is converted last and back first, and is the largest number of that dtype where it is beyond its range.

A step that decides by a probe, here ``a``, is split in front of the decision; its head is part of every variant:

    head     a = down(x)                                   a is kept until the end of the step, and nothing returned
    tails    as full and shallow, and a' is taken

so a tail is two rewrites: first what is reused, then ``down`` as one more component that is always taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import storages
from fmecompile.graph import edit
from fmecompile.graph.program import Coefficient, Kept, Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, specs_in, tensor_spec
from fmecompile.operators.contraction import products
from fmecompile.runtime.measure import rounded_bytes

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A value, by the name of its node, that may be taken from an earlier step; kept under ``name``, together with the
    others of its ``component``. A residual is kept as its difference to ``source``. ``store`` is the dtype that it is
    kept in, None for its own."""

    name: str
    value: str
    component: str
    source: str | None = None
    store: torch.dtype | None = None


@dataclass(frozen=True)
class StepReuse:
    """Turn a program into the variant that takes the components ``reused`` from an earlier step, and keeps those cuts
    of the others that it still computes. ``order`` is that of the forecast, 0 for the value itself. ``is_head``:
    nothing else is returned, so nothing else is computed."""

    cuts: Sequence[Cut]
    reused: frozenset[str] = frozenset()
    order: int = 0
    is_head: bool = False

    def apply(self, program: Program, facts: FactTable) -> str:
        before = sum(map(products, compute_nodes(program.graph)))
        nodes = {node.name: node for node in program.graph.nodes}
        if self.is_head:
            edit.return_nothing(program)
        coefficients = {component: self._coefficients(program, component) for component in sorted(self.reused)}
        for cut in self.cuts:
            if cut.component in self.reused and cut.value in nodes:
                self._take(program, cut, nodes, coefficients[cut.component], facts)
        if not self.is_head:
            edit.drop_unused(program)
        alive = {node.name for node in compute_nodes(program.graph)}
        for cut in self.cuts:
            if cut.component not in self.reused and cut.value in alive:
                self._keep(program, cut, nodes, facts)
        edit.drop_unused(program)
        after = sum(map(products, compute_nodes(program.graph)))
        less = f", {1 - after / before:.1%} less work" if before else ""
        return f"{len(self.reused)} values taken, {len(program.keeps)} kept{less}"

    def _coefficients(self, program: Program, component: str) -> list[fx.Node]:
        spec = TensorSpec((), (), torch.float64, torch.device("cpu"))
        orders = range(1, self.order + 1)
        return [
            edit.add_placeholder(program, f"coefficient_{_slug(component, k)}", Coefficient(k, component), spec)
            for k in orders
        ]

    def _take(
        self,
        program: Program,
        cut: Cut,
        nodes: dict[str, fx.Node],
        coefficients: list[fx.Node],
        facts: FactTable,
    ) -> None:
        value = nodes[cut.value]
        held = self._held_spec(cut, nodes, facts)
        orders = range(len(coefficients) + 1)
        kept = [edit.add_placeholder(program, f"kept_{_slug(cut.name, k)}", Kept(cut.name, k), held) for k in orders]
        made = _restored(value, nodes.get(cut.source or ""), kept, coefficients)
        edit.annotate(made, facts)
        edit.replace_by(value, made[-1] if made else kept[0])

    def _keep(self, program: Program, cut: Cut, nodes: dict[str, fx.Node], facts: FactTable) -> None:
        edit.return_also(program, cut.name, self._kept(program, cut, nodes, facts))

    def _kept(self, program: Program, cut: Cut, nodes: dict[str, fx.Node], facts: FactTable) -> fx.Node:
        """The tensor that is kept of a cut: a storage of its own, no more than that tensor."""
        value = nodes[cut.value]
        made: list[fx.Node] = []
        for target, others in _conversions(cut, tensor_spec(value).dtype, nodes):
            last = made[-1] if made else value
            made.append(edit.insert_before(last.next, target, (last, *others), like=value))
        if not made and _shares(value, program, facts):
            made.append(edit.insert_before(value.next, aten.clone.default, (value,), like=value))
        edit.annotate(made, facts)
        return made[-1] if made else value

    def _held_spec(self, cut: Cut, nodes: dict[str, fx.Node], facts: FactTable) -> TensorSpec:
        """The spec of what :meth:`_kept` makes."""
        held = spec = tensor_spec(nodes[cut.value])
        for target, others in _conversions(cut, spec.dtype, nodes) or [(aten.clone.default, ())]:
            held = facts(target, (held, *specs_in(others)), {}).result
        return held


def _conversions(cut: Cut, dtype: torch.dtype, nodes: dict[str, fx.Node]) -> list[tuple[OpOverload, tuple[Any, ...]]]:
    """The calls that make what is kept of a value of ``dtype``, each on the last one's result and other operands."""
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    if cut.source is not None:
        calls.append((aten.sub.Tensor, (nodes[cut.source],)))
    if cut.store not in (None, dtype):
        most = torch.finfo(cut.store).max
        calls += [(aten.clamp.default, (-most, most)), (aten.to.dtype, (cut.store,))]
    return calls


def _restored(
    value: fx.Node, source: fx.Node | None, kept: list[fx.Node], coefficients: list[fx.Node]
) -> list[fx.Node]:
    """Calls in front of ``value`` that make it of what was kept."""
    made: list[fx.Node] = []

    def call(target: OpOverload, *operands: Any) -> fx.Node:
        made.append(edit.insert_before(value, target, operands, like=value))
        return made[-1]

    def wide(held: fx.Node) -> fx.Node:
        dtype = tensor_spec(value).dtype
        return held if tensor_spec(held).dtype == dtype else call(aten.to.dtype, held, dtype)

    now = wide(kept[0])
    for difference, coefficient in zip(kept[1:], coefficients, strict=True):
        now = call(aten.add.Tensor, now, call(aten.mul.Tensor, wide(difference), coefficient))
    if source is not None:
        call(aten.add.Tensor, source, now)
    return made


def _shares(value: fx.Node, program: Program, facts: FactTable) -> bool:
    """Whether ``value`` lies in a storage with more than itself, or one that the module returns."""
    held = storages(compute_nodes(program.graph), (), facts)
    root = held.roots[value]
    returned = any(isinstance(v, fx.Node) and held.roots.get(v, v) is root for v in program.outputs)
    spec = tensor_spec(value)
    return (
        root not in held.position
        or returned
        or held.nbytes[held.position[root]] > rounded_bytes(spec.numel * spec.dtype.itemsize)
    )


def _slug(name: str, order: int) -> str:
    return "".join(c if c.isalnum() else "_" for c in name) + (f"_{order}" if order else "")
