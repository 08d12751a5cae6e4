"""own-outputs: what eager returns in a storage of its own is returned so, for the caller to write to.

    before  b = relu(x);  return (b, b, const_arange)      of  return (relu(x), relu(x), arange(4))
    after   b = relu(x);  c = clone(b);  d = clone(const_arange);  return (b, c, d)

Passes erase copies, compute equal calls once, and make constants once; inside the graph nobody sees that. A caller who
writes to what it got would, and the next call would read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import storages
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec

aten = torch.ops.aten


@dataclass(frozen=True)
class Returned:
    """One output as captured: which storage it lies in (equal for outputs of one storage), whether that is one that the
    caller knows already (of an input or a weight), and its strides."""

    storage: str
    is_given: bool
    stride: tuple[int, ...]
    overlaps: bool = False


def returned(program: Program, facts: FactTable) -> tuple[Returned | None, ...]:
    """Each output of ``program``; None for what is no tensor."""
    roots = storages(compute_nodes(program.graph), program.outputs, facts).roots
    return tuple(_returned(value, roots) for value in program.outputs)


def _returned(value: object, roots: dict[fx.Node, fx.Node]) -> Returned | None:
    if not isinstance(value, fx.Node) or not isinstance(node_spec(value), TensorSpec):
        return None
    root = roots.get(value, value)
    spec = node_spec(value)
    return Returned(root.name, root.op == "placeholder", spec.stride, _overlaps(spec))


def _overlaps(spec: TensorSpec) -> bool:
    """Whether two elements may lie at one place: some dimension does not step over all that finer ones reach."""
    reach = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(spec.stride, spec.shape, strict=True) if size > 1
    ):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


@dataclass(frozen=True)
class OwnOutputs:
    """Copy outputs that lie where those that were ``captured`` did not."""

    captured: Sequence[Returned | None]

    def apply(self, program: Program, facts: FactTable) -> str:
        taken: dict[str, str] = {}
        values, copied = list(program.outputs), 0
        pairs = zip(self.captured, returned(program, facts), strict=False)  # behind outputs is what later steps take
        for k, (before, now) in enumerate(pairs):
            if before is None or now is None or before.is_given:
                continue
            is_shared = now.is_given or taken.setdefault(now.storage, before.storage) != before.storage
            if is_shared or now.overlaps > before.overlaps:
                values[k] = self._copy(program, values[k], taken, before)
                copied += 1
        edit.return_instead(program, values)
        edit.annotate(compute_nodes(program.graph), facts)
        return f"{copied} outputs copied" if copied else "no output lies in memory of others"

    def _copy(self, program: Program, value: fx.Node, taken: dict[str, str], before: Returned) -> fx.Node:
        """A dense copy in front of the output, its dimensions in memory in the order in which they were."""
        order = sorted(range(len(before.stride)), key=lambda d: (-before.stride[d], d))
        back = [order.index(d) for d in range(len(order))]
        copy = self._call(program, aten.permute.default, value, order)
        copy = self._call(program, aten.clone.default, copy)
        edit.retarget(copy, copy.target, copy.args, {"memory_format": torch.contiguous_format})  # type: ignore[arg-type]
        taken[copy.name] = before.storage
        return self._call(program, aten.permute.default, copy, back)

    def _call(self, program: Program, target: Any, value: fx.Node, *args: Any) -> fx.Node:
        if target is aten.permute.default and args[0] == sorted(args[0]):
            return value
        return edit.insert_before(program.output, target, (value, *args), like=value)
