"""``python -m benchmarks.compile_time``: cold compile of the real SVD UNet beside torch.export alone, and its growth.

Growth is measured on UNets of 1, 2 and 4 layers a block: everything after capture, over nodes.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.cases import CASES, fake, svd, svd_inputs
from benchmarks.report import save, table
from fmecompile.capture.export import export
from fmecompile.graph.program import compute_nodes
from fmecompile.pipeline import Compilation, compile_module


def compile_row(name: str, module: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    """Seconds of export alone, of a whole compilation, and of its parts."""
    start = time.perf_counter()
    export(module, inputs, {})
    alone = time.perf_counter() - start
    marks = {"start": time.perf_counter()}
    operators = 0

    def observe(stage: str, compilation: Compilation) -> None:
        nonlocal operators
        marks[stage] = time.perf_counter()
        if stage == "two-pass-norm":
            operators = len(compute_nodes(compilation.program.graph))

    compile_module(module, inputs, {}, observe=observe)
    whole = time.perf_counter() - marks["start"]
    after = whole - (marks["capture"] - marks["start"])
    return {
        "case": name,
        "operators": operators,
        "export s": alone,
        "compile s": whole,
        "compile / export": whole / alone,
        "search s": marks["partition"] - marks["two-pass-norm"],
        "after capture s": after,
        "ms an operator": 1000 * after / operators,
    }


def main() -> None:
    rows = []
    with fake(torch.float16):
        case = CASES[0]
        rows.append(compile_row(case.name, case.build(), case.inputs(torch.float16)))
        for layers in (1, 2, 4):
            module, inputs = svd(layers_per_block=layers), svd_inputs(2, 14, 72, 128, torch.float16)
            rows.append(compile_row(f"SVD, {layers} layers a block", module, inputs))
    print(table(rows))
    print(save("compile_time", "python -m benchmarks.compile_time", rows))


if __name__ == "__main__":
    main()
