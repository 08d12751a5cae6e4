"""late-expand: a linear of rows that are all alike computes one of them, and its result is expanded.

    before  e = expand(v, [28, 9216, 320]);  y = linear(e, w)      v is (28, 1, 320)
    after   y = expand(linear(v, w), [28, 9216, 320])

    before  e = expand(v, [2, 9216, 1, 320]);  r = reshape(e, [18432, 1, 320]);  y = linear(r, w)
    after   y = reshape(expand(linear(v, w), [2, 9216, 1, 320]), [18432, 1, 320])

So stands what ``one-key`` leaves behind: a value for all queries, on its way to the projection. Exact but for the
rounding of a product of another shape. What the program returns is left alone: a caller may write to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import storages
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import tensor_spec

aten = torch.ops.aten

_EXPANDS = (aten.expand.default, aten.broadcast_to.default)


@dataclass(frozen=True)
class LateExpand:
    """Move every linear in front of the expansion of its operand, where that leaves features alone."""

    def apply(self, program: Program, facts: FactTable) -> str:
        moved = 0
        nodes = compute_nodes(program.graph)
        roots = storages(nodes, program.outputs, facts).roots
        returned = {roots.get(value) for value in program.outputs}
        for node in nodes:
            is_linear = node.target is aten.linear.default and node not in returned
            if is_linear and _expansion(node.args[0]) is not None:
                _move(node, facts)
                moved += 1
        if not moved:
            return "no linear of equal rows"
        edit.drop_unused(program)
        edit.annotate(compute_nodes(program.graph), facts)
        return f"{moved} linears compute each row once"


def _expansion(value: Any) -> fx.Node | None:
    """The expansion that ``value`` is, maybe reshaped, with features in its last dimension as before."""
    if not isinstance(value, fx.Node):
        return None
    expand = value.args[0] if value.target is aten.reshape.default else value
    if not isinstance(expand, fx.Node) or expand.target not in _EXPANDS:
        return None
    features = {tensor_spec(n).shape[-1:] for n in (value, expand, expand.args[0])}  # type: ignore[arg-type]
    return expand if len(features) == 1 else None


def _move(node: fx.Node, facts: FactTable) -> None:
    """Compute the linear ``node`` on what its operand expands, and make it the view of that."""
    operand = node.args[0]
    expand = _expansion(operand)
    assert isinstance(operand, fx.Node) and expand is not None
    shape = list(tensor_spec(node).shape)
    rows = edit.insert_before(node, aten.linear.default, (expand.args[0], *node.args[1:]), like=node)
    edit.annotate([rows], facts)
    if _expansion(rows.args[0]) is not None:
        _move(rows, facts)
    wide = (rows, [*tensor_spec(expand).shape[:-1], shape[-1]])
    if operand is expand:
        edit.retarget(node, aten.expand.default, wide, {})
        edit.annotate([node], facts)
        return
    whole = edit.insert_before(node, aten.expand.default, wide, like=node)
    edit.retarget(node, aten.reshape.default, (whole, shape), {})
    edit.annotate([whole, node], facts)
