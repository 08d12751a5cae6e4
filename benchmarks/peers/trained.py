"""What step reuse of each kind does to clips of the trained models: against eager in float64, by the same seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import fmecompile
from benchmarks.peers.measuring import Row
from benchmarks.peers.methods import INTERVAL, Method
from benchmarks.peers.subjects import Case, Subject
from benchmarks.quality.data import Clips, clips, seeded
from benchmarks.quality.metrics import psnr, ssim
from benchmarks.quality.models import ddim, euler, load
from benchmarks.quality.sample import STEPS, sample

MODELS = {"SVD": "svd", "AnimateDiff": "animatediff"}
SAMPLERS = {"SVD": euler, "AnimateDiff": ddim}
TRAINED = tuple(Case(f"{family}, trained, {STEPS} steps", family, 2, 8, 32, 32) for family in MODELS)
CLIPS, CALIBRATION_SEED = 2, 1000


def quality(case: Case, method: Method, scratch: Path | None = None, steps: int = STEPS) -> Row:
    """PSNR and SSIM of clips with reuse, beside those of eager in float64."""
    model = MODELS[case.family]
    shown = clips(CLIPS, seeded(0), split="held out")
    subject = Subject(load(model), ())
    sampler: Any = SAMPLERS[case.family]()
    sampler.set_timesteps(steps)
    subject.timesteps = sampler.timesteps
    want = _reference(model, shown, scratch, steps)
    method.enter(subject)
    subject.begin()
    video = sample(model, subject, shown, steps=steps)  # pyright: ignore[reportArgumentType]
    found = float(psnr(video, want).mean())
    return {"PSNR dB": found if math.isfinite(found) else None, "SSIM": float(ssim(video, want).mean())}


def _reference(model: str, shown: Clips, scratch: Path | None, steps: int) -> torch.Tensor:
    path = None if scratch is None else scratch / f"clips-{model}.pt"
    if path is not None and path.exists():
        return torch.load(path)
    unet = load(model).double()

    def precise(*args: Any, **kwargs: Any) -> Any:
        """The sampler stays in float32, as it is for everyone; the model's part is exact."""
        given = (a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return tuple(out.float() for out in unet(*given, **kwargs))

    video = sample(model, precise, shown, steps=steps)  # pyright: ignore[reportArgumentType]
    if path is not None:
        torch.save(video, path)
    return video


def _calibrated(family: str) -> Method:
    """Step Rehash whose steps are found on clips of training, with a forecast of order 1."""

    def apply(subject: Subject) -> None:
        known = clips(CLIPS, seeded(CALIBRATION_SEED))
        steps = len(subject.timesteps)

        def generation() -> None:
            sample(MODELS[family], subject.module, known, steps=steps, seed=CALIBRATION_SEED)

        found = fmecompile.calibrate(subject.module, generation)
        policy = fmecompile.StepRehash.from_calibration(found, full_steps=-(-steps // INTERVAL), mode="forecast")
        fmecompile.optimize(subject.module, reuse=policy, strict=True)

    return Method("fmecompile, StepRehash calibrated, forecast", apply, (family,), exact=False, reuses=True)


CALIBRATED = tuple(map(_calibrated, MODELS))
