"""drop-noops: erase calls that return their operand unchanged.

    before  y = dropout(x, 0.0, False);  z = to(y, float16);  w = div(z, 1.0)
    after   every reader of w reads x

Dropped: metadata assertions, dropout in eval mode, casts to the same dtype, contiguous of a contiguous tensor, views to
the same shape, slices of everything, and multiplication or division by one that changes neither dtype nor shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec

aten = torch.ops.aten

_IDENTITY = {aten.detach_.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.broadcast_to.default,
    aten.slice.Tensor,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
}
_BY_ONE = {aten.div.Tensor, aten.mul.Tensor, aten.div.Scalar, aten.mul.Scalar}


@dataclass(frozen=True)
class DropNoops:
    """Erase calls that return their operand unchanged."""

    def apply(self, program: Program, facts: FactTable) -> str:
        dropped = 0
        for node in compute_nodes(program.graph):
            if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
                edit.erase([node])
            elif _is_noop(node):
                edit.replace(node, node.args[0])
            else:
                continue
            dropped += 1
        edit.drop_unused(program)
        return f"{dropped} calls dropped" if dropped else "nothing to drop"


def _is_noop(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.dropout.default:
        p, train = node.args[1:]
        return bool(p == 0.0 or not train)
    if node.target in _IDENTITY:
        return True
    same = isinstance(node_spec(node), TensorSpec) and node_spec(node) == node_spec(node.args[0])
    if node.target in _VIEWS:
        return same and not node.kwargs.get("copy", False)
    return node.target in _BY_ONE and same and isinstance(node.args[1], (int, float)) and node.args[1] == 1
