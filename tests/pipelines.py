"""Whole diffusion pipelines of the real classes, from tiny components with random weights; nothing is downloaded."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import fmecompile
from tests.models import seeded

WIDTH = 32
"""Features of texts and images."""

PIXELS = 16
"""Height and width of frames; of latents, half as much."""

VISION_PIXELS = 224
"""Height and width of what the image encoder sees; the pipelines fix it."""

CHANNELS = (8, 16)
"""Of the VAE, which therefore shrinks frames by two."""

VIDEO_PROMPT = {"prompt": "a b", "negative_prompt": "b", "num_inference_steps": 2, "height": PIXELS, "width": PIXELS}


# ------------------------------------------------------------------------------------------------------ components


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A vocabulary of single letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "abcd" for end in ("", "</w>"))]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: k for k, word in enumerate(words)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=8)


def text_encoder(kind: type = CLIPTextModel) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return seeded(kind(config), 1)


def image_encoder() -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=VISION_PIXELS,
        patch_size=VISION_PIXELS // 2,
    )
    return seeded(CLIPVisionModelWithProjection(config), 2)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": VISION_PIXELS}, crop_size=VISION_PIXELS)


def vae() -> nn.Module:
    model = diffusers.AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
    )
    return seeded(model, 3)


def video_vae() -> nn.Module:
    model = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),  # its norms have 32 groups
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=PIXELS,
    )
    return seeded(model, 4)


def motion_adapter() -> nn.Module:
    """Unused by a UNet that has motion modules already; FreeNoise asks it for the longest clip."""
    return diffusers.MotionAdapter(
        block_out_channels=(32,),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).eval()


def controlnet(seed: int = 5) -> nn.Module:
    model = diffusers.ControlNetModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        conditioning_embedding_out_channels=(8, 16),
        norm_num_groups=8,
    )
    return seeded(model, seed)


def sparse_controlnet() -> nn.Module:
    model = diffusers.SparseControlNetModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockMotion",),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        conditioning_embedding_out_channels=(8, 16),
        norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    return seeded(model, 6)


def image(seed: int = 0) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


def images(count: int, seed: int = 0) -> list[PIL.Image.Image]:
    return [image(seed + k) for k in range(count)]


# -------------------------------------------------------------------------------------------------------- pipelines


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_level_svd() -> nn.Module:
    """The least UNet that has every kind of layer."""
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32,),
        num_attention_heads=(2,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        cross_attention_dim=WIDTH,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=1,
    )
    return seeded(unet)


def one_level_animatediff() -> nn.Module:
    """The least UNet that has every kind of layer."""
    unet = diffusers.UNetMotionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
        layers_per_block=1,
        use_motion_mid_block=False,
    )
    return seeded(unet)


def svd(unet: Callable[[], nn.Module] = one_level_svd) -> Any:
    return _quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=video_vae(),
            image_encoder=image_encoder(),
            unet=unet(),
            scheduler=diffusers.EulerDiscreteScheduler(
                prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
            ),
            feature_extractor=image_processor(),
        )
    )


def video_parts(unet: Callable[[], nn.Module] = one_level_animatediff) -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "motion_adapter": motion_adapter(),
        "scheduler": diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        "feature_extractor": image_processor(),
        "image_encoder": image_encoder(),
    }


def animatediff(unet: Callable[[], nn.Module] = one_level_animatediff) -> Any:
    return _quiet(diffusers.AnimateDiffPipeline(**video_parts(unet)))


def video_to_video() -> Any:
    return _quiet(diffusers.AnimateDiffVideoToVideoPipeline(**video_parts()))


def with_controlnet(count: int = 1) -> Any:
    nets: Any = [controlnet(5 + k) for k in range(count)]
    return _quiet(diffusers.AnimateDiffControlNetPipeline(**video_parts(), controlnet=nets[0] if count == 1 else nets))


def with_sparse_controlnet() -> Any:
    return _quiet(diffusers.AnimateDiffSparseControlNetPipeline(**video_parts(), controlnet=sparse_controlnet()))


def sdxl() -> Any:
    unet = diffusers.UNetMotionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        cross_attention_dim=2 * WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
        layers_per_block=1,
        use_motion_mid_block=False,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    parts = video_parts() | {"unet": seeded(unet)}
    second = {"text_encoder_2": text_encoder(CLIPTextModelWithProjection), "tokenizer_2": tokenizer()}
    return _quiet(diffusers.AnimateDiffSDXLPipeline(**parts, **second))


# ------------------------------------------------------------------------------------------------------------ calls


def frames(pipe: Any, *, seed: int = 0, **changed: Any) -> torch.Tensor:
    """(videos, frames, channels, height, width) of one call of a pipeline, with the inputs its class needs."""
    torch.manual_seed(seed)  # the sparse ControlNet's pipeline draws without the generator
    call = CALLS[type(pipe)]() | {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"} | changed
    return pipe(**call).frames


CALLS = {
    diffusers.StableVideoDiffusionPipeline: lambda: {
        "image": image(),
        "num_frames": 4,
        "num_inference_steps": 2,
        "height": PIXELS,
        "width": PIXELS,
        "decode_chunk_size": 4,
    },
    diffusers.AnimateDiffPipeline: lambda: VIDEO_PROMPT | {"num_frames": 4},
    diffusers.AnimateDiffVideoToVideoPipeline: lambda: VIDEO_PROMPT | {"video": images(4), "strength": 1.0},
    diffusers.AnimateDiffControlNetPipeline: lambda: VIDEO_PROMPT | {"num_frames": 4, "conditioning_frames": images(4)},
    diffusers.AnimateDiffSparseControlNetPipeline: lambda: (
        VIDEO_PROMPT | {"num_frames": 4, "conditioning_frames": images(2), "controlnet_frame_indices": [0, 2]}
    ),
    diffusers.AnimateDiffSDXLPipeline: lambda: VIDEO_PROMPT | {"num_frames": 4},
}


# ------------------------------------------------------------------------------------------------------ comparisons


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest deviation over the largest value."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def state(pipe: Any) -> dict[str, dict[str, Any]]:
    """Every attribute of every module of a pipeline, tables of weights and hooks included; of the pipeline, which keeps
    values of the last call, the names.
    """
    found: dict[str, dict[str, Any]] = {"pipeline": dict.fromkeys(vars(pipe))}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules():
                found[f"{name}.{path}"] = _opened(vars(module))
    return found


def _opened(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with what its tables hold in their place."""
    tables = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
    flat = {f"{name}[{key!r}]": item for name, table in tables.items() for key, item in table.items()}
    return attributes | flat


def changes(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    """Attributes that are not the same object as before; bound methods, which are made anew, by equality."""
    found = [f"{path}: gone or new" for path in before.keys() ^ after.keys()]
    for path in before.keys() & after.keys():
        old, new = before[path], after[path]
        found += [f"{path}.{name}: gone or new" for name in old.keys() ^ new.keys()]
        found += [f"{path}.{name}" for name in old.keys() & new.keys() if not _same(old[name], new[name])]
    return found


def _same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, MethodType) and old == new)


# ------------------------------------------------------------------------------------------------------------- checks

TOLERANCE = 1e-4
"""Of the largest value, in float32."""


def plans(module: nn.Module) -> list[fmecompile.Plan]:
    return [record.plan for record in fmecompile.explain(module).records]


def calls_of(module: nn.Module, run: Callable[[], Any]) -> tuple[list[tuple[Any, Any]], Any]:
    """The arguments of every call of ``module`` while ``run()`` runs, and what that returned."""
    seen: list[tuple[Any, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        return seen, run()
    finally:
        hook.remove()


def assert_same(fast: Any, plain: Any, **call: Any) -> None:
    """An optimized pipeline gives the latents of its plain twin, and its denoiser holds no more than its plan says."""
    call = {"output_type": "latent"} | call
    seen, got = calls_of(fast.unet, lambda: frames(fast, **call))
    assert relative(got, frames(plain, **call)) < TOLERANCE
    args, kwargs = seen[-1]
    measured = fmecompile.measure(fast.unet, *args, **kwargs).peak_bytes
    plan = plans(fast.unet)[-1]
    assert measured <= plan.projected_peak_bytes <= plan.allowed_bytes


def twins(build: Callable[[], Any] = animatediff) -> tuple[Any, Any]:
    """An optimized pipeline, and an equal one that is not."""
    plain = build()
    return fmecompile.optimize(copy.deepcopy(plain), strict=True), plain
