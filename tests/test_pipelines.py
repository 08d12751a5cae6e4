"""Whole diffusion pipelines: the same frames, bytes within the plan, every attribute back afterwards."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fmecompile
from tests import pipelines
from tests.pipelines import TOLERANCE, calls_of, changes, frames, plans, relative, state

EVERY = {
    "svd": (pipelines.svd, {"unet", "vae.decoder", "vae.encoder"}),
    "animatediff": (pipelines.animatediff, {"unet", "vae.decoder"}),
    "video-to-video": (pipelines.video_to_video, {"unet", "vae.decoder", "vae.encoder"}),
    "controlnet": (pipelines.with_controlnet, {"unet", "vae.decoder", "controlnet"}),
    "sparse-controlnet": (pipelines.with_sparse_controlnet, {"unet", "vae.decoder", "vae.encoder", "controlnet"}),
    "sdxl": (pipelines.sdxl, {"unet", "vae.decoder"}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_within_projection(module: nn.Module, args: Any, kwargs: Any) -> None:
    """One more call of an optimized module holds no more than its plan says."""
    measured = fmecompile.measure(module, *args, **kwargs).peak_bytes
    plan = fmecompile.explain(module).records[-1].plan
    assert measured <= plan.projected_peak_bytes <= plan.allowed_bytes


SELDOM = {"sdxl", "video-to-video", "sparse-controlnet"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SELDOM)) for case in EVERY])
def test_a_pipeline_gives_the_same_frames(case: str) -> None:
    build, compiled = EVERY[case]
    pipe = build()
    want = frames(pipe)
    before = state(pipe)
    assert not fmecompile.is_optimized(pipe)
    assert fmecompile.optimize(pipe, strict=True) is pipe
    assert fmecompile.is_optimized(pipe)
    denoisings, got = calls_of(pipe.unet, lambda: frames(pipe))
    assert relative(got, want) < TOLERANCE
    told = fmecompile.explain(pipe)
    assert {path for path, part in told.parts.items() if part.records} == compiled
    assert not told.refused
    assert fmecompile.explain(pipe.unet).records[0].plan.trips > 1
    assert all(path in str(told) for path in compiled)
    assert_within_projection(pipe.unet, *denoisings[-1])
    assert fmecompile.restore(pipe) is pipe
    assert not fmecompile.is_optimized(pipe)
    assert changes(before, state(pipe)) == []
    assert torch.equal(frames(pipe), want)


@pytest.mark.slow
def test_every_net_of_several_controlnets_is_compiled() -> None:
    pipe = pipelines.with_controlnet(2)
    call = {"conditioning_frames": [pipelines.images(4), pipelines.images(4, 9)]}
    want = frames(pipe, **call)
    before = state(pipe)
    fmecompile.optimize(pipe, strict=True)
    assert relative(frames(pipe, **call), want) < TOLERANCE
    told = fmecompile.explain(pipe).parts
    assert all(told[path].records for path in ("controlnet.nets.0", "controlnet.nets.1"))
    fmecompile.restore(pipe)
    assert changes(before, state(pipe)) == []


# ---------------------------------------------------------------------------------------------------------------- VAE


def test_a_vae_keeps_its_own_methods() -> None:
    vae = pipelines.vae()
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = vae.decode(latents).sample
        want = [images, vae.encode(images).latent_dist.mean, vae(images).sample]
        fmecompile.optimize(vae, strict=True)
        assert fmecompile.is_optimized(vae)
        got = [vae.decode(latents).sample, vae.encode(images).latent_dist.mean, vae(images).sample]
        assert all(relative(a, b) < TOLERANCE for a, b in zip(got, want, strict=True))
        vae.enable_slicing()
        assert relative(vae.decode(latents).sample, images) < TOLERANCE
        signatures = [plan.key.signature for plan in plans(vae.decoder)]
        assert signatures[-1].startswith("(1, 4")
    fmecompile.restore(vae)
    assert "forward" not in vars(vae.decoder) and "forward" not in vars(vae.encoder)


@pytest.mark.parametrize("build", [pipelines.svd, pipelines.animatediff], ids=["svd", "animatediff"])
def test_the_chunk_size_of_decoding_is_not_used(build: Any) -> None:
    pipe = build()
    want = frames(pipe, decode_chunk_size=4)
    if build is pipelines.svd:
        assert relative(frames(pipe, decode_chunk_size=2), want) > 1e-3  # the decoder mixes frames
    fmecompile.optimize(pipe, strict=True)
    with mock.patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
        with pytest.warns(UserWarning, match="decode_chunk_size=2"):
            assert relative(frames(pipe, decode_chunk_size=2), want) < TOLERANCE
        assert decode.call_count == 1
    assert "decode_chunk_size=2 is not used" in str(fmecompile.explain(pipe))
    fmecompile.restore(pipe)
    assert "decode_latents" not in vars(pipe)


def test_the_chunk_size_holds_where_the_decoder_is_not_compiled() -> None:
    pipe = pipelines.animatediff()
    want = frames(pipe)
    fmecompile.optimize(pipe)
    pipe.vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    with mock.patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
        with pytest.warns(UserWarning, match="conv_in has a forward hook"):
            assert relative(frames(pipe, decode_chunk_size=2), want) < TOLERANCE
        assert [len(call.args[0]) for call in decode.call_args_list] == [4, 2, 2]  # the whole clip is refused first
    assert "forward hook" in str(fmecompile.explain(pipe))


@pytest.mark.slow
def test_two_clips_are_decoded_one_by_one() -> None:
    pipe = pipelines.svd()
    call = {"image": pipelines.images(2), "num_inference_steps": 1}
    want = frames(pipe, **call)
    fmecompile.optimize(pipe, strict=True)
    with pytest.warns(UserWarning, match="decode_chunk_size=3"):
        assert relative(frames(pipe, decode_chunk_size=3, **call), want) < TOLERANCE
