"""``python -m benchmarks.gpu``: all that needs a GPU, tests and figures, in under ten minutes.

Each section runs in a process of its own with a time limit, prints one line, and is written to
``benchmarks/results/gpu.json`` as soon as it is done, so that one that fails loses nothing of the others. In a section
of a model, eager and optimized calls are interleaved on the same weights and inputs, fp16, and timed by CUDA events;
weights are random, seeded, and made on the device. Without a GPU nothing is run and nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, machine

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 570
"""What all sections together may take, in seconds; those that no time is left for are written down as left out."""
PAIRS = 7
CASES = {"svd-14": ("svd", 14), "svd-25": ("svd", 25), "animatediff-16": ("animatediff", 16)}
"""Family and frames; all with a batch of 2 at 576x1024."""
VARIANTS = ("lossless", "pipelined", "graphs", "inductor")
COMPARED = {"svd": 14, "animatediff": 16}
"""Families and frames that are compared with torch.compile: of two levels, or compiling would take all the time."""
MODULES = ("kernels", "copies")
"""Benchmarks of their own, run where the file is there."""


@dataclass(frozen=True)
class Section:
    """One command. What it measures is the last line that it prints, as JSON."""

    name: str
    command: tuple[str, ...]
    limit_s: float


def sections(plans: Path) -> list[Section]:
    """In the order in which they are worth their time; plans are searched for once a case and kept in ``plans``."""
    own = (sys.executable, "-m", "benchmarks.gpu", "--plans", str(plans), "--section")
    found = [Section("tests", (*own, "tests"), 150)]
    found += [Section(f"{case} {variant}", (*own, f"{case} {variant}"), 120) for variant in VARIANTS for case in CASES]
    found += [Section(f"{case} torch.compile", (*own, f"{case} torch.compile"), 150) for case in COMPARED]
    modules = [name for name in MODULES if importlib.util.find_spec(f"benchmarks.{name}") is not None]
    return [found[0], *(Section(name, (*own, name), 60) for name in modules), *found[1:]]


def run_all(asked: Sequence[Section], path: Path, about: dict[str, Any], total_s: float = TOTAL_S) -> None:
    """Run every section, and write ``path`` behind each."""
    done: dict[str, Any] = {}
    start = time.monotonic()
    for section in asked:
        left = total_s - (time.monotonic() - start)
        done[section.name] = _run(section, min(section.limit_s, left)) if left > 5 else {"left out": "no time is left"}
        print(f"{section.name}: {json.dumps(done[section.name])}", flush=True)
        text = json.dumps({"command": "benchmarks/gpu.sh", **about, "sections": done}, indent=1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def _run(section: Section, limit_s: float) -> dict[str, Any]:
    try:
        ran = subprocess.run(section.command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit_s:.0f} s"}
    lines = ran.stdout.strip().splitlines()
    try:
        figures = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        figures = None
    if ran.returncode or not isinstance(figures, dict):
        return {"failed": (ran.stderr.strip().splitlines() or lines or ["it said nothing"])[-1]}
    return figures


# -------------------------------------------------------------------------------------------------------- one section


def section(name: str, plans: Path) -> dict[str, Any]:
    """Run one section in this process."""
    if name == "tests":
        return _tests()
    if name in MODULES:
        return _module(name)
    case, variant = name.split()
    return _beside_torch_compile(case) if variant == "torch.compile" else _measured(case, variant, plans)


def _tests() -> dict[str, Any]:
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py")
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"exit": ran.returncode, "said": (ran.stdout.strip().splitlines() or [""])[-1], "failed tests": failed}


def _module(name: str) -> dict[str, Any]:
    ran = subprocess.run(
        (sys.executable, "-m", f"benchmarks.{name}"), capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {"exit": ran.returncode, "said": ran.stdout.strip().splitlines()[-40:]}


@torch.no_grad()
def _measured(case: str, variant: str, plans: Path) -> dict[str, Any]:
    import fmecompile

    module, inputs = _built(*CASES[case])
    options = _options(variant, plans / f"{case}.json")
    want = module(*inputs)[0]
    eager = _held(module, inputs)
    unoptimized = module.forward
    start = time.perf_counter()
    try:
        fmecompile.optimize(module, strict=True, **options)
    except fmecompile.OptionError as error:
        return {"left out": error.fact}
    got = module(*inputs)[0]
    compile_s = time.perf_counter() - start
    plan = fmecompile.explain(module).records[0].plan
    if variant == "lossless":
        plan.save(plans / f"{case}.json")
    for _ in range(3):
        module(*inputs)
    held = _held(module, inputs)
    times = [(_seconds(unoptimized, inputs), _seconds(module, inputs)) for _ in range(PAIRS)]
    ratios = [ours / theirs for theirs, ours in times]
    return {
        "eager s": statistics.median(theirs for theirs, _ in times),
        "optimized s": statistics.median(ours for _, ours in times),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "first call s": compile_s,
        "relative difference": float((got.double() - want.double()).norm() / want.double().norm()),
        **{f"eager {name}": value for name, value in eager.items()},
        **{f"optimized {name}": value for name, value in held.items()},
        "allocated of eager": held["allocated bytes"] / eager["allocated bytes"],
        "projected bytes": plan.projected_peak_bytes,
        "groups": len(plan.groups),
        "pipelined groups": plan.pipelined,
        "trips": plan.trips,
    }


@torch.no_grad()
def _beside_torch_compile(family: str) -> dict[str, Any]:
    """backend="inductor" beside torch.compile, on a model of two levels at its real width."""
    import fmecompile
    from benchmarks.latency import ANIMATEDIFF, SVD

    module, inputs = _built(family, COMPARED[family], **{"svd": SVD, "animatediff": ANIMATEDIFF}[family])
    theirs, ours = torch.compile(copy.deepcopy(module)), fmecompile.optimize(module, strict=True, backend="inductor")
    first = [_timed(call, inputs) for call in (theirs, ours)]
    times = [(_seconds(theirs, inputs), _seconds(ours, inputs)) for _ in range(PAIRS)]
    ratios = [mine / other for other, mine in times]
    peaks = [_allocated_bytes(call, inputs) for call in (theirs, ours)]
    return {
        "torch.compile s": statistics.median(other for other, _ in times),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "torch.compile first call s": first[0],
        "inductor first call s": first[1],
        "torch.compile allocated bytes": peaks[0],
        "inductor allocated bytes": peaks[1],
    }


def _timed(call: Callable[..., Any], inputs: Any) -> float:
    start = time.perf_counter()
    call(*inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _allocated_bytes(call: Callable[..., Any], inputs: Any) -> int:
    """By how much the allocator's peak of a call is over what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*inputs)
    return torch.cuda.max_memory_allocated() - before


def _built(family: str, frames: int, **config: Any) -> tuple[torch.nn.Module, Any]:
    from benchmarks.cases import INPUTS, MODELS

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        module = MODELS[family](**config).requires_grad_(False)
        inputs = INPUTS[family](2, frames, 576 // 8, 1024 // 8, torch.float16)
    return module, inputs


def _options(variant: str, known: Path) -> dict[str, Any]:
    """How a variant is optimized; with the plan of the lossless one where that is known."""
    from fmecompile.graph.plan import Plan

    plan = Plan.load(known) if known.exists() and variant != "lossless" else None
    options: dict[str, Any] = {} if plan is None else {"plan": plan}
    if variant == "pipelined":
        if plan is None:
            raise SystemExit("there is no plan of the lossless section to pipeline")
        options["plan"] = replace(plan, groups=tuple(replace(group, slots=2) for group in plan.groups))
    elif variant == "graphs":
        options["cuda_graphs"] = True
    elif variant == "inductor":
        options["backend"] = "inductor"
    return options


def _held(module: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    """Peaks of a call: beyond what is there before it by the allocator, and all that is reserved or in use."""
    import fmecompile

    torch.cuda.empty_cache()
    held = fmecompile.measure(module, *inputs)
    return {
        "live bytes": held.peak_bytes,
        "allocated bytes": held.cuda_allocated_bytes,
        "reserved bytes": held.cuda_reserved_bytes,
        "NVML bytes": held.nvml_used_bytes,
    }


def _seconds(call: Callable[..., Any], inputs: Any) -> float:
    """What the device takes from the first kernel to the last."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", help="run this one alone, in this process")
    parser.add_argument("--plans", type=Path, help="where plans are kept from one section to the next")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device here, so nothing was run and nothing was written")
        return 0
    if options.section:
        print(json.dumps(section(options.section, options.plans or Path(tempfile.mkdtemp()))))
        return 0
    with tempfile.TemporaryDirectory() as plans:
        run_all(sections(Path(plans)), RESULTS / "gpu.json", machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
