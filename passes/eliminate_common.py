"""eliminate-common: compute equal calls once.

    before  a = linear(emb, w);  ...  b = linear(emb, w)
    after   every reader of b reads a

Only pure operators on the same operands; each temporal block recomputes the same frame embedding, for example. A large
value is never kept alive for a later twin: ``limit_bytes`` bounds what may be shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.graph.structure import literal_key


@dataclass(frozen=True)
class EliminateCommon:
    """Merge equal calls whose result takes at most ``limit_bytes``."""

    limit_bytes: int = 1 << 20

    def apply(self, program: Program, facts: FactTable) -> str:
        seen: dict[Any, fx.Node] = {}
        merged = 0
        for node in compute_nodes(program.graph):
            if not self._may_merge(node):
                continue
            key = (node.target, _key(node.args), _key(node.kwargs))
            first = seen.setdefault(key, node)
            if first is not node:
                edit.replace(node, first)
                merged += 1
        return f"{merged} calls merged" if merged else "nothing to merge"

    def _may_merge(self, node: fx.Node) -> bool:
        target, spec = node.target, node_spec(node)
        if not isinstance(target, torch._ops.OpOverload) or not isinstance(spec, TensorSpec):
            return False
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return False
        return spec.numel * spec.dtype.itemsize <= self.limit_bytes


def _key(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in sorted(value.items()))
    return value if isinstance(value, fx.Node) else literal_key(value)
