"""``python -m benchmarks.end_to_end``: SVD-XT from the image to 25 decoded frames, fp16, all weights on the device.

What the device must hold in each call of the diffusion pipeline, on fake tensors: weights of all components, inputs,
activations and what CUDA's libraries are taken to need. The denoising steps are all alike, so their number is no
matter. Each budget is asked for with plans that stay on the device and with values that may wait in host memory.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.report import save, table
from fmecompile.offline.calls import Call, calls_of
from fmecompile.offline.figures import planner
from fmecompile.offline.model import named_model
from fmecompile.offline.survey import Survey
from fmecompile.offline.weights import component_bytes

GIB = 2**30
BUDGETS = (10 * GIB, 8 * GIB)
RESIDENCE = "resident"


def rows(survey: Survey, budget_bytes: int) -> list[dict[str, Any]]:
    """One row a call, then the whole pipeline: the most of each column."""
    survey.budget_bytes = budget_bytes
    found = [_row(survey, call, budget_bytes) for call in survey.calls]
    whole = {name: max(row[name] for row in found) for name in found[0] if name != "call"}
    return [*found, whole | {"call": "whole pipeline", **_verdicts(whole, budget_bytes / GIB)}]


def _row(survey: Survey, call: Call, budget_bytes: int) -> dict[str, Any]:
    base = survey.base_bytes(call, RESIDENCE)
    spilled = survey.spilled(call, RESIDENCE)
    device = base + survey.ledger.value(call, "planned")
    amounts = {
        "without activations GiB": base / GIB,
        "eager GiB": (base + survey.ledger.value(call, "eager")) / GIB,
        "on the device GiB": device / GIB,
        "with spill GiB": (device if spilled is None else base + spilled.peak_bytes) / GIB,
        "to host GiB": 0.0 if spilled is None else spilled.host_bytes / GIB,
    }
    return {"budget GiB": budget_bytes / GIB, "call": call.name, **amounts, **_verdicts(amounts, budget_bytes / GIB)}


def _verdicts(amounts: dict[str, Any], budget_gib: float) -> dict[str, bool]:
    ways = {"fits on the device": "on the device GiB", "fits with spill": "with spill GiB"}
    return {verdict: amounts[way] <= budget_gib for verdict, way in ways.items()}


def main() -> None:
    model = named_model("svd-xt")
    weights = {part.name: component_bytes(part, torch.float16) or 0 for part in model.components}
    with planner(2, print) as pool:
        survey = Survey(calls_of(model, torch.float16, True), weights, pool, may_spill=True)
        survey.measure([model.size])
        found = [row for budget_bytes in BUDGETS for row in rows(survey, budget_bytes)]
    print(table(found))
    print(save("end_to_end", "python -m benchmarks.end_to_end", found))


if __name__ == "__main__":
    main()
