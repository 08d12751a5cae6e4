"""``python -m benchmarks.memory``: activation peaks of the real models at real sizes, fp16, on fake tensors.

Peak of live storages during a call, weights and inputs not counted: of the diffusers module as it is, as the plan
projects it, and of the optimized module as it runs. A case that has a limit is planned to hold no more, with values
that are made twice or wait in host memory where it takes that.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import fmecompile
from benchmarks.cases import CASES, GIB, Case, fake
from benchmarks.report import save, table


def row(case: Case) -> dict[str, Any]:
    """Measure one case."""
    with fake(torch.float16):
        module, inputs = case.build(), case.inputs(torch.float16)
        eager = fmecompile.measure(module, *inputs).peak_bytes
        case.optimize(module, inputs)
        start = time.perf_counter()
        module(*inputs)
        first = time.perf_counter() - start
        measured = fmecompile.measure(module, *inputs).peak_bytes
        plan = fmecompile.explain(module).records[0].plan
    return {
        "case": case.name,
        "eager GiB": eager / GIB,
        "projected GiB": plan.projected_peak_bytes / GIB,
        "measured GiB": measured / GIB,
        "of eager": measured / eager,
        "must GiB": _gib(case.must_bytes(eager)),
        "aim GiB": _gib(case.aim_bytes(eager)),
        "groups": len(plan.groups),
        "trips": plan.trips,
        "made twice": len(plan.recomputed),
        "in host memory": len(plan.spilled),
        "first call s": first,
    }


def _gib(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / GIB


def main() -> None:
    rows = [row(case) for case in CASES]
    print(table(rows))
    print(save("memory", "python -m benchmarks.memory", rows))


if __name__ == "__main__":
    main()
