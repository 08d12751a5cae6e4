"""The real models and the inputs they are measured with, on fake tensors or on real ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import fmecompile

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One model at one size. ``must_gib`` and ``aim_gib`` bound the measured peak of the optimized module, or
    ``must_share`` and ``aim_share`` do, as shares of what eager holds. ``limit_gib`` is what activations may hold, None
    for the default plan; with ``spill`` values may wait in host memory.
    """

    name: str
    family: str
    batch: int
    frames: int
    height: int
    width: int
    must_gib: float | None = None
    aim_gib: float | None = None
    must_share: float | None = None
    aim_share: float | None = None
    limit_gib: float | None = None
    spill: bool = False

    def must_bytes(self, eager_bytes: int) -> float | None:
        """The most that the optimized module may hold; None where nothing is asked."""
        return _bound(self.must_gib, self.must_share, eager_bytes)

    def aim_bytes(self, eager_bytes: int) -> float | None:
        return _bound(self.aim_gib, self.aim_share, eager_bytes)

    def optimize(self, module: nn.Module, inputs: Any) -> nn.Module:
        """``module`` optimized within the limit: weights and inputs come on top of it."""
        if self.limit_gib is None:
            return fmecompile.optimize(module, strict=True)
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers(), *given))
        return fmecompile.optimize(
            module, memory_budget=held + int(self.limit_gib * GIB), spill=self.spill, strict=True
        )

    def build(self) -> nn.Module:
        return MODELS[self.family]()

    def inputs(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return INPUTS[self.family](self.batch, self.frames, self.height // 8, self.width // 8, dtype)


def _bound(gib: float | None, share: float | None, eager_bytes: int) -> float | None:
    if gib is not None:
        return gib * GIB
    return None if share is None else share * eager_bytes


def svd(**config: Any) -> nn.Module:
    """Stable Video Diffusion's UNet; its real configuration is the default one."""
    from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(**config).eval()


def animatediff(**config: Any) -> nn.Module:
    """AnimateDiff's UNet at Stable Diffusion 1.5's size, without a motion module in the middle."""
    from diffusers.models.unets.unet_motion_model import UNetMotionModel

    return UNetMotionModel(**{"cross_attention_dim": 768, "use_motion_mid_block": False} | config).eval()


def svd_inputs(batch: int, frames: int, height: int, width: int, dtype: torch.dtype, context: int = 1024) -> Any:
    """Latents (B, T, 8, h, w), a timestep, image embeddings (B, 1, C) and added time ids (B, 3)."""
    return (
        torch.randn(batch, frames, 8, height, width, dtype=dtype),
        torch.tensor(1.6377, dtype=dtype),
        torch.randn(batch, 1, context, dtype=dtype),
        torch.rand(batch, 3, dtype=dtype),
    )


def animatediff_inputs(batch: int, frames: int, height: int, width: int, dtype: torch.dtype, context: int = 768) -> Any:
    """Latents (B, 4, T, h, w), a timestep, and text embeddings a frame (B T, 77, C)."""
    return (
        torch.randn(batch, 4, frames, height, width, dtype=dtype),
        torch.tensor(500),
        torch.randn(batch, 77, context, dtype=dtype).repeat_interleave(frames, 0),
    )


def video_decoder(**config: Any) -> nn.Module:
    """The decoder of Stable Video Diffusion's VAE."""
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

    options: dict[str, Any] = VAE | config
    return AutoencoderKLTemporalDecoder(**options).eval().decoder


def image_decoder(**config: Any) -> nn.Module:
    """The decoder of Stable Diffusion's VAE, which AnimateDiff decodes its frames by."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    options: dict[str, Any] = VAE | {"up_block_types": ("UpDecoderBlock2D",) * 4} | config
    return AutoencoderKL(**options).eval().decoder


def video_decoder_inputs(batch: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Any:
    """Latents (B T, 4, h, w), which clips are single images (B, T), and T."""
    return torch.randn(batch * frames, 4, height, width, dtype=dtype), torch.zeros(batch, frames, dtype=dtype), frames


def image_decoder_inputs(batch: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Any:
    """Latents (B T, 4, h, w)."""
    return (torch.randn(batch * frames, 4, height, width, dtype=dtype),)


VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""What the VAEs of Stable Diffusion and Stable Video Diffusion have in common."""

MODELS: dict[str, Callable[..., nn.Module]] = {
    "svd": svd,
    "animatediff": animatediff,
    "video decoder": video_decoder,
    "image decoder": image_decoder,
}
INPUTS: dict[str, Callable[..., Any]] = {
    "svd": svd_inputs,
    "animatediff": animatediff_inputs,
    "video decoder": video_decoder_inputs,
    "image decoder": image_decoder_inputs,
}

CASES = (
    Case("SVD, 14 frames, 576x1024", "svd", 2, 14, 576, 1024, 1.00, 0.84),
    Case("SVD-XT, 25 frames, 576x1024", "svd", 2, 25, 576, 1024, 1.75, 1.50),
    Case("AnimateDiff, 16 frames, 512x512", "animatediff", 2, 16, 512, 512, 0.50, 0.42),
    Case("AnimateDiff, 16 frames, 576x1024", "animatediff", 2, 16, 576, 1024, 1.15, 0.95),
    Case("SVD, 13 frames, 448x832, batch 1", "svd", 1, 13, 448, 832, 1.2185 / 4, 1.2185 / 5),
    Case("SVD in 0.6 GiB, 14 frames, 576x1024", "svd", 2, 14, 576, 1024, 0.60, limit_gib=0.60, spill=True),
    Case("SVD in 0.45 GiB, 14 frames, 576x1024", "svd", 2, 14, 576, 1024, 0.45, limit_gib=0.45, spill=True),
    Case("SVD decodes 14 frames, 576x1024", "video decoder", 1, 14, 576, 1024, 4.0, 3.1),
    Case("SVD decodes 25 frames, 576x1024", "video decoder", 1, 25, 576, 1024, 6.5, 5.4),
    Case("SVD decodes 25 frames in 4 GiB", "video decoder", 1, 25, 576, 1024, 4.0, limit_gib=4.0, spill=True),
    Case("AnimateDiff decodes 16 frames, 512x512", "image decoder", 1, 16, 512, 512, 0.40, 0.20),
    Case("An image decodes in 1.45 GiB, 1080x1920", "image decoder", 1, 1, 1080, 1920, None, None, 0.5, 0.25, 1.45),
    Case("An image decodes in 0.8 GiB, 1080x1920", "image decoder", 1, 1, 1080, 1920, 0.8, limit_gib=0.8, spill=True),
    Case("An image decodes in 0.74 GiB, 1024x1024", "image decoder", 1, 1, 1024, 1024, must_share=0.5, limit_gib=0.74),
)


@contextmanager
def fake(dtype: torch.dtype) -> Any:
    """Build and call on fake tensors with ``dtype`` as the default: no memory, no data."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)
