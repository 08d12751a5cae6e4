"""Models known by name, as data: the configurations their authors publish, without weights.

What a configuration leaves out is the default of the diffusers class. Text and image encoders only lie on the device:
their ``parameters`` are counted here once, since transformers is no dependency.
"""

from __future__ import annotations

from typing import Any

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
}
_IMAGE_VAE = {"class": "AutoencoderKL", "config": _VAE | {"up_block_types": ["UpDecoderBlock2D"] * 4}}

# CLIP ViT-H/14 with a projection to 1024; CLIP ViT-L/14; OpenCLIP ViT-bigG/14 with a projection to 1280.
_VISION_H = {"class": "CLIPVisionModelWithProjection", "parameters": 632_076_800}
_TEXT_L = {"class": "CLIPTextModel", "parameters": 123_060_480}
_TEXT_G = {"class": "CLIPTextModelWithProjection", "parameters": 694_659_840}


def _svd(frames: int) -> dict[str, Any]:
    return {
        "pipeline": "StableVideoDiffusionPipeline",
        "size": (frames, 576, 1024),
        "components": {
            "image_encoder": _VISION_H,
            "unet": {"class": "UNetSpatioTemporalConditionModel", "config": {"num_frames": frames}},
            "vae": {"class": "AutoencoderKLTemporalDecoder", "config": _VAE},
        },
    }


# The diffusion pipeline keeps the adapter whose weights the UNet took copies of, and moves it to the device as well.
_ADAPTER = {
    "class": "MotionAdapter",
    "config": {"block_out_channels": [320, 640, 1280, 1280], "use_motion_mid_block": False},
}
_ADAPTER_SDXL = {
    "class": "MotionAdapter",
    "config": {"block_out_channels": [320, 640, 1280]} | {"use_motion_mid_block": False},
}

_ANIMATEDIFF = {
    "pipeline": "AnimateDiffPipeline",
    "size": (16, 512, 512),
    "components": {
        "text_encoder": _TEXT_L,
        "motion_adapter": _ADAPTER,
        "unet": {
            "class": "UNetMotionModel",
            "config": {"cross_attention_dim": 768, "use_motion_mid_block": False},
        },
        "vae": _IMAGE_VAE,
    },
}

_ANIMATEDIFF_SDXL = {
    "pipeline": "AnimateDiffSDXLPipeline",
    "size": (16, 1024, 1024),
    "components": {
        "text_encoder": _TEXT_L,
        "text_encoder_2": _TEXT_G,
        "motion_adapter": _ADAPTER_SDXL,
        "unet": {
            "class": "UNetMotionModel",
            "config": {
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"],
                "up_block_types": ["CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"],
                "transformer_layers_per_block": [1, 2, 10],
                "num_attention_heads": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
                "use_motion_mid_block": False,
            },
        },
        "vae": _IMAGE_VAE,
    },
}

NAMED: dict[str, dict[str, Any]] = {
    "svd": _svd(14),
    "svd-xt": _svd(25),
    "animatediff": _ANIMATEDIFF,
    "animatediff-sdxl": _ANIMATEDIFF_SDXL,
}
"""Per name: the diffusion pipeline's class, its usual size (frames, height, width), and its components."""
