"""Small models of the real classes, with weights that make every branch matter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from benchmarks.cases import animatediff, animatediff_inputs, svd, svd_inputs

CONTEXT = 32


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, zero-initialised layers and mixing factors included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = 0.1 if parameter.ndim > 1 else 0.3
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module.eval().requires_grad_(False)


def small_svd(layers: int = 1) -> nn.Module:
    return seeded(
        svd(
            block_out_channels=(32, 64),
            num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=CONTEXT,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=layers,
        )
    )


def small_animatediff() -> nn.Module:
    return seeded(
        animatediff(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=CONTEXT,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            norm_num_groups=8,
            layers_per_block=1,
        )
    )


def svd_call(batch: int, frames: int, height: int, width: int, dtype: torch.dtype, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return svd_inputs(batch, frames, height, width, dtype, CONTEXT)


def animatediff_call(batch: int, frames: int, height: int, width: int, dtype: torch.dtype, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return animatediff_inputs(batch, frames, height, width, dtype, CONTEXT)


def as_dtype(values: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``dtype``, everything else as it is."""

    def convert(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(convert, values)


def twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in ``dtype``."""
    return copy.deepcopy(module).to(dtype)
