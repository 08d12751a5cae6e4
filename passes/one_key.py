"""one-key: attention with a single key returns its value, whatever the query.

before  q = linear(x);  y = attention(q, k, v)      k and v with one row: an image is embedded in one token
after   y = expand(v)                               q and k are not computed

before  v = transpose(reshape(u, [28, 1, 5, 64]), 1, 2);  r = reshape(transpose(y, 1, 2), [28, 9216, 320])
after   r = expand(u, [28, 9216, 320])              heads are not taken apart

The softmax of one number is 1, so this is exact, wherever the product of query and key is finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import tensor_spec
from fmecompile.operators.registry import positional

aten = torch.ops.aten


@dataclass(frozen=True)
class OneKey:
    """Replace attention without mask and dropout over keys of one row by its value."""

    def apply(self, program: Program, facts: FactTable) -> str:
        found = [node for node in compute_nodes(program.graph) if _has_one_key(node)]
        for node in found:
            value = positional(node.target, node.args, node.kwargs)[0][2]
            edit.retarget(node, aten.expand.default, (value, list(tensor_spec(node).shape)), {})
            _join_heads(node, value)
        if not found:
            return "no attention over one key"
        edit.annotate(compute_nodes(program.graph), facts)
        return f"{len(found)} attentions over one key are their value, {edit.drop_unused(program)} calls fewer"


def _has_one_key(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    args, kwargs = positional(node.target, node.args, node.kwargs)
    _, key, _, *options = args
    plain: Any = (None, 0.0, False)  # mask, dropout, causal
    is_plain = all(a == b for a, b in zip(options, plain, strict=False)) and not kwargs.get("enable_gqa")
    return is_plain and isinstance(key, fx.Node) and tensor_spec(key).shape[-2] == 1


def _join_heads(node: fx.Node, value: Any) -> None:
    """Expand what the heads of ``value`` were taken from, where a reader of ``node`` puts them together again."""
    apart = _swapped(value)
    if apart is None or apart.target is not aten.reshape.default:
        return
    whole: Any = apart.args[0]
    for reader in [r for swap in node.users if _swapped(swap) is node for r in swap.users]:
        shape = tensor_spec(reader).shape
        is_joined = reader.target is aten.reshape.default and len(shape) == 3
        if is_joined and tensor_spec(whole).shape == (shape[0], 1, shape[2]):
            edit.retarget(reader, aten.expand.default, (whole, list(shape)), {})


def _swapped(value: Any) -> fx.Node | None:
    """What ``value`` is with its heads and rows swapped."""
    is_swap = isinstance(value, fx.Node) and value.target is aten.transpose.int and sorted(value.args[1:]) == [1, 2]  # type: ignore[type-var]
    return value.args[0] if is_swap else None  # type: ignore[return-value, union-attr]
