"""``python -m benchmarks.inductor``: backend="inductor" beside ``torch.compile(model)``, real widths, this machine.

Time: the median of the ratios of neighbouring calls, on the same weights and inputs, in one process, float32. Peak:
what the allocator gave out and had not got back, by the profiler's memory events, since compiled code allocates where
no dispatched operator tells; workspaces inside libraries count, which no plan knows. Cold compile: what a first call
takes longer than a second, in a process of its own, with empty caches. Depth and resolution are reduced so that a call
takes seconds on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fmecompile
from benchmarks.latency import timed, unets
from benchmarks.report import save, table


def cases() -> dict[str, tuple[str, nn.Module, Any]]:
    """By the word that ``--only`` takes."""
    return {case[0].split()[0].strip(","): case for case in unets()}


def allocated_peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that ``call`` held of what it allocated on the CPU, in libraries and kernels too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compiled_by(how: str, module: nn.Module) -> nn.Module:
    if how == "torch.compile":
        return torch.compile(module)  # type: ignore[return-value]
    return fmecompile.optimize(module, backend=how, strict=True)


@torch.no_grad()
def compile_s(how: str, word: str) -> float:
    """Seconds that a first call takes longer than a second one."""
    _, module, inputs = cases()[word]
    compiled = compiled_by(how, module.requires_grad_(False))
    return timed(compiled, inputs) - timed(compiled, inputs)


def cold_compile_s(how: str, word: str) -> float:
    """The same in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        cold = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
        command = [sys.executable, "-m", "benchmarks.inductor", "--cold", how, "--only", word]
        told = subprocess.run(command, env=os.environ | cold, check=True, capture_output=True, text=True).stdout
    return float(json.loads(told.splitlines()[-1]))


@torch.no_grad()
def row(word: str, rounds: int) -> dict[str, Any]:
    """Interleave ``rounds`` of torch.compile's calls and ours."""
    cold = {how: cold_compile_s(how, word) for how in ("torch.compile", "inductor")}
    name, module, inputs = cases()[word]
    module.requires_grad_(False)
    theirs, ours = compiled_by("torch.compile", copy.deepcopy(module)), compiled_by("inductor", module)
    theirs(*inputs), ours(*inputs)
    peaks = [allocated_peak_bytes(lambda called=called: called(*inputs)) for called in (theirs, ours)]
    reference = [timed(theirs, inputs)]
    ratios = []
    for _ in range(rounds):
        taken = timed(ours, inputs)
        reference.append(timed(theirs, inputs))
        ratios.append(2 * taken / (reference[-1] + reference[-2]))
    plan = fmecompile.explain(module).records[0].plan
    return {
        "case": name,
        "torch.compile s": statistics.median(reference),
        "inductor / torch.compile": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "torch.compile MiB": peaks[0] / 2**20,
        "inductor MiB": peaks[1] / 2**20,
        "projected MiB": plan.projected_peak_bytes / 2**20,
        "torch.compile cold s": cold["torch.compile"],
        "inductor cold s": cold["inductor"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("SVD", "AnimateDiff"))
    parser.add_argument("--cold", choices=("torch.compile", "inductor", "eager"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.cold:
        print(json.dumps(compile_s(options.cold, options.only)))
        return
    rows = [row(word, options.rounds) for word in ([options.only] if options.only else ["SVD", "AnimateDiff"])]
    print(table(rows))
    print(save("inductor", "python -m benchmarks.inductor", rows, is_part=options.only is not None))


if __name__ == "__main__":
    main()
