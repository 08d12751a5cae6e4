"""``python -m benchmarks.kernels``: time of each kernel beside the calls of libraries that it stands for, on a GPU.

Sizes are those of the largest layers of Stable Video Diffusion's UNet, 25 frames of 576x1024, guidance batch 2, fp16.
Times are medians of 20 runs between CUDA events, after one that is not counted; ``GB/s`` counts what has to be read and
written. Prints JSON. Without a CUDA device and Triton there is nothing to time, and it says so.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks.report import machine
from fmecompile.kernels.blend import BLEND, blend
from fmecompile.kernels.geglu import GEGLU, geglu
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY, GROUP_NORM_MOMENTS
from fmecompile.kernels.registry import why_not
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION
from fmecompile.runtime.norms import group_norm_statistics

RUNS = 20
BATCH, FRAMES, CHANNELS, HEADS, HEIGHT, WIDTH = 2, 25, 320, 5, 72, 128
TOKENS = HEIGHT * WIDTH
EPS = 1e-6

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """``kernel`` and ``library`` return the same; ``nbytes`` is what both have to read and write."""

    name: str
    kernel: Run
    library: Run
    nbytes: int


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def pairs() -> Iterator[Pair]:
    """One at a time, so that memory of the last is free."""
    yield norm()
    yield norm_channels_last()
    yield gated()
    yield attention()
    yield blended()
    x = noise(BATCH * FRAMES, CHANNELS, HEIGHT, WIDTH)
    yield Pair("copy, for comparison", x.clone, x.clone, 2 * x.nbytes)


def norm(memory_format: torch.memory_format = torch.contiguous_format, layout: str = "contiguous") -> Pair:
    x = noise(BATCH * FRAMES, CHANNELS, HEIGHT, WIDTH).to(memory_format=memory_format)
    weight, bias = noise(CHANNELS), noise(CHANNELS)

    def kernel() -> torch.Tensor:
        statistics = group_norm_statistics(GROUP_NORM_MOMENTS(x, 32), EPS)
        return GROUP_NORM_APPLY(x, statistics, weight, bias, True)

    return Pair(
        f"group norm and silu, {layout}",
        kernel,
        lambda: F.silu(F.group_norm(x, 32, weight, bias, EPS)),
        3 * x.nbytes,
    )


def norm_channels_last() -> Pair:
    return norm(torch.channels_last, "channels last")


def gated() -> Pair:
    x = noise(BATCH * FRAMES, TOKENS, 8 * CHANNELS)
    return Pair("geglu", lambda: GEGLU(x), lambda: geglu(x), x.nbytes * 3 // 2)


def attention() -> Pair:
    q, k, v = (noise(BATCH * FRAMES, TOKENS, CHANNELS) for _ in range(3))
    apart = (BATCH, FRAMES, TOKENS, HEADS, CHANNELS // HEADS)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.view(apart).permute(0, 2, 3, 1, 4).reshape(BATCH * TOKENS, HEADS, FRAMES, -1)

    def library() -> torch.Tensor:
        """The layer's own permutations copy one tensor in and one out; here they fall to three in and one out."""
        result = F.scaled_dot_product_attention(rows(q), rows(k), rows(v))
        result = result.view(BATCH, TOKENS, HEADS, FRAMES, -1)
        return result.permute(0, 3, 1, 2, 4).reshape(BATCH * FRAMES, TOKENS, CHANNELS)

    def kernel() -> torch.Tensor:
        return TEMPORAL_ATTENTION(q.view(apart), k.view(apart), v.view(apart)).view(q.shape)

    return Pair(f"temporal attention, {BATCH * TOKENS} sequences of {FRAMES}", kernel, library, 4 * q.nbytes)


def blended() -> Pair:
    spatial, temporal, residual = (noise(BATCH * FRAMES, TOKENS, CHANNELS) for _ in range(3))
    alpha = noise(BATCH * FRAMES, 1, 1).sigmoid()
    operands = (alpha, spatial, temporal, residual)
    return Pair("blend and residual", lambda: BLEND(*operands), lambda: blend(*operands), 4 * spatial.nbytes)


def milliseconds(run: Run) -> float:
    """The median of ``RUNS`` runs."""
    times = []
    for _ in range(RUNS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[1:])


def row(pair: Pair) -> dict[str, object]:
    got, want = pair.kernel().float(), pair.library().float()
    difference = ((got - want).abs().max() / want.abs().max()).item()
    del got, want
    kernel, library = milliseconds(pair.kernel), milliseconds(pair.library)
    return {
        "case": pair.name,
        "kernel ms": kernel,
        "library ms": library,
        "kernel / library": kernel / library,
        "kernel GB/s": pair.nbytes / kernel / 1e6,
        "largest difference": difference,
    }


@torch.no_grad()
def main() -> None:
    reason = why_not(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device is there"
    if reason:
        sys.exit(f"nothing to time: {reason}")
    torch.manual_seed(0)
    rows = [row(pair) for pair in pairs()]
    print(json.dumps({"command": "python -m benchmarks.kernels", **machine(), "runs": RUNS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
