"""``python -m benchmarks.quality.train --model svd --minutes 18``: train one of the two UNets.

AdamW with a warm-up and a cosine, and an average of the weights, which is what is kept: float16, with steps, seed,
loss, date and command, in ``benchmarks/quality/weights``. ``--steps`` trains for so many steps; without it the first
steps are timed, and as many are taken as fit into ``--minutes``. A checkpoint is written every two minutes and at the
end of a shorter visit (``--pause-after``); the same command goes on from it, and as every step seeds its own clips,
noise levels and noise, it ends with the same weights as a run without a break.

A step of 8 clips takes 0.7 s of one core's time for ``svd`` and 0.6 s for ``animatediff`` (x86, AVX-512, float32). At
an assumed gain of 1.6 from a second core, 18 minutes are 2400 and 2800 steps, and both models 36 minutes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.data import Clips, clips, seeded
from benchmarks.quality.models import (
    UNETS,
    WEIGHTS,
    ddim,
    embed_words,
    save,
    svd_condition,
    to_latents,
)

WARM_UP, AVERAGE, CLIPPED = 100, 0.999, 1.0
DROPPED = 0.15
"""Share of clips whose condition is left out, for guidance."""
TIMED, CHECKPOINT_S = 20, 120.0


@dataclass(frozen=True)
class Recipe:
    """All that the weights depend on. ``real_share`` of each batch are real clips."""

    model: str
    steps: int
    seed: int = 0
    batch: int = 8
    rate: float = 6e-4
    real_share: float = 0.25

    def command(self) -> str:
        return (
            f"python -m benchmarks.quality.train --model {self.model} --steps {self.steps} --seed {self.seed}"
            f" --batch {self.batch} --rate {self.rate} --real-share {self.real_share}"
        )


# --------------------------------------------------------------------------------------------------------------- losses


def loss(model: str, unet: nn.Module, shown: Clips, seed: torch.Generator) -> torch.Tensor:
    """Mean squared error of v over a batch, at noise levels drawn from ``seed``."""
    return LOSSES[model](unet, shown, seed)


def _dropped(count: int, seed: torch.Generator) -> torch.Tensor:
    """1 where the condition stays, else 0; (B, 1, 1)."""
    return (torch.rand(count, 1, 1, generator=seed) >= DROPPED).float()


def _svd_loss(unet: nn.Module, shown: Clips, seed: torch.Generator) -> torch.Tensor:
    """SVD's: EDM's preconditioning with unit data, where the weighted loss is that of v. Log sigma is drawn from
    N(0, 1.6); SVD's N(0.7, 1.6) is for more pixels. One in ten is uniform up to the sampler's greatest."""
    clean = to_latents(shown.video)
    count = len(clean)
    usual = 1.6 * torch.randn(count, generator=seed)
    wide = torch.rand(count, generator=seed) * 12.7 - 6.2
    log_sigma = torch.where(torch.rand(count, generator=seed) < 0.1, wide, usual).clamp(-6.2, 6.55)
    sigma = log_sigma.exp()[:, None, None, None, None]
    noise = torch.randn(clean.shape, generator=seed)
    size = (sigma**2 + 1).sqrt()
    noisy, target = (clean + sigma * noise) / size, (noise - sigma * clean) / size
    image, embedding, ids = svd_condition(shown, seed)
    keep = _dropped(count, seed)
    inputs = torch.cat([noisy, image * _dropped(count, seed)[..., None, None]], 2)
    predicted = unet(inputs, 0.25 * log_sigma, embedding * keep, ids, return_dict=False)[0]
    return (predicted - target).square().mean()


def _animatediff_loss(unet: nn.Module, shown: Clips, seed: torch.Generator) -> torch.Tensor:
    clean = to_latents(shown.video).transpose(1, 2)
    sampler: Any = ddim()
    at = torch.randint(sampler.config.num_train_timesteps, (len(clean),), generator=seed)
    noise = torch.randn(clean.shape, generator=seed)
    text = embed_words(shown.words) * _dropped(len(clean), seed)
    noisy, target = sampler.add_noise(clean, noise, at), sampler.get_velocity(clean, noise, at)
    predicted = unet(noisy, at, text.repeat_interleave(clean.shape[2], 0), return_dict=False)[0]
    return (predicted - target).square().mean()


LOSSES = {"svd": _svd_loss, "animatediff": _animatediff_loss}


# ------------------------------------------------------------------------------------------------------------- training


class Trainer:
    """A run of a recipe, at some step. Everything it draws is seeded by the recipe's seed and the step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.step, self.recent = recipe, 0, 0.0
        torch.manual_seed(recipe.seed)
        self.unet = UNETS[recipe.model]().train()
        self.average = {name: value.clone() for name, value in self.unet.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), recipe.rate, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(self) -> float:
        """The learning rate of this step: a warm-up, then half a cosine to 0."""
        progress = torch.tensor(torch.pi * min(self.step / self.recipe.steps, 1.0))
        return self.recipe.rate * min((self.step + 1) / WARM_UP, 1.0) * float(1 + progress.cos()) / 2

    def advance(self) -> float:
        """One step; its loss."""
        recipe, seed = self.recipe, seeded(self.recipe.seed, self.step)
        shown = clips(recipe.batch, seed, real_share=recipe.real_share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        found = loss(recipe.model, self.unet, shown, seed)
        self.optimizer.zero_grad(set_to_none=True)
        found.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), CLIPPED)
        self.optimizer.step()
        self.step += 1
        self._renew_average()
        value = float(found.detach())
        self.recent += (value - self.recent) / min(self.step, 200)
        return value

    @torch.no_grad()
    def _renew_average(self) -> None:
        share = 1 - min(AVERAGE, (1 + self.step) / (10 + self.step))
        for name, value in self.unet.state_dict().items():
            self.average[name].lerp_(value, share)

    def checkpoint(self, path: Path) -> None:
        """Written beside ``path`` and moved there, so that an interruption leaves the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        state = {"recipe": asdict(self.recipe), "step": self.step, "recent": self.recent, "average": self.average}
        torch.save(state | {"unet": self.unet.state_dict(), "optimizer": self.optimizer.state_dict()}, fresh)
        fresh.replace(path)

    @classmethod
    def resumed(cls, path: Path) -> Trainer:
        state = torch.load(path)
        trainer = cls(Recipe(**state["recipe"]))
        trainer.step, trainer.recent, trainer.average = state["step"], state["recent"], state["average"]
        trainer.unet.load_state_dict(state["unet"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        return trainer

    def save(self, path: Path) -> None:
        recipe = self.recipe
        facts = {"date": datetime.now(UTC).date(), "torch": torch.__version__, "command": recipe.command()}
        save(path, self.average, asdict(recipe) | {"trained_steps": self.step, "loss": f"{self.recent:.4f}"} | facts)


def steps_within(recipe: Recipe, minutes: float) -> int:
    """How many steps of this recipe fit: a few are timed, on a model that is thrown away."""
    trial = Trainer(replace(recipe, steps=TIMED))
    trial.advance()
    start = time.perf_counter()
    for _ in range(TIMED):
        trial.advance()
    return max(int(60 * minutes * TIMED / (time.perf_counter() - start)), 1)


def run(trainer: Trainer, checkpoint: Path, pause_after_s: float | None = None) -> bool:
    """Train to the end of the recipe, or for so many seconds. Whether the end was reached."""
    start = saved = time.perf_counter()
    first = trainer.step
    while trainer.step < trainer.recipe.steps:
        trainer.advance()
        now = time.perf_counter()
        if trainer.step % 50 == 0:
            pace = (now - start) / (trainer.step - first)
            left_s = pace * (trainer.recipe.steps - trainer.step)
            print(
                f"step {trainer.step}: loss {trainer.recent:.4f}, {pace:.3f} s a step, {left_s:.0f} s left", flush=True
            )
        has_to_stop = pause_after_s is not None and now - start > pause_after_s
        if has_to_stop or now - saved > CHECKPOINT_S:
            trainer.checkpoint(checkpoint)
            saved = now
        if has_to_stop:
            break
    return trainer.step >= trainer.recipe.steps


def started(options: argparse.Namespace, checkpoint: Path) -> Trainer:
    """The run that the checkpoint is of, or a new one. SystemExit where it is of another recipe."""
    asked = Recipe(options.model, options.steps or 1, options.seed, options.batch, options.rate, options.real_share)
    if checkpoint.exists() and not options.fresh:
        trainer = Trainer.resumed(checkpoint)
        if trainer.recipe != (asked if options.steps else replace(asked, steps=trainer.recipe.steps)):
            raise SystemExit(f"{checkpoint} is of another recipe, {trainer.recipe}; next: --fresh begins anew")
        print(f"goes on from step {trainer.step} of {trainer.recipe.steps}; --fresh begins anew")
        return trainer
    if options.steps is None:
        asked = replace(asked, steps=steps_within(asked, options.minutes))
    print(asked)
    return Trainer(asked)


def main() -> None:
    defaults = Recipe("svd", 0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=UNETS, required=True)
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--real-share", type=float, default=defaults.real_share)
    parser.add_argument("--pause-after", type=float, metavar="MINUTES", help="stop then; the same command goes on")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoint")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the folder to write to")
    options = parser.parse_args()
    checkpoint = options.weights / f"{options.model}.checkpoint"
    trainer = started(options, checkpoint)
    pause_s = None if options.pause_after is None else 60 * options.pause_after
    if not run(trainer, checkpoint, pause_s):
        print(f"paused at step {trainer.step} of {trainer.recipe.steps}: {checkpoint}")
        return
    path = options.weights / f"{options.model}.safetensors"
    trainer.save(path)
    trainer.checkpoint(checkpoint)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, loss {trainer.recent:.4f}")


if __name__ == "__main__":
    main()
