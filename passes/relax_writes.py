"""relax-writes: spell what is left of writes in place without whole copies of what they wrote to.

    before  s = select(y, 1, 0);  c = copy(s, v);  z = select_scatter(y, c, 1, 0)
    after   c = expand(v, [4, 6]);  z = cat([unsqueeze(c, 1), slice(y, 1, 1, 9)], 1)

A copy over all of a value is what is copied. A value with a part written over is the join of that part and the rest,
which a loop may slice along every other axis. Both calls would also copy the whole storage that their operand is a view
of; other writes into a part of a view get a copy of the view alone.
"""

from __future__ import annotations

from collections.abc import Iterator
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

_JOINED = (aten.slice_scatter.default, aten.select_scatter.default)


@dataclass(frozen=True)
class RelaxWrites:
    """``copy`` to ``expand``, writes into slices to joins."""

    def apply(self, program: Program, facts: FactTable) -> str:
        done = 0
        for node in compute_nodes(program.graph):
            if node.target is aten.copy.default:
                _read_source(node, facts)
            elif node.target in _JOINED and (bounds := _bounds(node)) is not None:
                _join(node, *bounds, facts)
            elif node.target in (*_JOINED, aten.diagonal_scatter.default) and not _is_copy(node.args[0]):
                _dense_operand(node, facts)
            else:
                continue
            done += 1
        edit.drop_unused(program)
        return f"{done} writes relaxed" if done else "no writes"


def _read_source(node: fx.Node, facts: FactTable) -> None:
    """``copy(x, source)`` is ``source`` as x would hold it."""
    source, spec = node.args[1], tensor_spec(node)
    assert isinstance(source, fx.Node)
    source = _converted(source, node, facts)
    edit.retarget(node, aten.expand.default, (source, list(spec.shape)), {})
    edit.annotate([node], facts)


def _converted(source: fx.Node, node: fx.Node, facts: FactTable) -> fx.Node:
    """``source`` in the dtype and on the device of ``node``."""
    have, want = tensor_spec(source), tensor_spec(node)
    if (have.dtype, have.device) == (want.dtype, want.device):
        return source
    new = edit.insert_before(node, aten._to_copy.default, (source,), like=node)
    edit.retarget(new, new.target, new.args, {"dtype": want.dtype, "device": want.device})  # type: ignore[arg-type]
    edit.annotate([new], facts)
    return new


def _bounds(node: fx.Node) -> tuple[int, int, int] | None:
    """(dim, first, behind the last) of the rows that are written over; None where they are not neighbours."""
    args, _ = positional(node.target, node.args, node.kwargs)
    shape = tensor_spec(node).shape
    if node.target is aten.select_scatter.default:
        dim, index = int(str(args[2])) % len(shape), int(str(args[3]))
        return dim, index % shape[dim], index % shape[dim] + 1
    places: tuple[Any, ...] = (*args[2:], *(0, None, None, 1)[len(args) - 2 :])
    dim = places[0] % len(shape)
    first, last, step = slice(*places[1:]).indices(shape[dim])
    return (dim, first, max(first, last)) if step == 1 else None


def _join(node: fx.Node, dim: int, first: int, last: int, facts: FactTable) -> None:
    whole, part = node.args[:2]
    assert isinstance(whole, fx.Node) and isinstance(part, fx.Node)
    part = _converted(part, node, facts)
    size = tensor_spec(node).shape[dim]
    if node.target is aten.select_scatter.default:
        part = edit.insert_before(node, aten.unsqueeze.default, (part, dim), like=node)
        edit.annotate([part], facts)
    parts = [*_rows(node, whole, dim, 0, first, facts), part, *_rows(node, whole, dim, last, size, facts)]
    edit.retarget(node, aten.cat.default, (parts, dim), {})
    edit.annotate([node], facts)


def _rows(node: fx.Node, whole: fx.Node, dim: int, first: int, last: int, facts: FactTable) -> Iterator[fx.Node]:
    """The rows of ``whole`` from ``first`` on, in front of ``last``, if there are any."""
    if first < last:
        rows = edit.insert_before(node, aten.slice.Tensor, (whole, dim, first, last), like=node)
        edit.annotate([rows], facts)
        yield rows


def _is_copy(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is aten.clone.default


def _dense_operand(node: fx.Node, facts: FactTable) -> None:
    whole = node.args[0]
    assert isinstance(whole, fx.Node)
    copy = edit.insert_before(node, aten.clone.default, (whole,), like=node)
    edit.annotate([copy], facts)
    edit.read_instead(node, whole, copy)
