"""accept-strides: drop a change of layout whose readers compute the same in any layout.

    before  c = contiguous(permute(y, [0, 3, 1, 2]));  z = add(c, r)      r is contiguous
    after   z = add(r, permute(y, [0, 3, 1, 2]))

The operand in front decides how a sum is laid out; so the sum keeps its layout, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec

aten = torch.ops.aten

_COPIES = (aten.contiguous.default, aten.clone.default)
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class AcceptStrides:
    """Let sums and products read what was copied only to be laid out like their other operand."""

    def apply(self, program: Program, facts: FactTable) -> str:
        nbytes = dropped = 0
        for node in compute_nodes(program.graph):
            others = [_other(reader, node) for reader in node.users]
            if node.target not in _COPIES or not others or not all(_is_like(other, node) for other in others):
                continue
            spec = tensor_spec(node)
            nbytes += spec.numel * spec.dtype.itemsize
            dropped += 1
            for reader, other in zip(list(node.users), others, strict=True):
                edit.retarget(reader, reader.target, (other, node.args[0]), {})  # type: ignore[arg-type]
            edit.erase([node])
        return f"{dropped} copies dropped, {nbytes >> 20} MiB" if dropped else "no copy to drop"


def _other(reader: fx.Node, node: fx.Node) -> Any:
    """The operand of a sum or product beside ``node``; None of any other call."""
    is_plain = reader.target in _COMMUTATIVE and not reader.kwargs and len(reader.args) == 2
    others = [operand for operand in reader.args if operand is not node] if is_plain else []
    return others[0] if len(others) == 1 else None


def _is_like(other: Any, node: fx.Node) -> bool:
    return (
        isinstance(other, fx.Node) and isinstance(node_spec(other), TensorSpec) and node_spec(other) == node_spec(node)
    )
