"""``python -m benchmarks.step_reuse``: what step reuse saves and keeps.

Work and bytes are those of the real models at real sizes, on fake tensors: products of convolutions, matrix products
and attention over all steps, relative to the diffusers module at every step. Time is that of whole generations at a
reduced size with reuse over those without, both optimized, and over eager's, interleaved: the medians of the ratios.
``--sets`` lists the values that are worth keeping together instead, and measures how long it takes to find them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fmecompile
from benchmarks.cases import CASES, Case, animatediff, animatediff_inputs, fake, svd, svd_inputs
from benchmarks.latency import ANIMATEDIFF, SVD
from benchmarks.report import save, table
from fmecompile.analysis.cuts import Cuts
from fmecompile.backends.offer import brief
from fmecompile.capture.export import capture
from fmecompile.graph import edit
from fmecompile.graph.program import compute_nodes
from fmecompile.operators.contraction import all_products
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.pipeline import Compilation, normalise
from fmecompile.reuse import ALL, REUSE, Policy, StaticPolicy, Steps

MIB = 2**20
STEPS = 25
POLICIES: dict[str, Policy] = {
    "Step Rehash, 13 of 25": fmecompile.StepRehash(full_steps=13),
    "DeepCache, interval 4": fmecompile.DeepCache(interval=4),
}
REAL = (CASES[0], CASES[1], CASES[2])


def work(program: Any) -> int:
    return sum(map(all_products, compute_nodes(program.graph)))


def set_rows(case: Case) -> list[dict[str, Any]]:
    """Every set of values that is worth keeping in one model, and how long it took to find them all."""
    with fake(torch.float16):
        compilation = Compilation(capture(case.build(), case.inputs(torch.float16), {}))
        normalise(compilation)
        cuts = Cuts(compilation.program)
        single = cuts.best()
        start = time.perf_counter()
        listed = cuts.sets.listed
        taken = time.perf_counter() - start
    print(f"{case.name}: {taken:.2f} s; the best single value is {single.module}, {single.nbytes / MIB:.1f} MiB")
    return [
        {
            "case": case.name,
            "kept MiB": one.nbytes / MIB,
            "saved": one.saved,
            "values": len(one.values),
            "results of": brief(one.modules),
            "runs": brief(one.running),
        }
        for one in listed
    ]


def fake_rows(case: Case) -> list[dict[str, Any]]:
    """Work and bytes of one model under every policy."""
    rows = []
    with fake(torch.float16):
        module, inputs = case.build(), case.inputs(torch.float16)
        compilation = Compilation(capture(module, inputs, {}))
        edit.annotate(compute_nodes(compilation.program.graph), compilation.facts)
        eager = work(compilation.program)
        normalise(compilation)
        full = work(compilation.program)
        cut = Cuts(compilation.program).last_up_temporal()
        shallow = compilation.program.copy()
        StepReuse((Cut(ALL, cut.value, ALL),), REUSE).apply(shallow, compilation.facts)
        peaks = _peaks(case, module, inputs)
    for name, policy in POLICIES.items():
        assert isinstance(policy, StaticPolicy)
        decisions = policy.plan(Steps(STEPS))
        reused = sum(decision == REUSE for decision in decisions)
        done = full * (STEPS - reused) + work(shallow) * reused
        rows.append({"case": case.name, "policy": name, "full steps": STEPS - reused, "work": done / eager / STEPS})
        rows[-1] |= {"shallow step": work(shallow) / eager, "kept MiB": cut.nbytes / MIB, "cut": cut.module} | peaks
    return rows


def _peaks(case: Case, module: nn.Module, inputs: Any) -> dict[str, float]:
    """Peaks of activations in MiB: of the plan without reuse, and of full and shallow steps."""
    sample, _, *rest = inputs
    fmecompile.optimize(module, strict=True)
    module(*inputs)
    alone = fmecompile.explain(module).records[0].plan.projected_peak_bytes
    fmecompile.optimize(module, reuse=fmecompile.DeepCache(interval=2), strict=True)
    for _ in range(2):  # the first time compiles
        steps = torch.linspace(1.6, 0.2, 2, dtype=torch.float16)
        found = [fmecompile.measure(module, sample, t, *rest).peak_bytes for t in steps]
    return {"peak MiB": alone / MIB, "full peak MiB": found[0] / MIB, "shallow peak MiB": found[1] / MIB}


@torch.no_grad()
def generation(module: nn.Module, inputs: Any) -> float:
    """Seconds of one generation."""
    sample, _, *rest = inputs
    start = time.perf_counter()
    for t in torch.linspace(1.6, 0.2, STEPS):
        module(sample, t, *rest)
    return time.perf_counter() - start


def timed_rows(name: str, module: nn.Module, inputs: Any, rounds: int) -> list[dict[str, Any]]:
    """Interleave generations: eager, optimized without reuse, and with each policy."""
    plain = fmecompile.optimize(copy.deepcopy(module), strict=True)
    reusing = {p: fmecompile.optimize(copy.deepcopy(module), reuse=POLICIES[p], strict=True) for p in POLICIES}
    runners = {"eager": module, "plain": plain, **reusing}
    for warm in runners.values():
        generation(warm, inputs)
    taken = [{key: generation(runner, inputs) for key, runner in runners.items()} for _ in range(rounds)]

    def row(policy: str) -> dict[str, Any]:
        ratios = [seconds[policy] / seconds["plain"] for seconds in taken]
        eager = statistics.median(seconds[policy] / seconds["eager"] for seconds in taken)
        spread = {"least": min(ratios), "most": max(ratios)}
        return {"policy": policy, "time": statistics.median(ratios)} | spread | {"time over eager": eager}

    base = {"case": name, "steps": STEPS, "without reuse s": statistics.median(s["plain"] for s in taken)}
    return [base | row(policy) for policy in POLICIES]


def timed() -> list[tuple[str, Callable[[], nn.Module], Any]]:
    return [
        ("SVD, 4 frames, 128x160, 2 levels", lambda: svd(**SVD), svd_inputs(2, 4, 16, 20, torch.float32)),
        (
            "AnimateDiff, 4 frames, 128x128, 2 levels",
            lambda: animatediff(**ANIMATEDIFF),
            animatediff_inputs(2, 4, 16, 16, torch.float32),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sets", action="store_true", help="only the sets of values that are worth keeping")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.sets:
        print(table([row for case in REAL for row in set_rows(case)]))
        return
    kept = [row for case in REAL for row in fake_rows(case)]
    print(table(kept))
    taken = [row for name, build, inputs in timed() for row in timed_rows(name, build(), inputs, options.rounds)]
    print(table(taken))
    print(save("step_reuse", "python -m benchmarks.step_reuse", [*kept, *taken]))


if __name__ == "__main__":
    main()
