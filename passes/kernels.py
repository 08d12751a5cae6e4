"""kernels: one call of a kernel where several operators compute what it does.

    before  h = slice(p, -1, 0, n);  g = slice(p, -1, n, 2n);  y = mul(h, gelu(g))
    after   y = fmecompile.geglu(p)

    before  y = silu(group_norm_apply(x, s, w, b))
    after   y = fmecompile.group_norm_apply(x, s, w, b, True)

    before  y = add(mul(a, s), mul(rsub(a, 1), add(t, r)))
    after   y = fmecompile.blend(a, s, t, r)

    before  y = transpose(attention(transpose(q, 1, 2), transpose(k, 1, 2), transpose(v, 1, 2)), 1, 2)
    after   y = select(fmecompile.temporal_attention(unsqueeze(q, 2), unsqueeze(k, 2), unsqueeze(v, 2)), 2, 0)

Attention is taken where queries and keys are few enough for one program. It stands in front of the partition and behind
what names attention or norms (``one-key``, ``two-pass-norm``, ``step-reuse``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.errors import OptionError
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.kernels.blend import BLEND
from fmecompile.kernels.geglu import GEGLU
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY, GROUP_NORM_MOMENTS
from fmecompile.kernels.registry import KERNELS, why_not_planned
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION, serves
from fmecompile.operators.registry import positional
from fmecompile.passes.fuse_norm import is_dense
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernels:
    """Use the kernels ``names`` where the program's device runs them, or ``everywhere``: by their references.

    Raises OptionError for a name that is no kernel.
    """

    names: frozenset[str] = frozenset(KERNELS)
    everywhere: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(self.names - KERNELS.keys()):
            raise OptionError(f"no kernel is called {unknown[0]!r}", next_step=f"name some of {', '.join(KERNELS)}")

    def apply(self, program: Program, facts: FactTable) -> str:
        nodes = compute_nodes(program.graph)
        reason = "" if self.everywhere else next((found for node in nodes if (found := _why_not(node))), "")
        if reason:
            return f"no kernel: {reason}"
        used: Counter[str] = Counter()
        for node in nodes:
            use = PATTERNS.get(node.target)
            name = use(node, self.names, facts) if use is not None else ""
            used.update([name] if name else [])
        if not used:
            return "no pattern of a kernel"
        edit.drop_unused(program)
        return ", ".join(f"{count} {name}" for name, count in used.items())


def _why_not(node: fx.Node) -> str:
    spec = node_spec(node)
    return why_not_planned(spec.device) if isinstance(spec, TensorSpec) else ""


Use = Callable[[fx.Node, frozenset[str], FactTable], str]
"""Makes a call one of a kernel among some names, where it ends that kernel's pattern; the name of the kernel, or ""."""


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...], facts: FactTable) -> str:
    edit.retarget(node, target, args, {})
    edit.annotate([node], facts)
    return target._schema.name.split("::")[1]


def _alone(value: Any, target: Any) -> fx.Node | None:
    """``value`` where it is a call of ``target`` that one call reads, once."""
    is_call = isinstance(value, fx.Node) and value.target is target and len(value.users) == 1
    return value if is_call else None


def _operands(node: fx.Node | None) -> list[tuple[Any, Any]]:
    """The two operands of an addition or a product in either order; none where it also scales them."""
    if node is None or node.kwargs or len(node.args) != 2:
        return []
    first, second = node.args
    return [(first, second), (second, first)]


# ---------------------------------------------------------------------------------------------------------------- norms


def _moments(node: fx.Node, names: frozenset[str], facts: FactTable) -> str:
    if "group_norm_moments" not in names:
        return ""
    return _replace(node, GROUP_NORM_MOMENTS, node.args, facts)


def _apply(node: fx.Node, names: frozenset[str], facts: FactTable) -> str:
    if "group_norm_apply" not in names:
        return ""
    operands, order = node.args[:4], node.args[4:]
    if not order and not is_dense(tensor_spec(operands[0])):  # type: ignore[arg-type]
        order = (list(range(len(tensor_spec(node).shape))),)  # as a convolution would copy it to be
    reader = next(iter(node.users), None)
    if reader is not None and reader.target is aten.silu.default and len(node.users) == 1:
        return _replace(reader, GROUP_NORM_APPLY, (*operands, True, *order), facts)
    return _replace(node, GROUP_NORM_APPLY, (*operands, False, *order), facts)


# ------------------------------------------------------------------------------------------------- gates and blends


def _geglu(node: fx.Node, names: frozenset[str], facts: FactTable) -> str:
    for value, gated in _operands(node) if "geglu" in names else []:
        gelu = _alone(gated, aten.gelu.default)
        whole = _halved(value, gelu.args[0]) if gelu is not None else None
        if gelu is not None and whole is not None:
            is_tanh = gelu.kwargs.get("approximate", "none") == "tanh"
            return _replace(node, GEGLU, (whole, is_tanh), facts)
    return ""


def _halved(first: Any, second: Any) -> fx.Node | None:
    """What ``first`` and ``second`` are the halves of, along the last dimension."""
    parts = [_sliced(part) for part in (first, second)]
    if None in parts or parts[0][0] is not parts[1][0]:  # type: ignore[index]
        return None
    whole = parts[0][0]  # type: ignore[index]
    *_, size = tensor_spec(whole).shape
    half = size // 2
    cuts = [(start, stop) for _, start, stop in parts]  # type: ignore[misc]
    return whole if size % 2 == 0 and cuts == [(0, half), (half, size)] else None


def _sliced(part: Any) -> tuple[fx.Node, int, int] | None:
    """The tensor that ``part`` is a run of rows of along the last dimension, and where it begins and ends."""
    if not isinstance(part, fx.Node) or part.target is not aten.slice.Tensor:
        return None
    args, _ = positional(part.target, part.args, part.kwargs)
    given: tuple[Any, ...] = (*args, *(None, 0, None, None, 1)[len(args) :])
    x, dim, start, stop, step = given
    *outer, size = tensor_spec(x).shape
    if dim not in (-1, len(outer)) or step != 1:
        return None
    return x, start or 0, size if stop is None else min(stop, size)


def _blend(node: fx.Node, names: frozenset[str], facts: FactTable) -> str:
    for left, right in _operands(node) if "blend" in names else []:
        call = _blended(_alone(left, aten.mul.Tensor), _alone(right, aten.mul.Tensor))
        if call is not None and _fits_blend(node, call):
            return _replace(node, BLEND, call, facts)
    return ""


def _blended(kept: fx.Node | None, mixed: fx.Node | None) -> tuple[fx.Node, ...] | None:
    """Alpha, what it scales, and what the rest of it scales: a sum of which is taken in its two terms."""
    for rest, branch in _operands(mixed):
        alpha = _complement(rest)
        for scale, spatial in _operands(kept) if alpha is not None else []:
            if scale is alpha and isinstance(spatial, fx.Node) and isinstance(branch, fx.Node):
                terms = _operands(_alone(branch, aten.add.Tensor))
                return (scale, spatial, *(terms[0] if terms and _are_alike(spatial, *terms[0]) else (branch,)))
    return None


def _complement(value: Any) -> fx.Node | None:
    """a of 1 - a."""
    if not isinstance(value, fx.Node) or value.target not in (aten.rsub.Scalar, aten.rsub.Tensor) or value.kwargs:
        return None
    a, *rest = value.args
    return a if rest == [1] and isinstance(a, fx.Node) else None


def _are_alike(spatial: fx.Node, *terms: Any) -> bool:
    """Whether ``terms`` are tensors with the shape of ``spatial``."""
    return all(isinstance(t, fx.Node) and tensor_spec(t).shape == tensor_spec(spatial).shape for t in terms)


def _fits_blend(node: fx.Node, call: tuple[fx.Node, ...]) -> bool:
    specs = [tensor_spec(operand) for operand in call]
    return specs[1].shape == tensor_spec(node).shape and len({spec.dtype for spec in specs}) == 1


# ------------------------------------------------------------------------------------------------------------ attention


def _attention(node: fx.Node, names: frozenset[str], facts: FactTable) -> str:
    if "temporal_attention" not in names or not _is_plain(node):
        return ""
    rows = [_untransposed(operand) for operand in node.args[:3]]
    readers = [user for user in node.users if _untransposed(user) is node]
    if None in rows or len(readers) != len(node.users) or not _is_small(rows):
        return ""
    inputs = [edit.insert_before(node, aten.unsqueeze.default, (row, 2), like=node) for row in rows]
    edit.annotate(inputs, facts)
    name = _replace(node, TEMPORAL_ATTENTION, (*inputs, node.kwargs.get("scale")), facts)
    for reader in readers:
        _replace(reader, aten.select.int, (node, 2, 0), facts)
    return name


def _is_plain(node: fx.Node) -> bool:
    """Attention without mask, dropout, order or grouped heads."""
    args, kwargs = positional(node.target, node.args, node.kwargs)
    plain: Any = (None, 0.0, False)
    return all(a == b for a, b in zip(args[3:], plain, strict=False)) and not kwargs.get("enable_gqa")


def _untransposed(value: Any) -> fx.Node | None:
    """The (N, L, H, D) that ``value`` is a (N, H, L, D) of."""
    if not isinstance(value, fx.Node) or value.target is not aten.transpose.int or sorted(value.args[1:]) != [1, 2]:  # type: ignore[type-var]
        return None
    return value.args[0] if len(tensor_spec(value).shape) == 4 else None  # type: ignore[return-value]


def _is_small(rows: list[Any]) -> bool:
    query, key, value = (tensor_spec(row) for row in rows)
    same = (query.shape[0], query.shape[2:]) == (key.shape[0], key.shape[2:]) and key.shape == value.shape
    return same and serves(query.shape[1], key.shape[1], query.shape[3])


PATTERNS: dict[Any, Use] = {
    group_norm_moments: _moments,
    group_norm_apply: _apply,
    aten.mul.Tensor: _geglu,
    aten.add.Tensor: _blend,
    aten.scaled_dot_product_attention.default: _attention,
}
"""What ends a pattern, in the order of the graph; SiLU behind a norm is found from the norm."""
