"""one-key: attention with a single key returns its value, whatever the query.

before  q = linear(x);  y = attention(q, k, v)      k and v with one row: an image is embedded in one token
after   y = expand(v)                               q and k are not computed

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
