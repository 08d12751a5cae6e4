"""The real models and the inputs they are measured with, on fake tensors or on real ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One model at one size. ``must_gib`` and ``aim_gib`` bound the measured peak of the optimized module."""

    name: str
    family: str
    batch: int
    frames: int
    height: int
    width: int
    must_gib: float
    aim_gib: float

    def build(self) -> nn.Module:
        return MODELS[self.family]()

    def inputs(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return INPUTS[self.family](self.batch, self.frames, self.height // 8, self.width // 8, dtype)


def svd(**config: Any) -> nn.Module:
    """Stable Video Diffusion's UNet; its real configuration is the default one."""
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(**config).eval()


def animatediff(**config: Any) -> nn.Module:
    """AnimateDiff's UNet at Stable Diffusion 1.5's size, without a motion module in the middle."""
    from diffusers import UNetMotionModel

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


MODELS: dict[str, Callable[..., nn.Module]] = {"svd": svd, "animatediff": animatediff}
INPUTS: dict[str, Callable[..., Any]] = {"svd": svd_inputs, "animatediff": animatediff_inputs}

CASES = (
    Case("SVD, 14 frames, 576x1024", "svd", 2, 14, 576, 1024, 1.00, 0.84),
    Case("SVD-XT, 25 frames, 576x1024", "svd", 2, 25, 576, 1024, 1.75, 1.50),
    Case("AnimateDiff, 16 frames, 512x512", "animatediff", 2, 16, 512, 512, 0.50, 0.42),
    Case("AnimateDiff, 16 frames, 576x1024", "animatediff", 2, 16, 576, 1024, 1.15, 0.95),
    Case("SVD, 13 frames, 448x832, batch 1", "svd", 1, 13, 448, 832, 1.2185 / 4, 1.2185 / 5),
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
