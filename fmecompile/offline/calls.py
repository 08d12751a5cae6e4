"""What runs during a generation, per class of diffusers: the calls that hold memory, and fake inputs for each.

A class without a line in these tables is weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.errors import OptionError, TargetError
from fmecompile.offline.model import Component, Model, Size, require_diffusers_class

DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float16: ("fp16", "float16", "half"),
        torch.bfloat16: ("bf16", "bfloat16"),
        torch.float32: ("fp32", "float32", "float"),
    }.items()
    for name in names
}
TEXT_TOKENS = 77

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One kind of call of one component.

    ``kind`` is ``denoise``, ``decode`` or ``encode``; ``size`` that of the clip; ``scale`` the pixels of a latent's
    edge; ``batch`` 2 with guidance; ``dtype`` a name of torch, as calls travel to other processes.
    """

    kind: str
    component: Component
    size: Size
    scale: int
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return {"denoise": "denoiser", "decode": "VAE decode", "encode": "VAE encode"}[self.kind]

    def at(self, size: Size) -> Call:
        """The same call for another clip; an image is encoded alone, however long the clip gets."""
        return replace(self, size=replace(size, frames=1) if self.kind == "encode" else size)

    def build(self) -> nn.Module:
        """The whole component on fake tensors, for inference."""
        return build(self.component, getattr(torch, self.dtype))

    def part(self, component: nn.Module) -> nn.Module:
        """What of the built component is called: of a VAE its decoder or encoder."""
        part = {"decode": "decoder", "encode": "encoder"}.get(self.kind)
        return component if part is None else component.get_submodule(part)

    def inputs(self, component: nn.Module) -> Inputs:
        """Arguments of ``part``: of random values, or on fake tensors where a fake mode is on."""
        tensors: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        config: Any = component.config
        if self.kind == "encode":
            return (torch.randn(1, config["in_channels"], self.size.height, self.size.width, **tensors),), {}
        table = DENOISERS if self.kind == "denoise" else DECODERS
        size = Size(self.size.frames, self.size.height // self.scale, self.size.width // self.scale)
        return table[self.component.class_name](config, size, self.batch, tensors)


def build(component: Component, dtype: torch.dtype) -> nn.Module:
    """A diffusers model on fake tensors. Raises TargetError when its configuration does not build one."""
    kind: Any = require_diffusers_class(component.class_name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be cast later
    try:
        with FakeTensorMode(), torch.no_grad():
            module = kind.from_config(component.settings)
    except Exception as error:  # whatever its constructor raises at what the file says
        raise TargetError(
            f"{component.class_name} cannot be built from this configuration: {error}",
            place=component.name,
            next_step="give the config.json that belongs to the class",
        ) from error
    finally:
        torch.set_default_dtype(before)
    return module.eval().requires_grad_(False)


# Inputs: (configuration, size in latents, batch, dtype) -> arguments


def _svd(config: Mapping[str, Any], size: Size, batch: int, tensors: Any) -> Inputs:
    """Latents (B, T, C, h, w), a timestep, image embeddings (B, 1, D), added time ids (B, 3)."""
    ids = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    latents = torch.randn(batch, size.frames, config["in_channels"], size.height, size.width, **tensors)
    return (
        latents,
        torch.ones((), **tensors),
        torch.randn(batch, 1, config["cross_attention_dim"], **tensors),
        torch.randn(batch, ids, **tensors),
    ), {}


def _motion(config: Mapping[str, Any], size: Size, batch: int, tensors: Any) -> Inputs:
    """Latents (B, C, T, h, w), a timestep, text embeddings a frame (B T, 77, D); pooled text and time ids for SDXL."""
    latents = torch.randn(batch, config["in_channels"], size.frames, size.height, size.width, **tensors)
    text = torch.randn(batch * size.frames, TEXT_TOKENS, config["cross_attention_dim"], **tensors)
    if config.get("addition_embed_type") != "text_time":
        return (latents, torch.ones((), dtype=torch.int64), text), {}
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.randn(batch, pooled, **tensors), "time_ids": torch.randn(batch, 6, **tensors)}
    return (latents, torch.ones((), dtype=torch.int64), text), {"added_cond_kwargs": added}


def _text_to_video(config: Mapping[str, Any], size: Size, batch: int, tensors: Any) -> Inputs:
    """Latents (B, C, T, h, w), a timestep, text embeddings (B, 77, D)."""
    latents = torch.randn(batch, config["in_channels"], size.frames, size.height, size.width, **tensors)
    text = torch.randn(batch, TEXT_TOKENS, config["cross_attention_dim"], **tensors)
    return (latents, torch.ones((), dtype=torch.int64), text), {}


def _temporal_decoder(config: Mapping[str, Any], size: Size, batch: int, tensors: Any) -> Inputs:
    """Latents (T, C, h, w) of one clip, all frames at once."""
    indicator = torch.zeros(1, size.frames, **tensors)
    return _decoder(config, size, batch, tensors)[0], {"image_only_indicator": indicator, "num_frames": size.frames}


def _decoder(config: Mapping[str, Any], size: Size, batch: int, tensors: Any) -> Inputs:
    """Latents (T, C, h, w): frames are the batch; guidance is over by then."""
    return (torch.randn(size.frames, config["latent_channels"], size.height, size.width, **tensors),), {}


Make = Callable[[Mapping[str, Any], Size, int, Any], Inputs]
DENOISERS: dict[str, Make] = {
    "UNetSpatioTemporalConditionModel": _svd,
    "UNetMotionModel": _motion,
    "UNet3DConditionModel": _text_to_video,
}
DECODERS: dict[str, Make] = {"AutoencoderKLTemporalDecoder": _temporal_decoder, "AutoencoderKL": _decoder}


# What a diffusion pipeline does besides denoising and decoding, as its diffusers class does it.
ENCODES_AN_IMAGE = {"StableVideoDiffusionPipeline"}
UPCASTS_DECODE = {"AnimateDiffSDXLPipeline"}


def calls_of(model: Model, dtype: torch.dtype, guidance: bool) -> list[Call]:
    """Every call of ``model`` that is planned, in the order they run.

    Raises TargetError when no component has a class of the tables.
    """
    scale = max([_scale(c) for c in model.components if c.class_name in DECODERS], default=8)
    name = str(dtype).removeprefix("torch.")

    def call(kind: str, component: Component, upcasts: bool = False) -> Call:
        wide = upcasts and dtype == torch.float16 and component.settings.get("force_upcast", True)
        batch = 2 if guidance and kind == "denoise" else 1
        return Call(kind, component, model.size, scale, batch, "float32" if wide else name).at(model.size)

    vaes = [c for c in model.components if c.class_name in DECODERS]
    encoded = vaes if model.pipeline_class in ENCODES_AN_IMAGE | {""} else []
    found = [call("encode", c, bool(model.pipeline_class)) for c in encoded]
    found += [call("denoise", c) for c in model.components if c.class_name in DENOISERS]
    found += [call("decode", c, model.pipeline_class in UPCASTS_DECODE) for c in vaes]
    if not found:
        classes = ", ".join(c.class_name for c in model.components)
        known = ", ".join([*DENOISERS, *DECODERS])
        raise TargetError(f"no inputs are known for {classes}", next_step=f"there are inputs for {known}")
    return found


def _scale(component: Component) -> int:
    """Pixels along a latent's edge: every level but the last halves the image."""
    return 2 ** (len(component.settings.get("block_out_channels", (64,))) - 1)


def frames_limit(model: Model) -> int | None:
    """The most frames the denoiser has positions for; None where any number goes."""
    limits = (
        c.settings.get("motion_max_seq_length", 32) for c in model.components if c.class_name == "UNetMotionModel"
    )
    return min(limits, default=None)


def check_size(model: Model, size: Size, scale: int) -> None:
    """Raises OptionError when no clip of ``size`` can be made."""
    least, limit = min(size.frames, size.height, size.width), frames_limit(model)
    if least < 1 or size.height % scale or size.width % scale:
        edge = f"height and width have to be multiples of {scale}"
        raise OptionError(f"there is no clip of {size}", next_step=f"give at least one frame; {edge}")
    if limit is not None and size.frames > limit:
        raise OptionError(
            f"the motion modules have {limit} positions, {size.frames} frames were asked for",
            next_step=f"give at most {limit} frames (motion_max_seq_length)",
        )
