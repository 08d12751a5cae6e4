"""Two small UNets of diffusers' own classes, what they are conditioned on, and their weights as files.

There is no VAE: a latent is a frame with every 4x4 block of pixels as 16 channels, shifted and scaled to zero mean and
unit variance. So frames of 32x32 are latents of 16x8x8, convolutions see few places and many channels, and that is
what two CPU cores train fastest. Image and text encoders are fixed and seeded, and need no weights: random
projections of a frame, and of words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from benchmarks.quality.data import DIRECTIONS, FRAMES, WORDS, Clips, seeded

WEIGHTS = Path(__file__).parent / "weights"
TRAIN = "python -m benchmarks.quality.train --model"

PATCH, CHANNELS, CONTEXT = 4, 16, 64
MEAN, STD = -0.57, 0.60
"""Of pixels from -1 to 1, over the clips of training."""
FPS, NOISE_AUGMENTATION = 7, 0.02
"""What SVD's diffusion pipeline gives by default, and how it is told: frames a second less one, noise on the image."""


def svd_unet() -> nn.Module:
    """SVD's UNet, two levels of 64 and 96 channels, attention in the outer level and in the middle: 3.7 M weights."""
    return UNetSpatioTemporalConditionModel(
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 96),
        num_attention_heads=(2, 3),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=FRAMES,
    )


def animatediff_unet() -> nn.Module:
    """AnimateDiff's UNet, two levels of 64 and 96 channels, attention in the outer level and in the middle, motion
    modules in both levels: 3.1 M weights."""
    return UNetMotionModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )


UNETS: dict[str, Callable[[], nn.Module]] = {"svd": svd_unet, "animatediff": animatediff_unet}


def euler() -> EulerDiscreteScheduler:
    """The sampler of SVD, with the options that its release has."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


def ddim() -> DDIMScheduler:
    """The sampler of AnimateDiff's documentation, but with v as what is predicted: a model that was trained for minutes
    is far off at the noisy end, where x is epsilon's error times 25."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="linspace",
        prediction_type="v_prediction",
    )


# --------------------------------------------------------------------------------------------- latents and conditions


def to_latents(video: torch.Tensor) -> torch.Tensor:
    """Pixels (..., H, W) from -1 to 1 --> latents (..., 16, H / 4, W / 4) of about unit variance."""
    return (F.pixel_unshuffle(video[..., None, :, :], PATCH) - MEAN) / STD


def to_video(latents: torch.Tensor) -> torch.Tensor:
    """The inverse; pixels may be beyond -1 and 1."""
    return F.pixel_shuffle(latents * STD + MEAN, PATCH)[..., 0, :, :]


@cache
def _projection(rows: int, seed: int) -> torch.Tensor:
    """(rows, CONTEXT), fixed, of unit variance."""
    return torch.randn(rows, CONTEXT, generator=seeded(seed))


def embed_image(frames: torch.Tensor) -> torch.Tensor:
    """Frames (B, H, W) --> what stands for CLIP's embedding of an image (B, 1, CONTEXT): a fixed random projection of
    the frame at 8x8."""
    small = F.adaptive_avg_pool2d(frames[:, None], 8).flatten(1)
    return (small @ _projection(64, 8) / 8)[:, None]


def embed_words(words: torch.Tensor) -> torch.Tensor:
    """Words (B, S) --> what stands for embeddings of a text (B, S, CONTEXT), fixed: a digit's vector plus that of its
    direction. An empty text is zeros, which no word is."""
    at = torch.arange(WORDS)
    is_digit = (at > 0) & (at <= 10 * DIRECTIONS)
    digit, direction = (at - 1) // DIRECTIONS, (at - 1) % DIRECTIONS
    both = _projection(10, 10)[digit.clamp(0, 9)] + _projection(DIRECTIONS, 11)[direction]
    table = torch.where(is_digit[:, None], both / 2**0.5, _projection(WORDS, 12))
    return table[words]


def time_ids(motion: torch.Tensor, augmentation: torch.Tensor) -> torch.Tensor:
    """Motion (B,) and noise on the image (B,) --> SVD's added time ids (B, 3)."""
    return torch.stack([torch.full_like(motion, FPS - 1), motion, augmentation], 1)


def svd_condition(
    shown: Clips, seed: torch.Generator, augmentation: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first frame with noise on it as latents (B, T, C, h, w), its embedding (B, 1, CONTEXT), time ids (B, 3).

    The noise is ``augmentation``, in standard deviations of a pixel; else SVD's: its logarithm is of N(-3, 0.5).
    """
    first, count = shown.video[:, 0], len(shown.video)
    drawn = (0.5 * torch.randn(count, generator=seed) - 3).exp()
    amount = drawn if augmentation is None else torch.full((count,), augmentation)
    image = to_latents(first + amount[:, None, None] * torch.randn(first.shape, generator=seed))
    frames = shown.video.shape[1]
    return image[:, None].repeat(1, frames, 1, 1, 1), embed_image(first), time_ids(shown.motion, amount)


# -------------------------------------------------------------------------------------------------------------- weights


def save(path: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Weights in float16, with what is to be known about them as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    save_file(halves, path, metadata={name: str(value) for name, value in about.items()})


def load(name: str, path: Path | None = None) -> nn.Module:
    """A trained UNet, ready to run in float32. Raises FileNotFoundError with the command that trains it."""
    path = path or WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there yet; next: {TRAIN} {name}")
    unet = UNETS[name]()
    unet.load_state_dict(load_file(path))
    return unet.eval().requires_grad_(False)


def about(path: Path) -> dict[str, str]:
    """What :func:`save` was told."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
