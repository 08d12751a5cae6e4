"""Which calls may write their result over an operand: pointwise ones, over memory that nothing reads afterwards.

Facts tell what shares memory with the strides that a call was planned for, and whether a ``reshape`` copies depends on
those. What is written over must not: so here every call that may return a view counts as one, and only memory that a
call allocates whatever its operands are is written over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY
from fmecompile.runtime.norms import group_norm_apply, group_norm_laid_out

aten = torch.ops.aten

INTO: dict[Any, Any] = {
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
    aten.silu.default: aten.silu.out,
    aten.gelu.default: aten.gelu.out,
}
"""Calls that compute each element by itself, straight into memory of any layout."""

ALLOCATING = {
    *INTO,
    aten.addmm.default,
    aten.bmm.default,
    aten.clone.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.mm.default,
    aten.scaled_dot_product_attention.default,
    group_norm_apply,
    group_norm_laid_out,
    GROUP_NORM_APPLY,
}
"""Calls whose result is never a view of an operand."""

_Owners = frozenset[fx.Node]
"""The calls and inputs in whose memory a value may lie."""


def overwrites(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each of ``nodes``, run in order, that may write its result over an operand: which one.

    That operand has the shape, the strides and the dtype of the result, is all of what a call in ``nodes`` allocated,
    and neither it nor a view of it is read afterwards or leaves the graph.
    """
    memory: dict[fx.Node, _Owners] = {}
    last: dict[fx.Node, int] = {}
    for at, node in enumerate(nodes):
        read = frozenset[fx.Node]().union(*(_memory(operand, memory) for operand in node.all_input_nodes))
        is_new = node.target in ALLOCATING or not read
        memory[node] = frozenset([node]) if is_new else read
        until = len(nodes) if any(user.op == "output" for user in node.users) else at
        for owner in read | memory[node]:
            last[owner] = max(last.get(owner, 0), until if owner in memory[node] else at)
    found = {}
    for at, node in enumerate(nodes):
        for x in node.all_input_nodes:
            if _fits(x, node, memory) and all(last[owner] == at for owner in memory[x]):
                found.setdefault(node, x)
    return found


def _memory(value: fx.Node, known: Mapping[fx.Node, _Owners]) -> _Owners:
    return known.get(value, frozenset([value]))


def _fits(x: fx.Node, node: fx.Node, memory: Mapping[fx.Node, _Owners]) -> bool:
    """Whether ``x`` is all of some allocated memory, laid out like ``node``, of which it reads nothing else."""
    spec = node_spec(x)
    if node.target not in INTO or not isinstance(spec, TensorSpec) or not is_laid_out_like(spec, tensor_spec(node)):
        return False
    owners = _memory(x, memory)
    owner = next(iter(owners))
    if len(owners) > 1 or owner.target not in ALLOCATING or tensor_spec(owner).numel != spec.numel:
        return False
    return all(other is x or owner not in _memory(other, memory) for other in node.all_input_nodes)


def is_laid_out_like(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether both have the same elements in the same order in memory; strides of one row mean nothing."""
    pairs = zip(one.shape, one.stride, other.stride, strict=False)
    return one._replace(stride=other.stride) == other and all(a == b for size, a, b in pairs if size > 1)
