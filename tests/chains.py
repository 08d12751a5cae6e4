"""Random programs: chains of operators that hypothesis draws, with residuals, repeated operands and several outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from conformance import Looped, Tape, region_of, valid_nests
from hypothesis import strategies as st
from torch import fx

from fmecompile.graph.program import Program
from fmecompile.graph.specs import TensorSpec
from fmecompile.operators.registry import tensor
from fmecompile.partition.region import Region
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

aten = torch.ops.aten
Step = Callable[[Tape, fx.Node, st.DrawFn], fx.Node]
MAX_NUMEL = 400
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def shapes(
    draw: st.DrawFn, least: int = 1, most: int = 4, sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.sampled_from(sizes), min_size=least, max_size=most)))


@st.composite
def factorisations(draw: st.DrawFn, numel: int, most: int = 5) -> list[int]:
    """Sizes whose product is ``numel``, ones among them."""
    sizes: list[int] = []
    while len(sizes) < most - 1 and (numel > 1 or draw(st.booleans())):
        sizes.append(draw(st.sampled_from(divisors(numel))))
        numel //= sizes[-1]
    return draw(st.permutations([*sizes, numel]))


def dense(draw: st.DrawFn, shape: Sequence[int]) -> TensorSpec:
    """A tensor of ``shape`` in a drawn memory order."""
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= shape[d]
    return TensorSpec(tuple(shape), tuple(strides), torch.float64, torch.device("cpu"))


def unary(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """``contiguous`` is a copy or nothing at all, which may differ between a chunk and the whole."""
    return tape.call(draw(st.sampled_from([aten.silu.default, aten.neg.default, aten.contiguous.default])), x)


def binary(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """With a new input, some of whose dimensions broadcast."""
    shape = [size if draw(st.booleans()) else 1 for size in tape.shape(x)]
    return tape.call(aten.add.Tensor, x, tape.input(tensor(*shape[draw(st.integers(0, len(shape))) :])))


def residual(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """With an earlier value of the same shape, itself among them."""
    equal = [n for n in tape.graph.nodes if tape.shape(n) == tape.shape(x)]
    return tape.call(aten.mul.Tensor, x, draw(st.sampled_from(equal)))


def reshaped(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return tape.call(aten.reshape.default, x, draw(factorisations(prod(tape.shape(x)))))


def permuted(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return tape.call(aten.permute.default, x, draw(st.permutations(range(len(tape.shape(x))))))


def linear(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    weight = tape.input(tensor(draw(st.integers(1, 4)), tape.shape(x)[-1]))
    return tape.call(aten.linear.default, x, weight)


def layer_norm(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    shape = tape.shape(x)
    return tape.call(aten.layer_norm.default, x, list(shape[draw(st.integers(0, len(shape) - 1)) :]))


def softmax(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return tape.call(aten.softmax.int, x, draw(st.integers(0, len(tape.shape(x)) - 1)))


def group_norm(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """In one call or in three."""
    groups = draw(st.sampled_from(divisors(tape.shape(x)[1])))
    if len(tape.shape(x)) < 3 or draw(st.booleans()):
        return tape.call(aten.group_norm.default, x, groups, None, None, 1e-3)
    statistics = tape.call(group_norm_statistics, tape.call(group_norm_moments, x, groups), 1e-3)
    return tape.call(group_norm_apply, x, statistics, None, None)


def attention(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return tape.call(aten.scaled_dot_product_attention.default, x, x, x)


def gram(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """x @ x^T."""
    return tape.call(aten.matmul.default, x, tape.call(aten.transpose.int, x, -1, -2))


def joined(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """With itself or with an input, along any dimension."""
    other = x if draw(st.booleans()) else tape.input(tensor(*tape.shape(x)))
    return tape.call(aten.cat.default, [other, x], draw(st.integers(0, len(tape.shape(x)) - 1)))


def sliced(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    dim = draw(st.integers(0, len(tape.shape(x)) - 1))
    size = tape.shape(x)[dim]
    start = draw(st.integers(0, size - 1))
    return tape.call(aten.slice.Tensor, x, dim, start, draw(st.integers(start + 1, size)))


def selected(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    return tape.call(aten.select.int, x, draw(st.integers(0, len(tape.shape(x)) - 1)), 0)


def expanded(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    shape, dim = list(tape.shape(x)), draw(st.integers(0, len(tape.shape(x))))
    new = tape.call(aten.unsqueeze.default, x, dim)
    return tape.call(aten.expand.default, new, [*shape[:dim], draw(st.integers(2, 3)), *shape[dim:]])


def repeated(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    dim = draw(st.integers(0, len(tape.shape(x)) - 1))
    if draw(st.booleans()):
        return tape.call(aten.repeat_interleave.self_int, x, 2, dim)
    return tape.call(aten.repeat.default, x, [2 if d == dim else 1 for d in range(len(tape.shape(x)))])


def convolution(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """3-D to 5-D; every row of the result in the middle of what it reads, or strides of 2, or no padding."""
    spatial = tape.shape(x)[2:]
    reach = [draw(st.sampled_from([(1, 1), (3, 1), (3, 1), (3, 2), (5, 1)])) for _ in spatial]
    padding = [kernel // 2 * dilation for kernel, dilation in reach]
    if draw(st.integers(0, 4)) == 0:
        padding = [draw(st.integers(0, most)) for most in padding]
    fits = all(size + 2 * p > (k - 1) * d for size, p, (k, d) in zip(spatial, padding, reach, strict=True))
    reach, padding = (reach, padding) if fits else ([(1, 1)] * len(spatial), [0] * len(spatial))
    weight = tape.input(tensor(draw(st.integers(1, 3)), tape.shape(x)[1], *(kernel for kernel, _ in reach)))
    stride = [draw(st.sampled_from([1, 1, 2])) for _ in spatial]
    result = tape.call(CONVOLUTIONS[len(spatial)], x, weight, None, stride, padding, [d for _, d in reach])
    return tape.call(aten.mul.Scalar, result, 0.25)  # or a chain of them would lose digits to its own size


def upsampled(tape: Tape, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """By 2 mostly, which keeps its rows; or by 3 in one dimension, which does not."""
    ratio = draw(st.sampled_from([(2.0, 2.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0), (3.0, 1.0)]))
    return tape.call(aten.upsample_nearest2d.vec, x, None, list(ratio))


def steps_for(shape: tuple[int, ...]) -> list[Step]:
    """The steps that a value of ``shape`` allows."""
    found: list[Step] = [unary, binary, residual, reshaped, permuted, linear, layer_norm, softmax, sliced]
    if prod(shape) * 2 <= MAX_NUMEL:
        found += [joined, expanded, repeated]
    if len(shape) >= 2:
        found += [selected, group_norm, attention]
    if len(shape) >= 2 and prod(shape) * shape[-2] <= MAX_NUMEL:
        found.append(gram)
    if len(shape) in (3, 4, 5):
        found.append(convolution)
    if len(shape) == 4 and prod(shape) * 4 <= MAX_NUMEL:
        found.append(upsampled)
    return found


@st.composite
def chains(draw: st.DrawFn) -> Program:
    """Three to six steps from one input (copied, so that its storage may be taken over); one or two outputs."""
    tape = Tape()
    value = tape.call(aten.clone.default, tape.input(dense(draw, draw(shapes(2, 4, (2, 3, 4, 5, 6))))))
    middle = value
    for at in range(draw(st.integers(3, 6))):
        value = draw(st.sampled_from(steps_for(tape.shape(value))))(tape, value, draw)
        middle = value if at == 1 else middle
    value = tape.call(aten.clone.default, value)
    return tape.program(value, middle) if draw(st.booleans()) else tape.program(value)


@st.composite
def loops_in(draw: st.DrawFn, region: Region, start: int = 0, least: int = 1) -> Looped | None:
    """A group somewhere from ``start`` on with any valid nest and chunk size; None when nothing can be looped."""
    stops = range(start + least, len(region.nodes) + 1)
    spans = [(a, b) for b in reversed(stops) for a in range(start, b - least + 1)]
    spans = draw(st.permutations(spans)) if spans else []
    for a, b in spans:
        nests = valid_nests(region, a, b)
        if nests:
            nest = draw(st.sampled_from(nests))
            return Looped(a, b, nest, draw(st.integers(1, region.sizes[nest[-1]])))
    return None


@st.composite
def looped_chains(draw: st.DrawFn) -> tuple[Program, tuple[Looped, ...]]:
    """A chain and one or two groups of it, one behind the other; none when nothing can be looped."""
    program = draw(chains())
    region = region_of(program)
    first = draw(loops_in(region))
    if first is None:
        return program, ()
    second = draw(loops_in(region, first.stop)) if first.stop < len(region.nodes) else None
    return program, (first,) if second is None else (first, second)
