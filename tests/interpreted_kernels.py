"""Kernels as Triton's interpreter runs them on a CPU, beside their references; ``test_kernels.py`` starts this.

It takes a process of its own, with ``TRITON_INTERPRET=1`` from the beginning: pytest does not collect it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fmecompile.kernels import blend, geglu, group_norm, registry, strides, temporal_attention
from fmecompile.kernels.blend import BLEND
from fmecompile.kernels.geglu import GEGLU
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY, GROUP_NORM_MOMENTS
from fmecompile.kernels.registry import KERNELS
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION
from fmecompile.runtime.norms import group_norm_statistics

F64 = torch.float64
NARROW = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5

# No shrinking: a program of the interpreter takes a millisecond, and a failure would take minutes.
some = settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_interpreter_is_asked() -> None:
    assert registry.IS_INTERPRETED and registry.is_launched(torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def empty_memory_is_nan() -> None:
    """So that no element which a kernel leaves out is right by chance. The process ends with this file."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@st.composite
def layouts(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random numbers with ``shape``: dimensions in any order in memory, and maybe a part of a larger tensor."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    whole = noise(*(shape[d] * gaps[d] for d in order), seed=seed, dtype=dtype)
    inverse = sorted(range(len(shape)), key=lambda k: order[k])
    return whole.permute(inverse)[tuple(slice(None, None, gap) for gap in gaps)]


def tolerance(dtype: torch.dtype) -> float:
    return {F64: 1e-12, torch.float32: 3e-6}.get(dtype, 2 * torch.finfo(dtype).eps)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """``want`` in float64; within some units in the last place of what holds ``got``, as a share of the largest."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    scale = max(want.abs().max().item(), 1e-3) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=tolerance(got.dtype), atol=tolerance(got.dtype) * scale)


def wide(args: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(name: str, *args: Any) -> None:
    """The kernel on ``args`` equals its reference on the same numbers in float64."""
    kernel = KERNELS[name]
    assert kernel.is_served(*args)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    got = kernel.target(*args)
    assert_close(got, kernel.reference(*wide(args)))
    assert got.stride() == kernel.empty(*args).stride()
    assert all(torch.equal(a, b) for a, b in zip(before, (a for a in args if isinstance(a, torch.Tensor)), strict=True))


DTYPES = st.sampled_from([F64, *NARROW])
SIZES = st.integers(1, 7)


@some
@given(st.data())
def test_geglu(data: st.DataObject) -> None:
    shape = [*data.draw(st.lists(SIZES, max_size=3)), 2 * data.draw(st.integers(1, 40))]
    check("geglu", data.draw(layouts(shape, data.draw(DTYPES))) * 3, data.draw(st.booleans()))


@some
@given(st.data())
def test_blend(data: st.DataObject) -> None:
    shape, dtype = data.draw(st.lists(SIZES, min_size=1, max_size=5)), data.draw(DTYPES)
    kept = [size if data.draw(st.booleans()) else 1 for size in shape][data.draw(st.integers(0, len(shape))) :]
    alpha = data.draw(layouts(kept, dtype)).sigmoid() if kept else torch.tensor(0.3, dtype=dtype)
    operands = [data.draw(layouts(shape, dtype, seed)) for seed in range(1, data.draw(st.integers(3, 4)))]
    check("blend", alpha, *operands)


@st.composite
def norms(draw: st.DrawFn, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    spatial = [*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 12))]
    x = draw(layouts((draw(st.integers(1, 2)), groups * per_group, *spatial), dtype))
    return x * draw(st.sampled_from([1e-2, 1.0, 10.0])) + draw(st.sampled_from([0.0, 3.0])), groups


@pytest.mark.parametrize("block", [8, 1024])
@settings(some, max_examples=8)
@given(st.data())
def test_moments(block: int, data: st.DataObject) -> None:
    """A row in one block, and in several that are joined."""
    x, groups = data.draw(norms(data.draw(DTYPES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm, "BLOCK", block)
        check("group_norm_moments", x, groups)


@some
@given(st.data())
def test_apply(data: st.DataObject) -> None:
    dtype = data.draw(DTYPES)
    x, groups = data.draw(norms(dtype))
    statistics = group_norm_statistics(KERNELS["group_norm_moments"].reference(x, groups), EPS)
    weight, bias = (noise(x.shape[1], seed=k, dtype=dtype) if data.draw(st.booleans()) else None for k in (1, 2))
    order = data.draw(st.none() | st.permutations(range(x.ndim)))
    check("group_norm_apply", x, statistics, weight, bias, data.draw(st.booleans()), order)
    assert GROUP_NORM_APPLY(x, statistics, weight, bias).stride() == torch.empty_like(x).stride()


@settings(some, max_examples=8)
@given(st.data())
def test_moments_of_chunks_are_those_of_the_whole(data: st.DataObject) -> None:
    """Chunks along any kept dimension, ragged ones too, give the same bits; joined and applied they are the norm."""
    x, groups = data.draw(norms(data.draw(st.sampled_from([torch.float32, torch.float16]))))
    kept = [0, *range(2, x.ndim - 1)]
    dim = data.draw(st.sampled_from(kept))
    parts = x.split(data.draw(st.integers(1, x.shape[dim])), dim)
    whole = GROUP_NORM_MOMENTS(x, groups)
    assert torch.equal(torch.cat([GROUP_NORM_MOMENTS(part, groups) for part in parts], dim + 1), whole)
    weight, bias = noise(x.shape[1], seed=1, dtype=x.dtype), noise(x.shape[1], seed=2, dtype=x.dtype)
    got = GROUP_NORM_APPLY(x, group_norm_statistics(whole, EPS), weight, bias, True)
    want = eager_norm(*wide((x, weight, bias)), groups)
    assert (got.double() - want).abs().max() <= 40 * torch.finfo(x.dtype).eps * max(want.abs().max(), 1)


@some
@given(st.data())
def test_temporal_attention(data: st.DataObject) -> None:
    """Any number of frames up to 64, of queries and of keys, and any width of a head up to 128."""
    dtype = data.draw(st.sampled_from(NARROW))
    frames = data.draw(st.integers(1, 64))
    keys = data.draw(st.sampled_from([frames, 1, 17]))
    batch, tokens, heads = (data.draw(st.integers(1, 2)) for _ in range(3))
    width = data.draw(st.sampled_from([1, 5, 8, 16, 40, 64, 80, 128]))
    q, k, v = (
        data.draw(layouts((batch, n, tokens, heads, width), dtype, seed)) for seed, n in enumerate((frames, keys, keys))
    )
    check("temporal_attention", q, k, v, data.draw(st.sampled_from([None, 0.25])))


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return KERNELS["temporal_attention"].reference(q, k, v)


def eager_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int = 4) -> torch.Tensor:
    return F.silu(torch.group_norm(x, groups, weight, bias, EPS))


def kernel_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return GROUP_NORM_APPLY(x, group_norm_statistics(GROUP_NORM_MOMENTS(x, 4), EPS), weight, bias, True)


BARS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...], float]] = {
    # kernel, eager, shapes, mean of the first operand
    "geglu": (GEGLU, geglu.geglu, ((64, 160),), 0.0),
    "geglu by tanh": (lambda x: GEGLU(x, True), lambda x: geglu.geglu(x, True), ((64, 160),), 0.0),
    "blend": (BLEND, blend.blend, ((8, 1, 1), (8, 24, 20), (8, 24, 20), (8, 24, 20)), 0.0),
    "norm": (kernel_norm, eager_norm, ((2, 16, 3, 160), (16,), (16,)), 0.0),
    "norm far from zero": (kernel_norm, eager_norm, ((2, 16, 3, 160), (16,), (16,)), 30.0),
    "attention": (TEMPORAL_ATTENTION, eager_attention, ((2, 25, 3, 2, 64),) * 3, 0.0),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", BARS)
def test_as_good_as_eager_in_narrow_types(name: str, dtype: torch.dtype) -> None:
    """Root mean square error against float64 on the same rounded numbers: at most 1.5 times eager's own, and twice that
    in bfloat16, to which the interpreter does not round but cuts off: twice the error of a GPU."""
    kernel, eager, shapes, mean = BARS[name]
    ours = theirs = 0.0
    for seed in range(2):
        args = [noise(*shape, seed=7 * seed + k, dtype=dtype) for k, shape in enumerate(shapes)]
        args[0] += mean
        want = eager(*wide(args))
        ours += (kernel(*args).double() - want).square().sum().item()
        theirs += (eager(*args).double() - want).square().sum().item()
    assert theirs > 0
    assert ours**0.5 <= (3.0 if dtype == torch.bfloat16 else 1.5) * theirs**0.5


class Grid:
    """Stands for a kernel: keeps the grid it is started on."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return lambda *_: None


@pytest.mark.parametrize("name", ["temporal_attention", "group_norm_moments"])
def test_more_than_65535_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first dimension of a grid takes more."""
    grid = Grid()
    row = torch.zeros(1, dtype=torch.float16)
    if name == "temporal_attention":
        monkeypatch.setattr(temporal_attention, "_kernel", grid)
        frames = row.expand(2, 8, 70_000, 5, 40)
        KERNELS[name].launch(row, frames, frames, frames)
    else:
        monkeypatch.setattr(group_norm, "_moments", grid)
        KERNELS[name].launch(row.expand(2, 2, 5, 70_000), row.expand(2, 10, 70_000, 40), 5)
    assert grid.grid == (2 * 70_000 * 5,)


def test_wide_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets in 64 bits, as tensors of 2**31 elements need."""
    assert strides.is_wide(torch.zeros(1).expand(2**31)) and not strides.is_wide(torch.zeros(4, 4))
    for module in (blend, geglu, group_norm, temporal_attention):
        monkeypatch.setattr(module, "is_wide", lambda *_: True)
    x = noise(2, 8, 5, 6, dtype=torch.float32)
    check("geglu", x)
    check("blend", x[:, :1, :1, :1], x, x.exp())
    check("group_norm_moments", x, 4)
    check("group_norm_apply", x, noise(2, 2, 4, dtype=torch.float32), None, None, True)
    check("temporal_attention", *(noise(1, 3, 2, 2, 8, seed=k, dtype=torch.float32) for k in range(3)))


def test_what_is_not_served_runs_its_reference() -> None:
    """float64 attention, more frames than a program holds, and norms of six dimensions."""
    for shape, dtype in (((1, 4, 2, 2, 8), F64), ((1, 65, 1, 1, 8), torch.float32), ((1, 4, 1, 1, 130), torch.float32)):
        args = [noise(*shape, seed=k, dtype=dtype) for k in range(3)]
        assert not KERNELS["temporal_attention"].is_served(*args)
        assert torch.equal(TEMPORAL_ATTENTION(*args), eager_attention(*args))
    x = noise(2, 4, 2, 2, 2, 3)
    assert_close(GROUP_NORM_MOMENTS(x, 2), KERNELS["group_norm_moments"].reference(x, 2))


@given(st.data())
@settings(some, max_examples=30)
def test_joined_dimensions_reach_the_same_addresses(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=5))
    tensors = [data.draw(layouts(shape, F64)) if shape else noise() for _ in range(2)]
    sizes, found = strides.joined(shape, *(t.stride() for t in tensors))
    pairs = {tuple(sum(i * s for i, s in zip(index, own, strict=True)) for own in found) for index in _places(sizes)}
    want = {
        tuple(sum(i * s for i, s in zip(index, t.stride(), strict=True)) for t in tensors) for index in _places(shape)
    }
    assert pairs == want


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return iter(torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes)).tolist() if sizes else [[]])
