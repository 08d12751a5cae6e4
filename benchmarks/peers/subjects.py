"""What the peers are tried on: models, their inputs, and one object that a peer may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.cases import VAE, animatediff, animatediff_inputs, svd, svd_inputs
from benchmarks.latency import ANIMATEDIFF, SVD

SEED = 0


@dataclass(frozen=True)
class Case:
    """A model at a size, under a name. ``family`` is one of ``FAMILIES``; sizes are in pixels; ``config`` is what
    differs from the released model, ``context`` the width of its text or image embeddings."""

    name: str
    family: str
    batch: int
    frames: int
    height: int
    width: int
    config: dict[str, Any] = field(default_factory=dict)
    context: int | None = None

    def subject(self, dtype: torch.dtype) -> Subject:
        """The model and its inputs: the same numbers at every call. ``dtype`` is the default one where it is built."""
        torch.manual_seed(SEED)
        build, inputs = FAMILIES[self.family]
        module = build(**self.config).eval().requires_grad_(False)
        options = {} if self.context is None else {"context": self.context}
        given = inputs(self.batch, self.frames, self.height // 8, self.width // 8, dtype, **options)
        return Subject(module, given, self.is_denoiser)

    @property
    def is_denoiser(self) -> bool:
        return not self.family.endswith("VAE")


class Subject:
    """One model as a peer meets it: the module, a function that calls it, and where a generation is.

    A peer changes ``module`` in place, or puts another ``function`` in its place. ``around`` opens a context for each
    step, and ``reset`` is called before each generation.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], is_denoiser: bool = True, steps: int = 25) -> None:
        self.module, self.inputs = module, inputs
        self.function: Callable[..., Any] = module if is_denoiser else module.decode  # pyright: ignore[reportAttributeAccessIssue]
        self.timesteps: Any = torch.linspace(1.6, 0.2, steps)
        self.step = 0
        self.reset: Callable[[], object] = lambda: None
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.compiles = False
        """Whether the first call does what later ones do not."""

    def shorten(self, steps: int, *, as_numbers: bool = False) -> None:
        """Make generations of ``steps`` steps. ``as_numbers``: of timesteps that can be read on fake tensors too."""
        values = [1.6 - 1.4 * step / (steps - 1) for step in range(steps)]
        self.timesteps = [torch.tensor(value) for value in values] if as_numbers else torch.tensor(values)

    @property
    def progress(self) -> float:
        """From 1000 at the first step down to 0, whatever the sampler's timesteps mean."""
        return 1000 * (1 - self.step / len(self.timesteps))

    @property
    def pipeline(self) -> Any:
        """As much of a diffusion pipeline as a peer reads. Timesteps that can be read are there as numbers."""
        known = [t.item() for t in self.timesteps] if isinstance(self.timesteps, list) else self.timesteps
        return SimpleNamespace(unet=self.module, scheduler=SimpleNamespace(timesteps=known))

    def call(self) -> torch.Tensor:
        """One call with the case's inputs."""
        with torch.no_grad(), self.around():
            return self.function(*self.inputs, return_dict=False)[0]

    def generation(self, after_step: Callable[[], object] = lambda: None) -> None:
        """A call at every timestep, on the same latents. ``after_step`` is called when a step's output is gone."""
        self.begin()
        sample, _, *rest = self.inputs
        for timestep in self.timesteps:
            self(sample, timestep, *rest, return_dict=False)
            after_step()

    def begin(self) -> None:
        self.step = 0
        self.reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A step of a generation: what a sampler's loop calls."""
        with torch.no_grad(), self.around():
            output = self.function(*args, **kwargs)
        self.step += 1
        return output


def _video_vae(**config: Any) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(**(VAE | config))


def _image_vae(**config: Any) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(**(VAE | {"up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 512} | config))


def _video_latents(batch: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Any:
    """Latents (B T, 4, h, w), and T."""
    return torch.randn(batch * frames, 4, height, width, dtype=dtype), frames


def _image_latents(batch: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Any:
    return (torch.randn(batch * frames, 4, height, width, dtype=dtype),)


FAMILIES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "SVD": (svd, svd_inputs),
    "AnimateDiff": (animatediff, animatediff_inputs),
    "SVD VAE": (_video_vae, _video_latents),
    "AnimateDiff VAE": (_image_vae, _image_latents),
}

REAL = (
    Case("SVD, 14 frames, 576x1024", "SVD", 2, 14, 576, 1024),
    Case("SVD-XT, 25 frames, 576x1024", "SVD", 2, 25, 576, 1024),
    Case("AnimateDiff, 16 frames, 512x512", "AnimateDiff", 2, 16, 512, 512),
    Case("SVD decodes 14 frames, 576x1024", "SVD VAE", 1, 14, 576, 1024),
    Case("SVD-XT decodes 25 frames, 576x1024", "SVD VAE", 1, 25, 576, 1024),
    Case("AnimateDiff decodes 16 frames, 512x512", "AnimateDiff VAE", 1, 16, 512, 512),
)
REDUCED = (
    Case("SVD, 4 frames, 128x160, 2 levels", "SVD", 2, 4, 128, 160, SVD),
    Case("AnimateDiff, 4 frames, 128x128, 2 levels", "AnimateDiff", 2, 4, 128, 128, ANIMATEDIFF),
    Case("SVD decodes 4 frames, 96x128", "SVD VAE", 1, 4, 96, 128),
    Case("AnimateDiff decodes 4 frames, 96x128", "AnimateDiff VAE", 1, 4, 96, 128),
)
GENERATIONS = (
    Case("SVD, 4 frames, 64x80, 2 levels", "SVD", 2, 4, 64, 80, SVD),
    Case("AnimateDiff, 4 frames, 64x64, 2 levels", "AnimateDiff", 2, 4, 64, 64, ANIMATEDIFF),
)
_TINY_SVD = {
    "block_out_channels": (32,),
    "num_attention_heads": (2,),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
    "up_block_types": ("CrossAttnUpBlockSpatioTemporal",),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
}
_TINY_ANIMATEDIFF = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlockMotion",),
    "up_block_types": ("CrossAttnUpBlockMotion",),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "norm_num_groups": 8,
}
_TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
TINY = (
    Case("SVD, tiny", "SVD", 2, 4, 128, 128, _TINY_SVD, 32),
    Case("AnimateDiff, tiny", "AnimateDiff", 2, 4, 128, 128, _TINY_ANIMATEDIFF, 32),
    Case("SVD decodes, tiny", "SVD VAE", 1, 4, 64, 64, _TINY_VAE),
    Case("AnimateDiff decodes, tiny", "AnimateDiff VAE", 1, 4, 64, 64, _TINY_VAE),
)


def denoisers(cases: tuple[Case, ...]) -> Iterator[Case]:
    return (case for case in cases if case.is_denoiser)
