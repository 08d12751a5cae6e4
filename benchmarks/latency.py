"""``python -m benchmarks.latency``: time of a call, optimized over eager, with real widths on this machine.

Both run in one process, interleaved, on the same weights and inputs, float32; the figure is the median of the ratios of
neighbouring calls, beside what the cost model projects, without what caches save. Depth and resolution are reduced so
that a call takes seconds on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import fmecompile
from benchmarks.cases import (
    animatediff,
    animatediff_inputs,
    image_decoder,
    image_decoder_inputs,
    svd,
    svd_inputs,
    video_decoder,
    video_decoder_inputs,
)
from benchmarks.report import save, table

SVD = {
    "block_out_channels": (320, 640),
    "num_attention_heads": (5, 10),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1,
}
ANIMATEDIFF = {
    "block_out_channels": (320, 640),
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "layers_per_block": 1,
}


def timed(module: nn.Module, inputs: Any) -> float:
    start = time.perf_counter()
    module(*inputs)
    return time.perf_counter() - start


@torch.no_grad()
def row(name: str, module: nn.Module, inputs: Any, pairs: int) -> dict[str, Any]:
    """Interleave ``pairs`` eager and optimized calls of one module."""
    eager = fmecompile.measure(module, *inputs).peak_bytes
    unoptimized = module.forward
    fmecompile.optimize(module, strict=True)
    module(*inputs)
    measured = fmecompile.measure(module, *inputs).peak_bytes
    plan = fmecompile.explain(module).records[0].plan
    ratios, seconds = [], []
    for _ in range(pairs):
        start = time.perf_counter()
        unoptimized(*inputs)
        reference = time.perf_counter() - start
        seconds.append(reference)
        ratios.append(timed(module, inputs) / reference)
    return {
        "case": name,
        "eager s": statistics.median(seconds),
        "projected eager s": plan.eager_s,
        "optimized / eager": statistics.median(ratios),
        "projected": plan.projected_s / plan.eager_s,
        "least": min(ratios),
        "most": max(ratios),
        "eager MiB": eager / 2**20,
        "measured MiB": measured / 2**20,
        "groups": len(plan.groups),
        "trips": plan.trips,
    }


def unets() -> Iterator[tuple[str, nn.Module, Any]]:
    yield "SVD, 8 frames, 256x320, 2 levels", svd(**SVD), svd_inputs(2, 8, 32, 40, torch.float32)
    case = "AnimateDiff, 8 frames, 256x256, 2 levels"
    yield case, animatediff(**ANIMATEDIFF), animatediff_inputs(2, 8, 32, 32, torch.float32)


def decoders() -> Iterator[tuple[str, nn.Module, Any]]:
    yield "SVD decodes 8 frames, 192x256", video_decoder(), video_decoder_inputs(1, 8, 24, 32, torch.float32)
    yield "AnimateDiff decodes 8 frames, 192x256", image_decoder(), image_decoder_inputs(8, 1, 24, 32, torch.float32)


CASES = {"unets": unets, "decoders": decoders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    torch.manual_seed(0)
    chosen = [CASES[options.only]] if options.only else list(CASES.values())
    rows = []
    for cases in chosen:
        for case in cases():
            rows.append(row(*case, options.pairs))
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    print(save("latency", "python -m benchmarks.latency", rows, is_part=options.only is not None))


if __name__ == "__main__":
    main()
