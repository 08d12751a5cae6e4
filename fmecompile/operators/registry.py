"""The rule table: what each operator keeps, reduces and bars, in axis atoms.

A rule is a function ``rule(call, *args, **kwargs)`` whose arguments mirror the operator's, with tensors given as
:class:`Operand`. It tells ``call`` which dimensions it keeps, and returns the axes of the result. Roles belong to
(operator, operand, dimension): in self-attention the same atom is kept in the query and reduced in the key.

    keep    the slice of the result needs only the same slice of the operand
    halo    it also needs some rows of the operand before and after that slice, where there are any
    reduce  the result needs the whole dimension of the operand (the default for what a rule does not keep)
    whole   the dimension of the result can only be produced whole

``samples`` are small calls that enrol a rule in the conformance tests (chunk-and-compare, NaN poison). An operator
without a rule is a barrier: all operands reduced, the result whole, and a reason for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fmecompile.graph.atoms import AtomTable, Axis
from fmecompile.graph.specs import TensorSpec

Axes = tuple[Axis, ...]
"""The axis of every dimension of one tensor."""

Halo = tuple[int, int]
"""Rows needed before and after a slice, in rows of the dimension."""


@dataclass(eq=False)
class Operand:
    """A tensor operand as a rule sees it. ``halo``: the rows that a kept dimension needs before and after a slice."""

    node: fx.Node
    spec: TensorSpec
    axes: Axes
    kept: set[int] = field(default_factory=set)
    halo: dict[int, Halo] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)


@dataclass(frozen=True)
class Result:
    """The axes of a call's result, which of them can only be produced whole, and why."""

    axes: Axes
    whole: frozenset[int] = frozenset()
    reason: str = ""


class Call:
    """One operator call under analysis: its operands, the shape of its result, and the atom table."""

    def __init__(self, table: AtomTable, operands: Sequence[Operand], shape: tuple[int, ...]) -> None:
        self._table = table
        self.operands = list(operands)
        self.shape = shape

    def fresh(self, size: int) -> Axis:
        return self._table.fresh(size)

    def same(self, left: Axis, right: Axis) -> bool:
        """Unify two axes; False when they cannot be."""
        return self._table.unify(left, right)

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
        return self._table.regroup(axis, sizes)

    def keep(self, operand: Operand, dims: Iterable[int]) -> None:
        operand.kept.update(d % operand.ndim for d in dims)

    def keep_with_halo(self, operand: Operand, dim: int, before: int, after: int) -> None:
        self.keep(operand, [dim])
        if before or after:
            operand.halo[dim] = (before, after)

    def result(self, axes: Sequence[Axis | None], reason: str = "") -> Result:
        """Axes of the result; None stands for a fresh axis that can only be produced whole."""
        whole = frozenset(d for d, axis in enumerate(axes) if axis is None and self.shape[d] != 1)
        filled = tuple(self.fresh(self.shape[d]) if axis is None else axis for d, axis in enumerate(axes))
        return Result(filled, whole, reason if whole else "")


Rule = Callable[..., Result]
Localise = Callable[[tuple[Any, ...], tuple[int, ...]], tuple[Any, ...]]
AtBorders = Callable[[tuple[Any, ...], dict[int, Halo]], tuple[list[int], tuple[Any, ...]]]
Sample = tuple[Any, ...]


@dataclass(frozen=True)
class OperatorRule:
    """``rule`` states the axes; ``localise(args, shape)`` rewrites literal sizes in the arguments for a chunk whose
    result has ``shape``, where the operator has any; ``at_borders(args, missing)`` gives the zeros to pad a slice with
    and the arguments behind operand, weight and bias, where rows that a halo wants do not exist; ``samples`` are
    argument tuples for the conformance tests."""

    rule: Rule
    samples: tuple[Sample, ...]
    localise: Localise | None = None
    at_borders: AtBorders | None = None


RULES: dict[Any, OperatorRule] = {}


def axis_rule(
    *targets: Any, samples: Sequence[Sample], localise: Localise | None = None, at_borders: AtBorders | None = None
) -> Callable[[Rule], Rule]:
    """Register ``rule`` for ``targets``. Registering enrols it in the conformance tests through ``samples``."""

    def register(rule: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"{target} has a rule already"
            RULES[target] = OperatorRule(rule, tuple(samples), localise, at_borders)
        return rule

    return register


def positional(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spell a call as its rule expects it: arguments that may be given by position are, with defaults in the gaps."""
    if not kwargs or not isinstance(target, torch._ops.OpOverload):
        return args, kwargs
    named = dict(kwargs)
    places = [argument for argument in target._schema.arguments if not argument.kwarg_only]
    count = max((k + 1 for k, argument in enumerate(places) if argument.name in named), default=0)
    filled = list(args)
    for argument in places[len(args) : count]:
        filled.append(named.pop(argument.name, argument.default_value))
    return tuple(filled), named


def tensor(*shape: int, dtype: torch.dtype = torch.float64) -> TensorSpec:
    """A tensor argument of a sample."""
    return TensorSpec(shape, torch.empty(shape, device="meta").stride(), dtype, torch.device("cpu"))
