"""spatial-layout: run a temporal layer on the layout of the spatial ones, (batch frames, tokens, channels).

    before  p = permute(reshape(x, [b, t, n, c]), [0, 2, 1, 3]);  h = reshape(p, [b n, t, c]);  y = linear(h)
            q = permute(reshape(y, [b, n, t, c]), [0, 2, 1, 3]);  z = reshape(q, [b t, n, c])
    after   z = linear(x)

Operators that compute each row by itself do so in any order of rows, and ``temporal_attention`` reads frames by
strides. So both permutations, each a copy, are gone. What else a layer takes in the layout of sequences is permuted
where it comes in; a layer stays as it is unless that copies less. Behind ``kernels``, which finds the attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.kernels.geglu import GEGLU
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION
from fmecompile.operators import RULES
from fmecompile.operators.pointwise import pointwise_rule

aten = torch.ops.aten

_SWAP = [0, 2, 1, 3]
_VIEWS = (aten.reshape.default, aten.unsqueeze.default)
_EXPANDS = (aten.expand.default, aten.broadcast_to.default)
_OF_FEATURES = (aten.linear.default, GEGLU, aten.slice.Tensor, aten.reshape.default, aten.layer_norm.default)


@dataclass(frozen=True)
class SpatialLayout:
    """Take the permutations around every temporal layer that can do without."""

    def apply(self, program: Program, facts: FactTable) -> str:
        moved = 0
        for node in compute_nodes(program.graph):
            layer = _layer(node)
            if layer is None or not layer.is_worth_it():
                continue
            edit.retarget(node, aten.reshape.default, (layer.twin(layer.last), list(tensor_spec(node).shape)), {})
            edit.drop_unused(program)
            edit.annotate(compute_nodes(program.graph), facts)
            moved += 1
        return f"{moved} temporal layers in the layout of spatial ones" if moved else "no temporal layer to move"


@dataclass(frozen=True)
class _Layer:
    """Values of (batch tokens, frames, ...) up to ``last``, which ``end`` begins to permute back. ``twins`` are the
    same as (batch frames, tokens, ...)."""

    batch: int
    frames: int
    tokens: int
    last: fx.Node
    end: fx.Node
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def is_worth_it(self) -> bool:
        """Whether permuting what the layer takes from elsewhere copies less than its own permutations."""
        entries, copied, moved = self._walk()
        inside = {*moved, *entries}
        closed = {node for node in inside if all(self._is_inside(user, inside) for user in node.users)}
        gone = entries & closed
        return bool(gone) and moved <= closed and sum(map(_numel, copied)) < sum(map(_numel, (*gone, self.last)))

    def _is_inside(self, user: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether ``user``, or the attention that it leads into, is part of the layer, or permutes it back."""
        if user in inside or user is self.end:
            return True
        ahead = [n for reader in user.users for n in reader.users] if user.target is aten.unsqueeze.default else []
        return bool(ahead) and all(n in inside for n in ahead)

    def _walk(self) -> tuple[set[fx.Node], set[fx.Node], set[fx.Node]]:
        """Where values of the spatial layout enter, what has to be permuted, and what moves."""
        entries: set[fx.Node] = set()
        copied: set[fx.Node] = set()
        moved: set[fx.Node] = set()
        waiting = [self.last]
        while waiting:
            node = waiting.pop()
            if self._entering(node) is not None:
                entries.add(node)
            elif (operands := self._moving(node)) is None:
                copied.add(node)
            elif node not in moved:
                moved.add(node)
                waiting += operands
        return entries, copied, moved

    def has_rows(self, value: Any) -> bool:
        """Whether ``value`` is a tensor of (batch tokens, frames, ...)."""
        spec = node_spec(value) if isinstance(value, fx.Node) else None
        rows = (self.batch * self.tokens, self.frames)
        return isinstance(spec, TensorSpec) and len(spec.shape) > 2 and spec.shape[:2] == rows

    def _entering(self, node: fx.Node) -> fx.Node | None:
        """The (batch, frames, tokens, channels) that ``node`` is a permutation of."""
        if node.target is not aten.reshape.default or not self.has_rows(node):
            return None
        swap = node.args[0]
        if not isinstance(swap, fx.Node) or swap.target is not aten.permute.default or swap.args[1] != _SWAP:
            return None
        x = swap.args[0]
        rows = (self.batch, self.frames, self.tokens)
        is_whole = tensor_spec(x).shape[:3] == rows and len(tensor_spec(node).shape) == 3  # type: ignore[arg-type]
        return x if is_whole else None  # type: ignore[return-value]

    def _of_clip(self, node: fx.Node) -> fx.Node | None:
        """The (batch, 1, 1, channels) that ``node`` repeats for every row of a clip."""
        if node.target not in _EXPANDS or not self.has_rows(node):
            return None
        rows = node.args[0]
        once = rows.args[0] if isinstance(rows, fx.Node) and rows.target is aten.reshape.default else None
        x = once.args[0] if isinstance(once, fx.Node) and once.target in _EXPANDS else None
        wanted = (self.batch, 1, 1, *_shape(node)[2:])
        return x if isinstance(x, fx.Node) and _shape(x) == wanted else None

    def _moving(self, node: fx.Node) -> list[fx.Node] | None:
        """The operands of (batch tokens, frames, ...) of a call that computes each row by itself, or is attention over
        frames; None for any other."""
        if self._of_clip(node) is not None:
            return []
        if _attention(node) is not None:
            return [row.args[0] for row in _attention(node).args[:3]]  # type: ignore[union-attr]
        tensors = [n for n in node.all_input_nodes if len(_shape(n)) > 0]
        rule = RULES.get(node.target)
        if rule is not None and rule.rule is pointwise_rule and node.op == "call_function":
            rows = [n for n in tensors if self.has_rows(n)]
            others = [n for n in tensors if n not in rows]
            return rows if rows and all(_is_of_features(n, len(_shape(node))) for n in others) else None
        if node.target in _OF_FEATURES and self.has_rows(node.args[0]) and self._keeps_rows(node):
            return [node.args[0]]  # type: ignore[list-item]
        return None

    def _keeps_rows(self, node: fx.Node) -> bool:
        """Whether a call of ``_OF_FEATURES`` works within each row."""
        if node.target is aten.layer_norm.default:
            return len(node.args[1]) <= len(_shape(node)) - 2  # type: ignore[arg-type]
        if node.target is aten.slice.Tensor:
            return node.args[1] % len(_shape(node)) > 1  # type: ignore[operator]
        return self.has_rows(node)

    def twin(self, node: fx.Node) -> fx.Node:
        """The value of ``node`` as (batch frames, tokens, ...), made where ``node`` is."""
        if node not in self.twins:
            self.twins[node] = self._made(node)
        return self.twins[node]

    def _made(self, node: fx.Node) -> fx.Node:
        shape = [self.batch * self.frames, self.tokens, *_shape(node)[2:]]
        entering = self._entering(node)
        if entering is not None:
            return edit.insert_before(node, aten.reshape.default, (entering, shape), like=node)
        value = self._of_clip(node)
        if value is not None:
            return self._repeated(node, value, shape)
        operands = self._moving(node)
        if operands is None:
            return self._permuted(node, shape)
        twins = {operand: self.twin(operand) for operand in operands}
        attention = _attention(node)
        if attention is not None:
            return self._attending(node, attention, twins, shape)
        if node.target is aten.reshape.default:
            return edit.insert_before(node, aten.reshape.default, (twins[operands[0]], shape), like=node)
        return edit.clone_before(node, node, twins)

    def _repeated(self, node: fx.Node, value: fx.Node, shape: list[int]) -> fx.Node:
        frames = [self.batch, self.frames, 1, *shape[2:]]
        wide = edit.insert_before(node, aten.expand.default, (value, frames), like=node)
        rows = edit.insert_before(node, aten.reshape.default, (wide, [shape[0], 1, *shape[2:]]), like=node)
        return edit.insert_before(node, aten.expand.default, (rows, shape), like=node)

    def _permuted(self, node: fx.Node, shape: list[int]) -> fx.Node:
        apart = [self.batch, self.tokens, self.frames, *shape[2:]]
        order = [*_SWAP[:3], *range(3, len(apart))]
        after = node.next
        view = edit.insert_before(after, aten.reshape.default, (node, apart), like=node)
        swap = edit.insert_before(after, aten.permute.default, (view, order), like=node)
        return edit.insert_before(after, aten.reshape.default, (swap, shape), like=node)

    def _attending(self, node: fx.Node, attention: fx.Node, twins: dict[fx.Node, fx.Node], shape: list[int]) -> fx.Node:
        apart = [self.batch, self.frames, self.tokens, *shape[2:]]
        rows = [twins[row.args[0]] for row in attention.args[:3]]  # type: ignore[union-attr, index]
        views = [edit.insert_before(node, aten.reshape.default, (row, apart), like=attention) for row in rows]
        args = (*views, *attention.args[3:])
        result = edit.insert_before(node, TEMPORAL_ATTENTION, args, like=attention)
        return edit.insert_before(node, aten.reshape.default, (result, shape), like=attention)


def _layer(node: fx.Node) -> _Layer | None:
    """The layer that ends in ``node``: (batch frames, tokens, channels) from a permutation."""
    swap = node.args[0] if node.target is aten.reshape.default else None
    if not isinstance(swap, fx.Node) or swap.target is not aten.permute.default or swap.args[1] != _SWAP:
        return None
    batch, frames, tokens, channels = _shape(swap)
    last = _unviewed(swap.args[0], (batch * tokens, frames, channels))
    if last is None or _shape(node) != (batch * frames, tokens, channels):
        return None
    end = swap.args[0]
    while isinstance(end, fx.Node) and last not in end.all_input_nodes:
        end = end.args[0]
    return _Layer(batch, frames, tokens, last, end)  # type: ignore[arg-type]


def _unviewed(value: Any, shape: tuple[int, ...]) -> fx.Node | None:
    """The tensor of ``shape`` that ``value`` is a view of."""
    while isinstance(value, fx.Node) and _shape(value) != shape:
        value = value.args[0] if value.target in _VIEWS else None
    return value


def _attention(node: fx.Node) -> fx.Node | None:
    """The attention over frames of sequences that ``node`` is the result of, in the form that ``kernels`` gives it."""
    attention = node.args[0] if node.target is aten.select.int else None
    if not isinstance(attention, fx.Node) or attention.target is not TEMPORAL_ATTENTION or len(attention.users) > 1:
        return None
    rows = [row for row in attention.args[:3] if isinstance(row, fx.Node)]
    is_alone = all(row.target is aten.unsqueeze.default and row.args[1] == 2 for row in rows)
    same = len({_shape(row) for row in rows}) == 1
    return attention if is_alone and same and node.args[1:] == (2, 0) else None


def _is_of_features(node: fx.Node, ndim: int) -> bool:
    """Whether an operand is the same for every row of a result of ``ndim`` dimensions."""
    shape = (1,) * (ndim - len(_shape(node))) + _shape(node)
    return shape[:2] == (1, 1)


def _shape(node: fx.Node) -> tuple[int, ...]:
    spec = node_spec(node)
    return spec.shape if isinstance(spec, TensorSpec) else ()


def _numel(node: fx.Node) -> int:
    return tensor_spec(node).numel
