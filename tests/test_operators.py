"""Every axis rule, on its own samples, on drawn shapes, and beside deliberately wrong rules that must not pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from chains import CONVOLUTIONS, dense, factorisations, looped_chains, shapes
from conformance import (
    FACTS,
    Sample,
    Tape,
    assert_chunks_equal,
    assert_same,
    axes_of_call,
    check_chunks,
    check_poison,
    check_rule,
    loops_over,
    region_of,
    with_loops,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fmecompile.analysis.memory import project
from fmecompile.analysis.verify import measured_peak_bytes
from fmecompile.errors import CaptureError
from fmecompile.graph.program import compute_nodes
from fmecompile.graph.specs import TensorSpec
from fmecompile.kernels.geglu import GEGLU
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION
from fmecompile.operators import RULES
from fmecompile.operators.registry import Axis, Call, Halo, Operand, OperatorRule, Result, tensor
from fmecompile.operators.shape import blocks
from fmecompile.partition.reach import halo_of
from fmecompile.pipeline import compile_module
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

aten = torch.ops.aten
few = settings(max_examples=15, deadline=None, derandomize=True)
some = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operators lose ten times their time to threads when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------- registering a rule enrols it in both


def name_of(target: Any) -> str:
    return target.__name__ if not isinstance(target, torch._ops.OpOverload) else str(target)


def enrolled() -> list[Any]:
    calls = [(target, k, sample) for target, rule in RULES.items() for k, sample in enumerate(rule.samples)]
    return [
        pytest.param(
            target,
            sample,
            id=f"{name_of(target)}-{k}",
        )
        for target, k, sample in calls
    ]


@pytest.mark.parametrize(("target", "sample"), enrolled())
def test_rule_chunks_and_poison(target: Any, sample: Sample) -> None:
    check_rule(target, sample)


@pytest.mark.parametrize("target", RULES, ids=name_of)
def test_rule_has_a_sample_that_loops(target: Any) -> None:
    """A rule without a sample, or with samples that carry no axis, would be enrolled in nothing."""
    samples = RULES[target].samples
    assert samples
    assert any(_carried(target, sample) for sample in samples)


def _carried(target: Any, sample: Sample) -> frozenset[int]:
    axes, node = axes_of_call(target, sample)
    return axes[node].carries


# ------------------------------------------------------------------------------------- arguments by name, odd spellings

SPELLINGS: list[Any] = [
    (
        aten.scaled_dot_product_attention.default,
        (tensor(2, 4, 3), tensor(2, 4, 3), tensor(2, 4, 3), {"is_causal": True}),
    ),
    (
        aten.scaled_dot_product_attention.default,
        (tensor(2, 4, 3), tensor(2, 4, 3), tensor(2, 4, 3), {"attn_mask": tensor(4, 4)}),
    ),
    (aten.scaled_dot_product_attention.default, (tensor(2, 4, 3), tensor(2, 4, 3), tensor(2, 4, 3), {"scale": 0.5})),
    (aten.sum.dim_IntList, (tensor(4, 6), {"dim": [1]})),
    (aten.mean.dim, (tensor(4, 6), None)),
    (aten.mean.dim, (tensor(4, 6), [1], {"dtype": torch.float32})),
    (aten.cat.default, ([tensor(4, 3), tensor(4, 3)], {"dim": 1})),
    (aten.cat.default, ([tensor(0), tensor(4, 3)], 1)),
    (aten.softmax.int, (tensor(4, 6), -1, {"dtype": torch.float32})),
    (aten.add.Tensor, (tensor(4, 6), tensor(4, 6), {"alpha": 2})),
    (aten.clamp.default, (tensor(4, 6), {"max": 0.5})),
    (aten.clone.default, (tensor(4, 6), {"memory_format": torch.contiguous_format})),
    (aten.addmm.default, (tensor(6), tensor(4, 5), tensor(5, 6), {"beta": 0.5})),
    (aten.conv2d.default, (tensor(4, 3, 6, 5), tensor(5, 3, 1, 1), {"padding": [1, 1]})),
    (aten.repeat_interleave.self_int, (tensor(4, 6), 2, {"dim": 1})),
    (aten.reshape.default, (tensor(6, 4, 5), [4, 6, 5])),
    (aten.reshape.default, (tensor(), [1])),
    (aten.reshape.default, (tensor(0, 3), [0])),
    (aten.expand.default, (tensor(), [6])),
    (aten.pad.default, (tensor(4, 6, 5), [1, 2], "reflect")),
    (aten.pad.default, (tensor(4, 6, 5), [0, -1])),
    (aten.linear.default, (tensor(4, 5), tensor(5))),
]


@pytest.mark.parametrize(
    ("target", "sample"),
    [
        pytest.param(
            *call,
            id=f"{name_of(call[0])}-{k}",
        )
        for k, call in enumerate(SPELLINGS)
    ],
)
def test_spellings(target: Any, sample: Sample) -> None:
    """What the schema allows beyond the samples: keyword arguments, defaults, empty and 0-d tensors."""
    check_rule(target, sample, most=8)


# ----------------------------------------------------------------------------------------------- refusals with a reason

REFUSED: list[tuple[Any, Sample, set[int], set[int], str]] = [
    # operator, arguments, dimensions of the result barred, dimensions carried, what the reason speaks of
    (aten.group_norm.default, (tensor(4, 8, 6, 5), 2), {1, 2, 3}, {0}, "statistics"),
    (group_norm_moments, (tensor(4, 8, 6, 5), 2), {0, 2}, {1, 3}, "statistics"),
    (group_norm_moments, (tensor(4, 8, 3, 6, 5), 2), {0, 2}, {1, 3, 4}, "statistics"),
    (group_norm_statistics, (tensor(2, 4, 3, 6), 1e-5), {0, 2}, {1}, "statistics"),
    (group_norm_apply, (tensor(3, 8, 4), tensor(2, 3, 2), None, None), {1}, {0, 2}, "channels"),
    (aten.layer_norm.default, (tensor(4, 6, 8), [6, 8]), {1, 2}, {0}, "statistics"),
    (aten.rms_norm.default, (tensor(4, 6, 8), [8]), {2}, {0, 1}, "statistics"),
    (aten.softmax.int, (tensor(4, 6, 5), 1), {1}, {0, 2}, "sums over"),
    (aten.linear.default, (tensor(4, 6, 5), tensor(5, 5)), {2}, {0, 1}, "features"),
    (aten.bmm.default, (tensor(4, 3, 5), tensor(4, 5, 5)), {2}, {0, 1}, "whole"),
    (aten.matmul.default, (tensor(4, 5, 5), tensor(5, 5)), {2}, {0, 1}, "whole"),
    (aten.matmul.default, (tensor(5), tensor(4, 5, 6)), {0, 1}, set(), "vector"),
    (aten.addmm.default, (tensor(6), tensor(4, 5), tensor(5, 6)), {1}, {0}, "whole"),
    (aten.addmm.default, (tensor(4, 6), tensor(4, 5), tensor(5, 6)), {0, 1}, set(), "full matrix"),
    (aten.conv1d.default, (tensor(4, 3, 8), tensor(5, 3, 3), None, [1], [1]), {1}, {0, 2}, "channels"),
    (aten.conv1d.default, (tensor(4, 3, 8), tensor(5, 3, 3), None, [1], [2]), {1, 2}, {0}, "kernel"),
    (aten.conv1d.default, (tensor(4, 3, 8), tensor(5, 3, 3)), {1, 2}, {0}, "kernel"),
    (aten.conv1d.default, (tensor(4, 3, 9), tensor(5, 3, 3), None, [2], [1]), {1, 2}, {0}, "kernel"),
    (aten.conv1d.default, (tensor(4, 3, 8), tensor(5, 3, 1), None, [2]), {1, 2}, {0}, "kernel"),
    (aten.conv2d.default, (tensor(4, 3, 6, 5), tensor(5, 3, 1, 1), None, [1, 1], [1, 0]), {1, 2}, {0, 3}, "kernel"),
    (aten.conv2d.default, (tensor(4, 3, 6, 5), tensor(5, 3, 1, 1), None, [1, 2]), {1, 3}, {0, 2}, "kernel"),
    (aten.conv2d.default, (tensor(4, 3, 6, 5), tensor(5, 3, 3, 3), None, [1, 1], [1, 1]), {1}, {0, 2, 3}, "channels"),
    (aten.conv2d.default, (tensor(4, 3, 8, 7), tensor(5, 3, 3, 3), None, [2, 2], [1, 1]), {1, 3}, {0, 2}, "kernel"),
    (
        aten.conv2d.padding,
        (tensor(4, 3, 6, 5), tensor(5, 3, 3, 3), None, [1, 1], "same"),
        {0, 1, 2, 3},
        set(),
        "no axis",
    ),
    (aten.conv3d.default, (tensor(2, 3, 5, 4, 6), tensor(4, 3, 3, 1, 1)), {1, 2}, {0, 3, 4}, "kernel"),
    (
        aten.conv3d.default,
        (tensor(2, 3, 5, 4, 6), tensor(4, 3, 3, 1, 3), None, [1, 1, 2], [1, 0, 1]),
        {1},
        {0, 2, 3, 4},
        "channels",
    ),
    (aten.conv2d.default, (tensor(3, 6, 5), tensor(5, 3, 3, 3)), {0, 1, 2}, set(), "batch dimension"),
    (
        aten.scaled_dot_product_attention.default,
        (tensor(2, 6, 8), tensor(2, 5, 8), tensor(2, 5, 8)),
        {2},
        {0, 1},
        "mixes",
    ),
    (
        aten.scaled_dot_product_attention.default,
        (tensor(2, 6, 8), tensor(2, 6, 8), tensor(2, 6, 8), None, 0.0, True),
        {1, 2},
        {0},
        "mixes",
    ),
    (
        aten.scaled_dot_product_attention.default,
        (tensor(4, 4, 6, 8), tensor(4, 2, 6, 8), tensor(4, 2, 6, 8), {"enable_gqa": True}),
        {0, 1, 2, 3},
        set(),
        "grouped heads",
    ),
    (
        TEMPORAL_ATTENTION,
        (tensor(2, 5, 3, 2, 4), tensor(2, 5, 3, 2, 4), tensor(2, 5, 3, 2, 4)),
        {4},
        {0, 1, 2, 3},
        "mixes",
    ),
    (GEGLU, (tensor(4, 6, 10),), {2}, {0, 1}, "halves"),
    (GROUP_NORM_APPLY, (tensor(3, 8, 4), tensor(2, 3, 2), None, None, True), {1}, {0, 2}, "channels"),
    (aten.cat.default, ([tensor(4, 3), tensor(4, 3)], 1), {1}, {0}, "joined"),
    (aten.slice.Tensor, (tensor(4, 6), 1, 2, 5), {1}, {0}, "cut out"),
    (aten.flip.default, (tensor(4, 6), [1]), {1}, {0}, "reversed"),
    (aten.pad.default, (tensor(4, 6), [1, 2]), {1}, {0}, "padded"),
    (aten.reshape.default, (tensor(4, 6, 5), [6, 4, 5]), {0, 1}, {2}, "cuts across"),
    (aten.repeat_interleave.self_int, (tensor(4, 6), 2), {0}, set(), "flattened"),
    (aten.upsample_nearest2d.vec, (tensor(4, 3, 6, 5), [9, 7], None), {2, 3}, {0, 1}, "neighbours"),
    (aten.upsample_nearest2d.vec, (tensor(4, 3, 6, 5), [12, 15], None), {3}, {0, 1, 2}, "neighbours"),
    (aten.upsample_nearest2d.vec, (tensor(4, 3, 6, 5), None, [2.0, 2.0]), set(), {0, 1, 2, 3}, ""),
    (aten.upsample_nearest2d.vec, (tensor(4, 3, 6, 5), [24, 5], None), set(), {0, 1, 2, 3}, ""),
    (aten.upsample_bilinear2d.vec, (tensor(4, 3, 6, 5), [12, 10], False, None), {2, 3}, {0, 1}, "neighbours"),
    (aten.avg_pool2d.default, (tensor(4, 3, 6, 4), [2, 2]), {2, 3}, {0, 1}, "neighbours"),
]


@pytest.mark.parametrize(
    ("target", "sample", "barred", "carried", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v))[:40]
)
def test_refusals_stand_beside_acceptances(
    target: Any, sample: Sample, barred: set[int], carried: set[int], words: str
) -> None:
    axes, node = axes_of_call(target, sample)
    facts = axes[node]
    assert {d for d, axis in enumerate(facts.axes) if set(axis) & facts.barred} == barred
    assert {d for d, axis in enumerate(facts.axes) if set(axis) & facts.carries} == carried
    assert words in facts.reason


@pytest.mark.parametrize(
    ("target", "sample", "operand", "reduced"),
    [
        (aten.scaled_dot_product_attention.default, (tensor(2, 6, 8), tensor(2, 6, 8), tensor(2, 6, 8)), 1, {1, 2}),
        (aten.scaled_dot_product_attention.default, (tensor(2, 6, 8), tensor(2, 6, 8), tensor(2, 6, 8)), 2, {1, 2}),
        (aten.scaled_dot_product_attention.default, (tensor(2, 6, 8), tensor(2, 6, 8), tensor(2, 6, 8)), 0, {2}),
        (TEMPORAL_ATTENTION, (tensor(2, 5, 3, 2, 4), tensor(2, 6, 3, 2, 4), tensor(2, 6, 3, 2, 4)), 0, {4}),
        (TEMPORAL_ATTENTION, (tensor(2, 5, 3, 2, 4), tensor(2, 6, 3, 2, 4), tensor(2, 6, 3, 2, 4)), 1, {1, 4}),
        (TEMPORAL_ATTENTION, (tensor(2, 5, 3, 2, 4), tensor(2, 6, 3, 2, 4), tensor(2, 6, 3, 2, 4)), 2, {1, 4}),
        (aten.bmm.default, (tensor(4, 3, 5), tensor(4, 5, 6)), 1, {1, 2}),
        (aten.linear.default, (tensor(4, 6, 5), tensor(5, 5)), 0, {2}),
        (aten.linear.default, (tensor(4, 6, 5), tensor(5, 5)), 1, {0, 1}),
        (aten.mean.dim, (tensor(4, 6, 5), [1]), 0, {1}),
        (aten.select.int, (tensor(4, 6, 5), 1, 2), 0, {1}),
        (aten.conv2d.default, (tensor(4, 3, 6, 5), tensor(5, 3, 1, 3)), 0, {1, 3}),
    ],
)
def test_operands_are_reduced(target: Any, sample: Sample, operand: int, reduced: set[int]) -> None:
    """Dimensions of an operand that the call needs whole."""
    axes, node = axes_of_call(target, sample)
    use = axes[node].uses[operand]
    assert {d for d, axis in enumerate(use.axes) if set(axis) & use.reduced} == reduced


HALOS: list[tuple[Any, Sample, dict[int, Halo] | None]] = [
    # operator, arguments, rows that each kept spatial dimension reads beyond its slice; None where it is refused
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 3), None, [1], [1]), {2: (1, 1)}),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 1)), {2: (0, 0)}),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 5), None, [1], [2]), {2: (2, 2)}),
    (aten.conv1d.default, (tensor(2, 3, 9), tensor(5, 3, 5), None, [1], [4], [2]), {2: (4, 4)}),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 3), None, [2], [1]), {2: (1, 0)}),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 4), None, [2], [1]), {2: (1, 1)}),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 2), None, [2]), {2: (0, 0)}),
    (aten.conv1d.default, (tensor(2, 3, 9), tensor(5, 3, 5), None, [3], [1]), {2: (1, 1)}),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 3)), None),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 2), None, [1], [1]), None),
    (aten.conv1d.default, (tensor(2, 3, 9), tensor(5, 3, 3), None, [2], [1]), None),
    (aten.conv1d.default, (tensor(2, 3, 8), tensor(5, 3, 3), None, [1], [1], [2]), None),
    (aten.conv2d.default, (tensor(2, 3, 8, 6), tensor(5, 3, 3, 1), None, [2, 1], [1, 0]), {2: (1, 0), 3: (0, 0)}),
    (aten.conv2d.default, (tensor(2, 3, 8, 6), tensor(5, 3, 3, 5), None, [1], [1, 2]), {2: (1, 1), 3: (2, 2)}),
    (aten.upsample_nearest2d.vec, (tensor(2, 3, 4, 5), None, [2.0, 2.0]), {2: (0, 0), 3: (0, 0)}),
    (aten.upsample_nearest2d.vec, (tensor(2, 3, 4, 5), [9, 7], None), None),
]


@pytest.mark.parametrize(("target", "sample", "halos"), HALOS, ids=lambda v: str(v)[:60])
def test_halos(target: Any, sample: Sample, halos: dict[int, Halo] | None) -> None:
    """Exactly the rows a kernel reaches over; where rows of both sides do not match up, the axis is refused."""
    axes, node = axes_of_call(target, sample)
    (use, *_), found = axes[node].uses, {}
    for d in sorted(use.kept_dims - {0, 1}):
        assert use.axes[d][0] in axes[node].carries
        found[d] = halo_of(use, use.axes[d][0])
    assert found == (halos or {})
    check_rule(target, sample, most=12)


def test_an_axis_that_occurs_twice_is_refused() -> None:
    """x + x^T makes rows and columns one atom: a slice of the result needs two slices of x."""
    tape = Tape()
    x = tape.input(tensor(6, 6))
    y = tape.call(aten.add.Tensor, x, tape.call(aten.t.default, x))
    program = tape.program(y)
    region = region_of(program)
    assert not region.carries[1] and region.barred[1]
    assert list(loops_over(region, 0, 2)) == []


def test_an_axis_that_occurs_twice_has_a_reason() -> None:
    from fmecompile.analysis.axes import propagate

    tape = Tape()
    x = tape.input(tensor(6, 6))
    y = tape.call(aten.add.Tensor, x, tape.call(aten.t.default, x))
    assert propagate(tape.graph)[y].reason


# ---------------------------------------------------------------------------------------------------- repeated operands


def _twice(write: Callable[[Tape, fx.Node], fx.Node], *shape: int) -> int:
    """Loops over every run of a program whose operators read the same value several times; how many ran."""
    tape = Tape()
    value = write(tape, tape.call(aten.clone.default, tape.input(tensor(*shape))))
    program = tape.program(tape.call(aten.clone.default, value))
    region, n = region_of(program), len(compute_nodes(program.graph))
    spans = [(start, stop) for start in range(n) for stop in range(start + 1, n + 1)]
    return assert_chunks_equal(program, [g for span in spans for g in loops_over(region, *span)])


REPEATED: dict[str, tuple[Callable[[Tape, fx.Node], fx.Node], tuple[int, ...]]] = {
    "self-attention": (lambda t, x: t.call(aten.scaled_dot_product_attention.default, x, x, x), (3, 4, 4)),
    "attention with its own mask": (
        lambda t, x: t.call(aten.scaled_dot_product_attention.default, x, x, x, t.call(aten.matmul.default, x, x)),
        (3, 4, 4),
    ),
    "queries of another view": (
        lambda t, x: t.call(aten.scaled_dot_product_attention.default, t.call(aten.transpose.int, x, -1, -2), x, x),
        (3, 4, 4),
    ),
    "matmul": (lambda t, x: t.call(aten.matmul.default, x, x), (4, 4)),
    "gram": (lambda t, x: t.call(aten.matmul.default, x, t.call(aten.t.default, x)), (4, 5)),
    "bmm": (lambda t, x: t.call(aten.bmm.default, x, x), (3, 4, 4)),
    "weight of itself": (lambda t, x: t.call(aten.linear.default, x, x), (4, 4)),
    "plus transpose": (lambda t, x: t.call(aten.add.Tensor, x, t.call(aten.t.default, x)), (4, 4)),
    "plus merged transpose": (
        lambda t, x: t.call(aten.add.Tensor, x, t.call(aten.reshape.default, t.call(aten.t.default, x), [4, 6])),
        (4, 6),
    ),
    "outer product": (
        lambda t, x: t.call(
            aten.mul.Tensor, t.call(aten.unsqueeze.default, x, 0), t.call(aten.unsqueeze.default, x, 1)
        ),
        (5,),
    ),
    "itself": (lambda t, x: t.call(aten.mul.Tensor, x, x), (4, 3)),
    "minus reversed": (lambda t, x: t.call(aten.sub.Tensor, x, t.call(aten.flip.default, x, [0])), (5, 3)),
    "minus first": (
        lambda t, x: t.call(aten.sub.Tensor, x, t.call(aten.slice.Tensor, x, 0, 0, 1)),
        (5, 3),
    ),
    "minus mean": (lambda t, x: t.call(aten.sub.Tensor, x, t.call(aten.mean.dim, x, [0], True)), (5, 3)),
    "cat": (lambda t, x: t.call(aten.cat.default, [x, x], 0), (4, 3)),
    "cat of halves": (
        lambda t, x: t.call(
            aten.cat.default,
            [t.call(aten.slice.Tensor, x, 0, 2, 4), t.call(aten.slice.Tensor, x, 0, 0, 2)],
            0,
        ),
        (4, 3),
    ),
    "where": (
        lambda t, x: t.call(aten.where.self, t.call(aten.gt.Scalar, x, 0.0), x, t.call(aten.neg.default, x)),
        (4, 3),
    ),
    "statistics of another tensor's groups": (
        lambda t, x: t.call(
            group_norm_apply,
            x,
            t.call(group_norm_statistics, t.call(group_norm_moments, t.call(aten.flip.default, x, [0]), 2), 1e-3),
            None,
            None,
        ),
        (4, 4, 3),
    ),
}


@pytest.mark.parametrize("case", REPEATED)
def test_repeated_operands_are_exact_or_refused(case: str) -> None:
    write, shape = REPEATED[case]
    assert (_twice(write, *shape) == 0) == (case == "plus transpose"), "both of its axes are one atom"


# -------------------------------------------------------------------------------------------------------- control group


def _same_axes(call: Call, x: Operand, *_: Any, **__: Any) -> Result:
    """The mistake: everything is kept, result axes are the operand's."""
    call.keep(x, range(x.ndim))
    axes: list[Axis | None] = [x.axes[d] if x.shape[d] == size else None for d, size in enumerate(call.shape)]
    return call.result(axes)


def _keys_kept(call: Call, query: Operand, key: Operand, value: Operand, *_: Any) -> Result:
    assert call.same(query.axes[-2], key.axes[-2]) and call.same(key.axes[-2], value.axes[-2])
    for operand in (query, key, value):
        call.keep(operand, [operand.ndim - 2])
    return call.result([None, query.axes[-2], None])


def _key_frames_kept(call: Call, query: Operand, key: Operand, value: Operand, *_: Any) -> Result:
    assert all(call.same(query.axes[1], operand.axes[1]) for operand in (key, value))
    for operand in (query, key, value):
        call.keep(operand, [1])
    return call.result([None, query.axes[1], None, None, None])


def _gates_kept(call: Call, x: Operand, *_: Any) -> Result:
    """The halves next to each other, not one behind the other."""
    parts = call.split(x.axes[-1], [call.shape[-1], 2]) or [(), ()]
    call.keep(x, [x.ndim - 1])
    return call.result([None, parts[0]])


def _cat_kept(call: Call, tensors: Sequence[Operand], dim: int) -> Result:
    """[row, which] where it is [which, row]."""
    first, second = tensors
    assert call.same(first.axes[dim], second.axes[dim])
    for operand in tensors:
        call.keep(operand, [dim])
    return call.result([None, first.axes[dim] + call.fresh(2)])


def _half_kept(call: Call, x: Operand, *_: Any) -> Result:
    parts = call.split(x.axes[1], [3, 2])
    assert parts is not None
    call.keep(x, [1])
    return call.result([None, parts[0]])


def _unmoved(call: Call, x: Operand, *_: Any) -> Result:
    """A square transpose that forgets to move the axes."""
    call.keep(x, range(x.ndim))
    return call.result(x.axes)


def _left_aligned(call: Call, x: Operand, y: Operand) -> Result:
    """Broadcasting aligned left."""
    assert call.same(x.axes[0], y.axes[0])
    call.keep(x, [0])
    call.keep(y, [0])
    return call.result([x.axes[0], None])


def _batch_of_statistics(call: Call, x: Operand, statistics: Operand, *_: Any) -> Result:
    """Statistics kept along groups where channels are."""
    channels, inner = call.split(x.axes[1], [statistics.shape[2], x.shape[1] // statistics.shape[2]]) or ((), ())
    call.keep(x, [1])
    return call.result([None, channels + inner, None])


SQUARE = tensor(4, 4)
WRONG: list[tuple[str, Any, Callable[..., Result], Sample, set[str]]] = [
    # what is wrong, operator, rule, sample, which checks see it
    ("group norm kept along W", aten.group_norm.default, _same_axes, (tensor(2, 4, 3, 6), 2), {"chunks", "poison"}),
    ("layer norm kept", aten.layer_norm.default, _same_axes, (tensor(4, 6), [6]), {"chunks", "poison"}),
    ("in-features kept", aten.linear.default, _same_axes, (tensor(6, 5), tensor(5, 5)), {"chunks", "poison"}),
    (
        "keys kept",
        aten.scaled_dot_product_attention.default,
        _keys_kept,
        (tensor(2, 4, 3), tensor(2, 4, 3), tensor(2, 4, 3)),
        {"chunks", "poison"},
    ),
    (
        "frames of keys kept",
        TEMPORAL_ATTENTION,
        _key_frames_kept,
        (tensor(2, 4, 3, 2, 5), tensor(2, 4, 3, 2, 5), tensor(2, 4, 3, 2, 5)),
        {"chunks", "poison"},
    ),
    ("gates kept", GEGLU, _gates_kept, (tensor(4, 12),), {"chunks", "poison"}),
    (
        "padded dimension kept",
        aten.conv2d.default,
        _same_axes,
        (tensor(2, 3, 6, 6), tensor(3, 3, 3, 3), None, [1, 1], [1, 1]),
        {"chunks", "poison"},
    ),
    ("softmax kept along its dim", aten.softmax.int, _same_axes, (tensor(4, 6), 1), {"chunks", "poison"}),
    ("cat kept along dim", aten.cat.default, _cat_kept, ([tensor(2, 5), tensor(2, 5)], 1), {"chunks", "poison"}),
    ("flip kept", aten.flip.default, _same_axes, (tensor(4, 6), [1]), {"chunks", "poison"}),
    ("cumsum kept", aten.cumsum.default, _same_axes, (tensor(4, 6), 0), {"chunks", "poison"}),
    ("roll kept", aten.roll.default, _same_axes, (tensor(4, 6), [1], [1]), {"chunks", "poison"}),
    ("slice kept", aten.slice.Tensor, _half_kept, (tensor(2, 6), 1, 3, 6), {"chunks", "poison"}),
    ("transpose unmoved", aten.t.default, _unmoved, (SQUARE,), {"chunks", "poison"}),
    ("broadcast aligned left", aten.add.Tensor, _left_aligned, (SQUARE, tensor(4)), {"chunks", "poison"}),
    (
        "groups unmatched",
        group_norm_apply,
        _batch_of_statistics,
        (tensor(2, 4, 3), tensor(2, 2, 2), None, None),
        {"chunks"},
    ),
]


@pytest.mark.parametrize(("what", "target", "rule", "sample", "seen"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_rule_is_caught(
    what: str, target: Any, rule: Callable[..., Result], sample: Sample, seen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control group: the same checks, on rules that are wrong."""
    monkeypatch.setitem(RULES, target, OperatorRule(rule, (sample,)))
    assert _carried(target, sample), what
    for name, check in (("chunks", check_chunks), ("poison", check_poison)):
        if name in seen:
            with pytest.raises((AssertionError, RuntimeError, CaptureError)):
                check(target, sample)
        else:
            check(target, sample)


STRIDED = (tensor(2, 3, 8), tensor(3, 3, 3), None, [2], [1])
CENTRED = (tensor(2, 3, 7), tensor(3, 3, 3), None, [1], [1])


@pytest.mark.parametrize(
    ("sample", "halo", "words"),
    [
        (CENTRED, (1, 1), ""),  # the right one
        (CENTRED, (0, 1), "say they read"),  # one row short
        (CENTRED, (1, 0), "say they read"),
        (CENTRED, (0, 0), "say they read"),
        (CENTRED, (0, 2), "say they read"),  # as many rows, but not those
        (CENTRED, (2, 0), "say they read"),
        (CENTRED, (2, 2), "idle"),
        (CENTRED, (1, 2), "idle"),
        (STRIDED, (1, 0), ""),
        (STRIDED, (0, 0), "say they read"),
        (STRIDED, (0, 1), "say they read"),
        (STRIDED, (1, 1), "idle"),
        (STRIDED, (3, 0), "idle"),
    ],
    ids=str,
)
def test_a_wrong_halo_is_caught(sample: Sample, halo: Halo, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control group of halos: one too small is seen by poison and by comparing, one too large by poison."""

    def rule(call: Call, x: Operand, *_: Any) -> Result:
        rows, _ = call.split(x.axes[2], [call.shape[2], x.shape[2] // call.shape[2]]) or ((), ())
        call.keep_with_halo(x, 2, *halo)
        return call.result([None, None, rows])

    monkeypatch.setitem(RULES, aten.conv1d.default, replace(RULES[aten.conv1d.default], rule=rule))
    if not words:
        check_rule(aten.conv1d.default, sample)
        return
    with pytest.raises(AssertionError, match=words):
        check_poison(aten.conv1d.default, sample)
    if words != "idle":
        with pytest.raises((AssertionError, RuntimeError, CaptureError)):
            check_chunks(aten.conv1d.default, sample)


def test_the_control_group_ends_with_its_test() -> None:
    assert aten.cumsum.default not in RULES and aten.roll.default not in RULES


# --------------------------------------------------------------------------------------------------------- drawn shapes


@st.composite
def pointwise_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    shape = draw(shapes(1, 4))

    def operand() -> TensorSpec:
        sizes = [size if draw(st.booleans()) else 1 for size in shape]
        return dense(draw, sizes[draw(st.integers(0, len(sizes))) :])

    return draw(
        st.sampled_from(
            [
                (aten.mul.Tensor, (operand(), operand())),
                (aten.add.Tensor, (dense(draw, shape), operand())),
                (aten.addcmul.default, (operand(), operand(), operand())),
                (aten.silu.default, (operand(),)),
            ]
        )
    )


@st.composite
def shape_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    shape = draw(shapes(1, 4))
    x, dims = dense(draw, shape), len(shape)
    dim = draw(st.integers(-dims, dims - 1))
    return draw(
        st.sampled_from(
            [
                (aten.reshape.default, (x, draw(factorisations(prod(shape))))),
                (aten.reshape.default, (x, draw(factorisations(prod(shape))))),
                (aten.permute.default, (x, draw(st.permutations(range(dims))))),
                (aten.transpose.int, (x, dim, draw(st.integers(-dims, dims - 1)))),
                (aten.unsqueeze.default, (x, draw(st.integers(-dims - 1, dims)))),
                (aten.flatten.using_ints, (x, dim % dims, draw(st.integers(dim % dims, dims - 1)))),
                (aten.repeat.default, (x, draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims + 1)))),
                (aten.repeat_interleave.self_int, (x, draw(st.integers(1, 3)), dim)),
                (aten.select.int, (x, dim, draw(st.integers(0, shape[dim] - 1)))),
                (
                    aten.slice.Tensor,
                    (x, dim, draw(st.integers(0, shape[dim] - 1)), shape[dim], draw(st.integers(1, 2))),
                ),
                (aten.flip.default, (x, [dim])),
                (aten.pad.default, (x, [draw(st.integers(0, 1)) for _ in range(2)])),
            ]
        )
    )


@st.composite
def cat_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    shape = draw(shapes(1, 3))
    dim = draw(st.integers(0, len(shape) - 1))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    parts = [dense(draw, [*shape[:dim], size, *shape[dim + 1 :]]) for size in rows]
    return aten.cat.default, (parts, draw(st.sampled_from([dim, dim - len(shape)])))


@st.composite
def linear_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    shape, out = draw(shapes(1, 4)), draw(st.integers(1, 6))
    bias = draw(st.sampled_from([None, tensor(out)]))
    return aten.linear.default, (dense(draw, shape), dense(draw, (out, shape[-1])), bias)


@st.composite
def convolution_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    """One to three spatial dimensions, kernels of 1 to 5, strides, paddings, dilations and groups."""
    spatial = draw(st.sampled_from([1, 2, 2, 3]))
    kernel = [draw(st.sampled_from([1, 2, 3, 3, 5])) for _ in range(spatial)]
    dilation = [draw(st.sampled_from([1, 1, 2])) for _ in kernel]
    padding = [draw(st.sampled_from([k // 2 * d, k // 2 * d, 0, 1])) for k, d in zip(kernel, dilation, strict=True)]
    sizes = [draw(st.integers((k - 1) * d + 1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    groups, channels, out = draw(st.sampled_from([(1, 3, 2), (2, 4, 2), (2, 2, 4)]))
    x = dense(draw, (draw(st.integers(1, 3)), channels, *sizes))
    weight = tensor(out, channels // groups, *kernel)
    stride = [draw(st.sampled_from([1, 1, 2])) for _ in kernel]
    bias = draw(st.sampled_from([None, tensor(out)]))
    return CONVOLUTIONS[spatial], (x, weight, bias, stride, padding, dilation, groups)


@st.composite
def norm_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    batch, per_group, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels = groups * per_group
    spatial = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    if batch * per_group * prod(spatial) == 1 or per_group * prod(spatial) == 1:
        spatial = [*spatial, 2]
    x = dense(draw, (batch, channels, *spatial))
    affine = (tensor(channels), tensor(channels)) if draw(st.booleans()) else (None, None)
    last = draw(st.integers(1, x.shape.__len__()))
    return draw(
        st.sampled_from(
            [
                (aten.group_norm.default, (x, groups, *affine, 1e-3)),
                (group_norm_moments, (x, groups)),
                (group_norm_statistics, (tensor(2, batch, groups, *spatial[:-1]), 1e-3)),
                (group_norm_apply, (x, tensor(2, batch, groups), *affine)),
                (aten.layer_norm.default, (x, list(x.shape[-last:]))),
                (aten.softmax.int, (x, draw(st.integers(-len(x.shape), len(x.shape) - 1)))),
            ]
        )
    )


@st.composite
def attention_calls(draw: st.DrawFn) -> tuple[Any, Sample]:
    """With and without a mask that broadcasts over batch, heads or rows; self- and cross-attention; causal."""
    batch = draw(shapes(0, 2, (1, 2, 3)))
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    keys = draw(st.sampled_from([rows, 4]))
    q, k, v = (dense(draw, (*batch, n, width)) for n in (rows, keys, keys))
    if draw(st.integers(0, 3)) == 0:
        return aten.scaled_dot_product_attention.default, (q, k, v, None, 0.0, True)
    lead = [size if draw(st.booleans()) else 1 for size in batch][draw(st.integers(0, len(batch))) :]
    mask = draw(st.sampled_from([None, tensor(*lead, rows, keys), tensor(*lead, 1, keys)]))
    return aten.scaled_dot_product_attention.default, (q, k, v, mask)


def _check(call: tuple[Any, Sample]) -> None:
    check_rule(*call, most=8)


test_pointwise_on_drawn_shapes = few(given(pointwise_calls())(_check))
test_shape_operators_on_drawn_shapes = some(given(shape_calls())(_check))
test_cat_on_drawn_shapes = few(given(cat_calls())(_check))
test_linear_on_drawn_shapes = few(given(linear_calls())(_check))
test_convolution_on_drawn_shapes = some(given(convolution_calls())(_check))
test_norms_on_drawn_shapes = some(given(norm_calls())(_check))
test_attention_on_drawn_shapes = some(given(attention_calls())(_check))


@few
@given(st.data())
def test_blocks_are_least_runs_of_equal_extent(data: st.DataObject) -> None:
    before = data.draw(shapes(1, 4))
    after = data.draw(factorisations(prod(before)))
    found = blocks(before, after)
    assert [d for ins, _ in found for d in ins] == list(range(len(before)))
    assert [d for _, outs in found for d in outs] == list(range(len(after)))
    for ins, outs in found:
        assert prod(before[d] for d in ins) == prod(after[d] for d in outs)


# -------------------------------------------------------------------------------------------------- chains of operators


@settings(max_examples=100, deadline=None, derandomize=True)
@given(looped_chains())
def test_chains_in_loops_equal_chains_whole(case: tuple[Any, Any]) -> None:
    """One or two groups anywhere in a random program; and no more bytes are held than projected."""
    program, groups = case
    if not groups:
        return
    assert_chunks_equal(program, [groups])
    rewritten = program.copy()
    loops, built = with_loops(rewritten, *groups)
    assert measured_peak_bytes(rewritten, dict(loops)) <= project(rewritten, built, FACTS).peak_bytes


# --------------------------------------------------------------------------------------------- operators without a rule


class Call1(nn.Module):
    """A module that is one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def run_compiled(function: Callable[..., Any], *args: torch.Tensor) -> tuple[Any, Any, tuple[Any, ...]]:
    """What the module returns eagerly and compiled, and the barriers of its plan."""
    module = Call1(function).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled, plan = compile_module(module, args, {})
        return module(*args), Executable(compiled, module)(list(args)), plan.barriers


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("aten.cumsum.default", lambda x: torch.cumsum(F.silu(x), 1) * 2 + x),
        ("aten.var.dim", lambda x: F.silu(x).var(1) * 2),
        ("aten.roll.default", lambda x: torch.roll(x, 1, 0) + x),
        ("aten.sort.default", lambda x: torch.sort(F.silu(x), 1)[0] * 2),
        ("aten.topk.default", lambda x: torch.topk(x, 3, 1)[1] + 1),
        ("aten.max.dim", lambda x: x.max(1)),
        ("aten.tensor_split.indices", lambda x: torch.tensor_split(x, [2, 5], 1)[1] * 2),
    ],
)
def test_an_operator_without_a_rule_is_a_barrier(operator: str, function: Callable[..., Any]) -> None:
    """Never an exception, and the reason reaches the plan."""
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    want, got, barriers = run_compiled(function, x)
    assert_same(tree_leaves(got), tree_leaves(want))
    assert operator in {barrier.operator for barrier in barriers}
    assert all(barrier.reason for barrier in barriers)


@pytest.mark.parametrize(
    "function",
    [lambda x: x[x > 0] * 2, lambda x: x * x.sum().item(), lambda x: x[x[:, 0].argmax()] * 2],
    ids=["nonzero", "item", "index by value"],
)
def test_shapes_that_depend_on_data_are_a_capture_error(function: Callable[..., Any]) -> None:
    """The dispatcher leaves a module eager on CaptureError, and on nothing else."""
    with pytest.raises(CaptureError):
        run_compiled(function, torch.randn(4, 6))
