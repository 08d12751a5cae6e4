"""``python -m benchmarks.quality.sample --model svd``: clips from a trained model, through diffusers' own samplers.

The loops are those of diffusers' pipelines for image-to-video and for text-to-video, without encoders and VAE: both
halves of guidance in one batch, and timesteps that are views of the sampler's list. What is drawn is drawn from a
seed, so the same call gives the same clips. The command writes a sheet: one clip a row, above each the clip that it was
conditioned on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.data import Clips, clips, seeded
from benchmarks.quality.models import (
    CHANNELS,
    NOISE_AUGMENTATION,
    PATCH,
    UNETS,
    ddim,
    embed_words,
    euler,
    load,
    svd_condition,
    to_video,
)

STEPS = 25
GUIDANCE_FIRST, GUIDANCE_LAST = 1.0, 2.0
"""Of SVD's first and last frame; its own default goes to 3."""
GUIDANCE = 2.5


@torch.no_grad()
def sample(model: str, unet: nn.Module, shown: Clips, *, steps: int = STEPS, seed: int = 0) -> torch.Tensor:
    """Clips (B, T, H, W) about from -1 to 1, conditioned as ``shown``: on its first frames and motion, or its words."""
    return SAMPLERS[model](unet, shown, steps, seeded(seed))


def _svd(unet: nn.Module, shown: Clips, steps: int, seed: torch.Generator) -> torch.Tensor:
    scheduler: Any = euler()
    scheduler.set_timesteps(steps)
    image, embedding, ids = (both(part) for part in svd_condition(shown, seed, NOISE_AUGMENTATION))
    given = torch.ones(len(image), 1, 1)
    given[: len(shown.video)] = 0
    image, embedding = image * given[..., None, None], embedding * given
    guidance = torch.linspace(GUIDANCE_FIRST, GUIDANCE_LAST, image.shape[1])[:, None, None, None]
    latents = torch.randn(image.chunk(2)[0].shape, generator=seed) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(both(latents), t)
        predicted = unet(torch.cat([scaled, image], 2), t, embedding, ids, return_dict=False)[0]
        latents = scheduler.step(guided(predicted, guidance), t, latents, return_dict=False)[0]
    return to_video(latents)


def _animatediff(unet: nn.Module, shown: Clips, steps: int, seed: torch.Generator) -> torch.Tensor:
    scheduler: Any = ddim()
    scheduler.set_timesteps(steps)
    count, frames, height, width = shown.video.shape
    text = embed_words(shown.words)
    text = torch.cat([torch.zeros_like(text), text]).repeat_interleave(frames, 0)
    latents = torch.randn(count, CHANNELS, frames, height // PATCH, width // PATCH, generator=seed)
    for t in scheduler.timesteps:
        predicted = unet(scheduler.scale_model_input(both(latents), t), t, text, return_dict=False)[0]
        latents = scheduler.step(guided(predicted, GUIDANCE), t, latents, return_dict=False)[0]
    return to_video(latents.transpose(1, 2))


SAMPLERS = {"svd": _svd, "animatediff": _animatediff}


def both(tensor: torch.Tensor) -> torch.Tensor:
    """For the unconditional half and the conditional one."""
    return torch.cat([tensor, tensor])


def guided(predicted: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Classifier-free guidance."""
    without, given = predicted.chunk(2)
    return without + scale * (given - without)


def sheet(*videos: torch.Tensor, path: Path) -> None:
    """A picture: the first clips of each of ``videos`` one above the other, then the second ones, and so on."""
    from PIL import Image

    rows = torch.stack(videos, 1).flatten(0, 1)
    pixels = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    image = Image.fromarray(((pixels + 1) * 127.5).clamp(0, 255).byte().numpy())
    image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=UNETS, required=True)
    parser.add_argument("--weights", type=Path, help="a file; by default the committed one")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--real-share", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    shown = clips(options.count, seeded(options.seed), real_share=options.real_share, split="held out")
    made = sample(options.model, load(options.model, options.weights), shown, steps=options.steps, seed=options.seed)
    sheet(shown.video, made, path=options.out)
    print(options.out)


if __name__ == "__main__":
    main()
