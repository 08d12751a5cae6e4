"""``python -m benchmarks.quality.evaluate``: what step reuse does to clips of the trained models.

Clips of one seed, with reuse and without, compared: PSNR, SSIM, a perceptual distance, flicker (``metrics.py``), over
numbers of full steps and policies (``sweep.py``). Conditions are of clips that training never saw, half moving digits
and half real ones. Two more rows say what the figures mean: ``no reuse`` is the compiled UNet at every step against
eager, so rounding alone, and ``fewer steps`` is the sampler itself run with that many steps. ``work`` counts products
relative to full steps only. Similarities for the calibrated schedules come from clips of training and another seed.

Writes ``benchmarks/results/quality.json``, and the table and plot ``docs/quality.md`` and ``docs/quality.svg``. About
half an hour on two cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fmecompile
from benchmarks.quality.data import Clips, clips, seeded
from benchmarks.quality.metrics import METRICS
from benchmarks.quality.models import UNETS, WEIGHTS, about, load
from benchmarks.quality.page import write_page
from benchmarks.quality.sample import STEPS, sample
from benchmarks.quality.sweep import Entry, Matrix, entries, module_of_the_cut, others, similarity
from benchmarks.report import save

COMMAND = "python -m benchmarks.quality.evaluate"
COUNTS = (13, 9, 7, 5, 4)
"""Full steps of 25 that DeepCache reaches, by intervals 2, 3, 4, 5 and 7."""
DOCS = Path(__file__).parents[2] / "docs"
CALIBRATION_CLIPS, CALIBRATION_SEED = 4, 1000
SOURCES = ("digits", "real clips")
Row = dict[str, Any]


class Evaluation:
    """One UNet, what its clips are conditioned on (``digits`` of them digits, the rest real), and the clips that it
    makes without reuse, in eager mode."""

    def __init__(self, model: str, unet: nn.Module, shown: Clips, *, steps: int, seed: int, digits: int) -> None:
        self.model, self.unet, self.shown = model, unet, shown
        self.steps, self.seed, self.digits = steps, seed, digits
        self.reference = sample(model, unet, shown, steps=steps, seed=seed)
        self._known: dict[Hashable, Row] = {}

    def without_reuse(self) -> Row:
        video, _ = self._sampled()
        return self._row("no reuse", self.steps) | {"work": 1.0} | self._compared(video)

    def fewer_steps(self, count: int) -> Row:
        video = sample(self.model, self.unet, self.shown, steps=count, seed=self.seed)
        return self._row("fewer steps", count) | {"work": count / self.steps} | self._compared(video)

    def under(self, entry: Entry) -> Row:
        """One policy. What was run already is not run again; what these models refuse is a row that says so."""
        row = self._row(entry.name, len(entry.full))
        try:
            if entry.key not in self._known:
                video, saved = self._sampled(reuse=entry.policy)
                work = None if saved is None else 1 - saved * (1 - len(entry.full) / self.steps)
                self._known[entry.key] = {"work": work} | self._compared(video)
        except fmecompile.OptionError as error:
            return row | {"refused": str(error)}
        return row | self._known[entry.key] | {"full at": entry.full}

    def _row(self, policy: str, full_steps: int) -> Row:
        return {"model": self.model, "policy": policy, "full steps": full_steps}

    def _compared(self, video: torch.Tensor) -> Row:
        """Each metric as the mean over the clips, and PSNR over those of each source."""
        values = {name: metric(video, self.reference) for name, metric in METRICS.items()}
        found: Row = {name: float(value.mean()) for name, value in values.items()}
        parts = zip(SOURCES, values["PSNR dB"].tensor_split([self.digits]), strict=True)
        return found | {f"PSNR dB, {source}": float(part.mean()) for source, part in parts if len(part)}

    def _sampled(self, **options: Any) -> tuple[torch.Tensor, float | None]:
        """The clips of the compiled UNet, and the share of work that a step saves which reuses one value."""
        fmecompile.optimize(self.unet, strict=True, **options)
        try:
            video = sample(self.model, self.unet, self.shown, steps=self.steps, seed=self.seed)
            reuse: Any = fmecompile.explain(self.unet).records[0].reuse
            return video, reuse.values[0].saved if reuse is not None and len(reuse.values) == 1 else None
        finally:
            fmecompile.restore(self.unet)


def compared(evaluation: Evaluation, counts: Iterable[int], similarities: Matrix | None) -> Iterator[Row]:
    """All rows of one model."""
    yield evaluation.without_reuse()
    for count in counts:
        yield evaluation.fewer_steps(count)
    for entry in (*entries(evaluation.steps, counts, similarities), *others(evaluation.steps)):
        yield evaluation.under(entry)


def evaluated(model: str, unet: nn.Module, options: argparse.Namespace) -> list[Row]:
    """The rows of a trained model, printed as they come."""
    real = round(options.count * options.real_share)
    seed = seeded(options.seed)
    shown = clips(options.count, seed, real_share=options.real_share, split="held out")
    known = clips(CALIBRATION_CLIPS, seeded(CALIBRATION_SEED), real_share=options.real_share)
    module = module_of_the_cut(model, unet, known)
    found = similarity(model, unet, module, known, steps=options.steps, seed=CALIBRATION_SEED)
    evaluation = Evaluation(model, unet, shown, steps=options.steps, seed=options.seed, digits=options.count - real)
    rows = []
    for row in compared(evaluation, options.full, found):
        rows.append(row)
        print({name: value for name, value in row.items() if name != "full at"}, flush=True)
    return rows


def finite(row: Row) -> Row:
    """JSON knows no infinity: None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=UNETS, action="append", help="by default both")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the folder to read")
    parser.add_argument("--count", type=int, default=8, help="clips")
    parser.add_argument("--real-share", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--full", type=int, nargs="+", default=COUNTS, help="numbers of full steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the table and the plot")
    options = parser.parse_args()
    rows: list[Row] = []
    trained: dict[str, dict[str, str]] = {}
    for model in options.model or UNETS:
        path = options.weights / f"{model}.safetensors"
        rows += evaluated(model, load(model, path), options)
        trained[model] = about(path)
    print(save("quality", COMMAND, [finite(row) for row in rows]))
    for path in write_page(rows, trained, options.docs, command=COMMAND, clips=options.count, steps=options.steps):
        print(path)


if __name__ == "__main__":
    main()
