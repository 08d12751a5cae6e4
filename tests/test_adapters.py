"""What diffusers changes in a denoiser between calls: adapters, processors, FreeU, FreeNoise. The frames follow."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import fmecompile
from tests import pipelines
from tests.pipelines import assert_same, changes, frames, plans, relative, state, twins

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def lora(rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of the denoiser's attention, as a file of one would give it."""
    unet: Any = pipelines.one_level_animatediff()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_v"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    weights = get_peft_model_state_dict(unet, adapter_name="default")
    return {f"unet.{name}": torch.randn(w.shape, generator=generator) * 0.3 for name, w in weights.items()}


def test_lora_is_loaded_scaled_fused_and_unloaded() -> None:
    fast, plain = twins()
    without = frames(plain, output_type="latent")
    steps = {
        "load": lambda pipe: pipe.load_lora_weights(dict(lora(4, 0)), adapter_name="a"),
        "scale": lambda pipe: pipe.set_adapters(["a"], [0.5]),
        "fuse": lambda pipe: pipe.fuse_lora(),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }
    for name, step in steps.items():
        step(fast)
        step(plain)
        assert_same(fast, plain)
        assert len(plans(fast.unet)) == 1, name
        if name in ("load", "scale", "fuse"):
            assert relative(frames(plain, output_type="latent"), without) > 1e-3, name
    assert fmecompile.is_optimized(fast)


def test_lora_is_scaled_by_the_call_alone() -> None:
    fast, plain = twins()
    for pipe in (fast, plain):
        pipe.load_lora_weights(dict(lora(4, 0)), adapter_name="a")
    for scale in (0.2, 1.0):
        assert_same(fast, plain, cross_attention_kwargs={"scale": scale})


@pytest.mark.slow
def test_lora_is_hotswapped() -> None:
    """For one of another rank."""
    fast, plain = twins()
    for pipe in (fast, plain):
        pipe.load_lora_weights(dict(lora(4, 0)), adapter_name="a")
    assert_same(fast, plain)
    for pipe in (fast, plain):
        pipe.load_lora_weights(dict(lora(2, 1)), adapter_name="a", hotswap=True)
    assert_same(fast, plain)


def test_restored_with_a_lora_still_in() -> None:
    fast, plain = twins()
    for pipe in (fast, plain):
        pipe.load_lora_weights(dict(lora(4, 0)), adapter_name="a")
    fmecompile.restore(fast)
    assert torch.equal(frames(fast), frames(plain))
    before = state(fast)
    fmecompile.optimize(fast, strict=True)
    assert_same(fast, plain)
    fmecompile.restore(fast)
    assert changes(before, state(fast)) == []


def ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of an adapter with four image tokens, in the layout of its files."""
    generator = torch.Generator().manual_seed(0)
    width, tokens = pipelines.WIDTH, 4

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    projection = {
        "proj.weight": noise(tokens * width, width),
        "proj.bias": noise(tokens * width),
        "norm.weight": noise(width),
        "norm.bias": noise(width),
    }
    crossed = [name for name in unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    keys: dict[str, torch.Tensor] = {}
    for k, name in enumerate(crossed):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        keys |= {f"{2 * k + 1}.to_{part}_ip.weight": noise(inner, width) for part in ("k", "v")}
    return {"image_proj": projection, "ip_adapter": keys}


def test_ip_adapter() -> None:
    fast, plain = twins()
    without = frames(plain, output_type="latent")
    for pipe in (fast, plain):
        pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder=None, weight_name=None)
    call = {"ip_adapter_image": pipelines.image(3)}
    for scale in (0.6, 0.0):
        for pipe in (fast, plain):
            pipe.set_ip_adapter_scale(scale)
        assert_same(fast, plain, **call)
        assert (relative(frames(plain, output_type="latent", **call), without) > 1e-3) == (scale > 0)
    for pipe in (fast, plain):
        pipe.unload_ip_adapter()
    assert_same(fast, plain)


@pytest.mark.slow
def test_freeu() -> None:
    fast, plain = twins()
    for pipe in (fast, plain):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_same(fast, plain)
    for pipe in (fast, plain):
        pipe.disable_freeu()
    assert_same(fast, plain)


def test_free_noise() -> None:
    fast, plain = twins()
    for pipe in (fast, plain):
        pipe.enable_free_noise(context_length=4, context_stride=2)
    assert_same(fast, plain, num_frames=6)


@pytest.mark.slow
def test_free_init() -> None:
    fast, plain = twins()
    for pipe in (fast, plain):
        pipe.enable_free_init(num_iters=2)
    assert_same(fast, plain)
    assert len(plans(fast.unet)) == 1


def test_swapped_attention_processors() -> None:
    fast, plain = twins()
    assert_same(fast, plain)
    for pipe in (fast, plain):
        pipe.unet.set_attn_processor(AttnProcessor())
    assert_same(fast, plain)
