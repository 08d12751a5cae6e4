"""GroupNorm in parts: exact in float64, as good as torch's own in narrower types, and cheap in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import group_norm

from fmecompile.runtime import norms
from fmecompile.runtime.measure import measure
from fmecompile.runtime.norms import group_norm_apply, group_norm_moments, group_norm_statistics

EPS = 1e-5


def two_pass(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = EPS
) -> torch.Tensor:
    return group_norm_apply(x, statistics_of(x, groups, eps), weight, bias)


def statistics_of(x: torch.Tensor, groups: int, eps: float = EPS) -> torch.Tensor:
    return group_norm_statistics(group_norm_moments(x, groups), eps)


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((2, 8, 5), 4),  # 3-D
    ((4, 8, 6, 5), 2),
    ((2, 8, 3, 6, 5), 4),  # 5-D
    ((1, 8, 6, 5), 2),  # one sample
    ((3, 8, 7, 5), 8),  # one channel a group
    ((3, 8, 7, 5), 1),  # one group: LayerNorm over everything
    ((17, 4, 3), 2),  # more samples than pieces, ragged
    ((33, 4, 1), 2),
    ((5, 4, 19, 3), 2),  # rows that pieces do not divide
    ((1, 4, 257), 2),
    ((2, 6, 31, 2), 3),
    ((1, 2, 1, 1, 40), 1),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
def test_exact_in_float64(shape: tuple[int, ...], groups: int, affine: str) -> None:
    x = noise(*shape) * 3 + 2
    weight = noise(shape[1], seed=1) if affine != "none" else None
    bias = noise(shape[1], seed=2) if affine == "weight and bias" else None
    got = two_pass(x, groups, weight, bias)
    torch.testing.assert_close(got, group_norm(x, groups, weight, bias, EPS), rtol=1e-12, atol=1e-12)
    assert got.dtype == x.dtype


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_exact_in_every_memory_order(order: Sequence[int]) -> None:
    """Moments go piece by piece along whatever dimension is outermost in memory."""
    logical = noise(3, 8, 7, 5)
    inverse = sorted(range(4), key=lambda d: order[d])
    x = logical.permute(*order).contiguous().permute(*inverse)
    assert x.shape == logical.shape
    torch.testing.assert_close(two_pass(x, 4), group_norm(logical, 4, eps=EPS), rtol=1e-12, atol=1e-12)


def test_exact_on_slices_and_expanded_operands() -> None:
    wide = noise(4, 8, 12, 10)
    for x in (wide[:, :, 2:9, ::3], wide[1:2], noise(1, 8, 1, 5).expand(3, 8, 4, 5)):
        torch.testing.assert_close(two_pass(x, 4), group_norm(x, 4, eps=EPS), rtol=1e-12, atol=1e-12)


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    x = noise(draw(st.integers(1, 20)), groups * per_group, *spatial, 2, seed=draw(st.integers(0, 9)))
    return x * draw(st.sampled_from([1e-3, 1.0, 1e3])) + draw(st.sampled_from([0.0, 5.0])), groups


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls())
def test_exact_on_drawn_shapes(case: tuple[torch.Tensor, int]) -> None:
    x, groups = case
    torch.testing.assert_close(two_pass(x, groups), group_norm(x, groups, eps=EPS), rtol=1e-10, atol=1e-10)
    statistics = statistics_of(x, groups)
    grouped = x.reshape(x.shape[0], groups, -1)
    want = torch.stack([grouped.mean(2), torch.rsqrt(grouped.var(2, correction=0) + EPS)])
    torch.testing.assert_close(statistics, want, rtol=1e-10, atol=1e-12)


def naive(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The control: mean(x^2) - mean(x)^2 in float32."""
    grouped = x.float().reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = grouped.square().mean(2, keepdim=True) - mean.square()
    return ((grouped - mean) * torch.rsqrt(variance.clamp_min(0) + EPS)).reshape(x.shape).to(x.dtype)


def torch_own(x: torch.Tensor, groups: int) -> torch.Tensor:
    return group_norm(x, groups, eps=EPS)


def error(norm: Callable[[torch.Tensor, int], torch.Tensor], mean: float, dtype: torch.dtype) -> float:
    """Root mean square error against float64 over 16 inputs of deviation 1; one input alone is a matter of luck."""
    total = 0.0
    for seed in range(16):
        x = (noise(2, 16, 37, 41, seed=seed) + mean).to(dtype)
        total += (norm(x, 4).double() - torch_own(x.double(), 4)).square().mean().item()
    return (total / 16) ** 0.5


@pytest.mark.parametrize(
    ("dtype", "mean"),
    [
        (torch.float32, 0.0),
        (torch.float32, 1.0),
        (torch.float32, 100.0),
        (torch.float32, 1e3),
        (torch.float32, 1e4),
        (torch.float16, 0.0),
        (torch.float16, 30.0),
        (torch.float16, 1e3),
        (torch.bfloat16, 0.0),
        (torch.bfloat16, 30.0),
    ],
    ids=str,
)
def test_as_good_as_torch_in_narrow_types(dtype: torch.dtype, mean: float) -> None:
    """Means far above the deviation are where a formula that subtracts large sums loses everything."""
    assert error(two_pass, mean, dtype) <= 1.5 * error(torch_own, mean, dtype)


def test_the_naive_formula_fails_the_same_check() -> None:
    assert error(naive, 1e4, torch.float32) > 100 * error(torch_own, 1e4, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_are_kept_in_float32(dtype: torch.dtype) -> None:
    """Values near the end of float16's range must not overflow on the way."""
    x = (noise(2, 8, 16, 16) * 100 + 3e4).to(dtype)
    moments = group_norm_moments(x, 2)
    statistics = group_norm_statistics(moments, EPS)
    assert moments.dtype == statistics.dtype == torch.float32
    assert torch.isfinite(two_pass(x, 2)).all()
    assert two_pass(x, 2).dtype == dtype


def test_a_constant_input_gives_zero() -> None:
    x = torch.full((2, 4, 9, 3), 7.0)
    assert two_pass(x, 2).abs().max() == 0


@pytest.mark.parametrize(
    "shape",
    [
        (2, 32, 64, 64),
        (32, 32, 16, 16),
        (14, 32, 32, 32),
        (2, 32, 14, 40, 40),
        (1, 32, 4, 64, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_of_sixteen_pieces_hold_an_eighth_of_the_input(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = noise(*shape, dtype=dtype)
    monkeypatch.setattr(norms, "_PIECE_BYTES", x.nbytes // 16)
    held = measure(statistics_of, x, 8).peak_bytes
    assert held <= x.nbytes * 0.14  # a sixteenth, and the centred copy of it


def test_moments_of_half_precision_hold_less_than_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is widened to float32: twice the bytes, twice."""
    x = noise(2, 32, 64, 64, dtype=torch.float16)
    monkeypatch.setattr(norms, "_PIECE_BYTES", 2 * x.nbytes // 16)
    assert measure(statistics_of, x, 8).peak_bytes <= x.nbytes * 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_apply_holds_its_result(dtype: torch.dtype) -> None:
    """No wide temporary beside the result where the input is wide already; one for half precision."""
    x = noise(2, 32, 64, 64, dtype=dtype)
    statistics = statistics_of(x, 8)
    held = measure(group_norm_apply, x, statistics).peak_bytes
    assert held <= x.nbytes * (1.05 if dtype == torch.float32 else 3.05)
