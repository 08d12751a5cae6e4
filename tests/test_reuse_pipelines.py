"""Step reuse in whole diffusion pipelines, as users run them: the right steps, nothing stale, nothing left behind."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fmecompile
from fmecompile.backends import reusing as reusing_backend
from fmecompile.backends.budgeted import within_budget
from fmecompile.passes.prologue import Prologue as SplitPrologue
from fmecompile.reuse import Broadcast, Policy, Steps
from fmecompile.runtime.dispatch import find
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.generation import Timeline, _Mark
from fmecompile.runtime.measure import ROUNDING_BYTES
from tests import pipelines
from tests.pipelines import TOLERANCE, frames, relative

pytestmark = pytest.mark.usefixtures("one_thread", "without_loops")

STEPS = 6
EVERY_SECOND = fmecompile.DeepCache(interval=2)
BUILDS = [
    pytest.param(pipelines.svd, id="svd", marks=pytest.mark.slow),
    pytest.param(pipelines.animatediff, id="animatediff"),
]


@pytest.fixture(scope="module")
def without_loops() -> Iterator[None]:
    """Which values are kept when does not depend on loops, and the search for them takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMECOMPILE_MIN_TRIP_BYTES", str(2**30))
        yield


def latents(pipe: Any, **call: Any) -> torch.Tensor:
    return frames(pipe, **{"num_inference_steps": STEPS, "output_type": "latent"} | call)


def reusing(pipe: Any, policy: Any = EVERY_SECOND, **options: Any) -> Any:
    """An optimized copy of ``pipe``."""
    return fmecompile.optimize(copy.deepcopy(pipe), reuse=policy, strict=True, **options)


def kept_bytes(module: nn.Module) -> int:
    """Bytes that an optimized denoiser keeps at the moment."""
    return find(module)._compiler.timeline.kept_bytes()  # pyright: ignore


def reuse_of(module: nn.Module) -> list[Any]:
    return [record.reuse for record in fmecompile.explain(module).records]


@contextmanager
def watched() -> Iterator[list[str]]:
    """The steps that run meanwhile: 1 for a full one, 0 for one that takes kept values."""
    bits: list[str] = []
    run = Executable.run

    def spy(self: Executable, leaves: Any, kept: Any = None, coefficients: Any = ()) -> Any:
        taken, keeps = ([n for n in names if not n.startswith("prologue")] for names in (self.takes, self.keeps))
        if taken or keeps:
            bits.append("0" if taken else "1")
        return run(self, leaves, kept or {}, coefficients)

    with mock.patch.object(Executable, "run", spy):
        yield bits


@contextmanager
def prologues() -> Iterator[list[int]]:
    """How many values each prologue makes that runs meanwhile."""
    made: list[int] = []
    run = Executable.run

    def spy(self: Executable, *args: Any) -> Any:
        if self.keeps and all(name.startswith("prologue") for name in self.keeps):
            made.append(len(self.keeps))
        return run(self, *args)

    with mock.patch.object(Executable, "run", spy):
        yield made


def steps_of(pipe: Any, **call: Any) -> str:
    """Which steps of one generation are full."""
    with watched() as bits:
        latents(pipe, **call)
    return "".join(bits)


# ------------------------------------------------------------------------------------------------------ one generation


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_full_steps_alone_give_the_frames_of_the_optimized_pipeline(build: Callable[[], Any]) -> None:
    plain = build()
    want = latents(fmecompile.optimize(copy.deepcopy(plain), strict=True))
    fast = reusing(plain, fmecompile.StepRehash(full_steps=STEPS))
    with watched() as bits:
        assert relative(latents(fast), want) < TOLERANCE
    assert "".join(bits) == "1" * STEPS
    assert len(reuse_of(fast.unet)[0].plans) == 1


@pytest.mark.parametrize(
    ("build", "policy"),
    [
        pytest.param(pipelines.svd, fmecompile.StepRehash(full_steps=3), id="svd-rehash", marks=pytest.mark.slow),
        pytest.param(pipelines.animatediff, EVERY_SECOND, id="animatediff-deep-cache"),
    ],
)
def test_reuse_is_the_same_in_every_generation(build: Callable[[], Any], policy: Any) -> None:
    plain = build()
    exact, fast = latents(plain), reusing(plain, policy)
    with watched() as bits:
        first = latents(fast)
    assert bits[0] == "1" and "0" in bits and len(bits) == STEPS
    assert kept_bytes(fast.unet) == 0
    with mock.patch("fmecompile.backends.reusing.capture", side_effect=AssertionError), watched() as again:
        assert torch.equal(latents(fast), first)
    assert again == bits
    assert first.isfinite().all() and 1e-3 < relative(first, exact) < 1
    (reuse,) = reuse_of(fast.unet)
    assert len(reuse.plans) == 2
    assert torch.equal(latents(reusing(plain, policy)), first)


@pytest.mark.parametrize("build", BUILDS)
def test_two_programs_serve_fifty_steps(build: Callable[[], Any]) -> None:
    """And the frames themselves come out."""
    fast = reusing(build(), fmecompile.StepRehash(full_steps=13))
    for _ in range(2):
        with watched() as bits:
            assert frames(fast, num_inference_steps=50).isfinite().all()
        assert bits.count("1") == 13 and len(bits) == 50
    (reuse,) = reuse_of(fast.unet)
    assert len(reuse.plans) == 2
    assert all(path in str(fmecompile.explain(fast)) for path in ("unet", "StepRehash", "step that reuses"))


@pytest.mark.parametrize("build", BUILDS)
def test_without_a_policy_what_all_steps_share_is_made_once(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipeline; a module alone may be called with anything."""
    monkeypatch.setattr(reusing_backend, "SplitPrologue", functools.partial(SplitPrologue, share=1.0))  # they are small
    plain = build()
    want = latents(plain)
    fast = fmecompile.optimize(copy.deepcopy(plain), strict=True)
    for _ in range(2):
        with prologues() as made:
            assert relative(latents(fast), want) < TOLERANCE
        assert len(made) == 1 and made[0] > 0
        assert kept_bytes(fast.unet) == 0
    assert "made once" in str(fmecompile.explain(fast))
    alone = copy.deepcopy(plain)
    fmecompile.optimize(alone.unet, strict=True)
    with prologues() as made:
        latents(alone)
    assert not made and reuse_of(alone.unet) == [None]


# ------------------------------------------------------------------------------------------------- calls that differ

CHANGES = {
    "fewer-steps": {"num_inference_steps": 3},
    "other-size": {"height": 8},
    "other-frames": {"num_frames": 2},
    "guidance-off": {"guidance_scale": 1.0},
}


ALIKE = {"other-size", "other-frames"}
"""Changes of a shape; guidance off is one too, and always tested."""


def assert_as_in_a_fresh_pipeline(plain: Any, **call: Any) -> None:
    """A call between others gives what it gives alone, and so do the others."""
    fast = reusing(plain)
    first, differing = latents(fast), latents(fast, **call)
    assert kept_bytes(fast.unet) == 0
    assert torch.equal(latents(fast), first)
    assert torch.equal(latents(fast, **call), differing)
    assert torch.equal(latents(reusing(plain), **call), differing)


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=pytest.mark.slow) if c in ALIKE else c for c in sorted(CHANGES)]
)
def test_a_call_that_differs_is_as_in_a_fresh_pipeline(change: str) -> None:
    assert_as_in_a_fresh_pipeline(pipelines.animatediff(), **CHANGES[change])


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_a_call_that_differs_in_everything(build: Callable[[], Any]) -> None:
    off = ["min_guidance_scale", "max_guidance_scale"] if build is pipelines.svd else ["guidance_scale"]
    call = {"num_inference_steps": 3, "height": 8, "num_frames": 2} | dict.fromkeys(off, 1.0)
    assert_as_in_a_fresh_pipeline(build(), **call)


SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, STEPS),
    "euler": (diffusers.EulerDiscreteScheduler, STEPS),
    "heun": (diffusers.HeunDiscreteScheduler, 2 * STEPS - 1),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, 2 * STEPS - 1),
    "pndm": (diffusers.PNDMScheduler, None),
    "dpm": (diffusers.DPMSolverMultistepScheduler, STEPS),
    "lcm": (diffusers.LCMScheduler, STEPS),
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return pipelines.animatediff()


@pytest.fixture(scope="module")
def animatediff(plain: Any, without_loops: None) -> Any:
    """For tests that leave it as they found it."""
    return reusing(plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_counted_from_the_sampler(animatediff: Any, sampler: str) -> None:
    """Also of samplers that call twice at a timestep."""
    kind, calls = SAMPLERS[sampler]
    before = animatediff.scheduler
    animatediff.scheduler = kind.from_config(before.config)
    try:
        bits = steps_of(animatediff)
        assert len(bits) == (calls or len(animatediff.scheduler.timesteps))
        assert bits == ("10" * len(bits))[: len(bits)]
        assert steps_of(animatediff) == bits
        assert kept_bytes(animatediff.unet) == 0
    finally:
        animatediff.scheduler = before


def test_one_step_just_runs(animatediff: Any, plain: Any) -> None:
    """Its list of timesteps has one item, and another generation may have another one."""
    want = latents(animatediff)
    one = latents(animatediff, num_inference_steps=1)
    assert steps_of(animatediff, num_inference_steps=1) == "1"
    assert torch.equal(latents(animatediff), want)
    assert relative(one, latents(plain, num_inference_steps=1)) < TOLERANCE


def test_another_sampler_leaves_no_trace(animatediff: Any, plain: Any) -> None:
    before, want = animatediff.scheduler, latents(animatediff)
    animatediff.scheduler = diffusers.HeunDiscreteScheduler.from_config(before.config)
    try:
        heun = latents(animatediff)
        fresh = copy.deepcopy(plain)
        fresh.scheduler = diffusers.HeunDiscreteScheduler.from_config(before.config)
        assert torch.equal(latents(reusing(fresh)), heun)
    finally:
        animatediff.scheduler = before
    assert torch.equal(latents(animatediff), want)


def test_image_strength_leaves_fewer_steps() -> None:
    """The policy plans for the calls that are made: with a tail guard, the last one is full."""
    policy = fmecompile.DeepCache(interval=2, guards=fmecompile.Guards(tail=1))
    fast = reusing(pipelines.video_to_video(), policy)
    for strength, bits in ((1.0, "101011"), (0.5, "101"), (0.7, "1011"), (0.2, "1"), (1.0, "101011")):
        assert steps_of(fast, strength=strength) == bits


@pytest.mark.parametrize("is_fast", [False, True])
def test_free_init_begins_a_generation_each_time(animatediff: Any, is_fast: bool) -> None:
    animatediff.enable_free_init(num_iters=2, use_fast_sampling=is_fast, method="gaussian")
    try:
        assert steps_of(animatediff) == ("101" if is_fast else "101010") + "101010"
        assert steps_of(animatediff, num_inference_steps=2) == ("1" if is_fast else "10") + "10"
    finally:
        animatediff.disable_free_init()


def test_controlnet_residuals_change_at_every_step() -> None:
    plain = pipelines.with_controlnet()
    fast = reusing(plain)
    with watched() as bits:
        first = latents(fast)
    assert "".join(bits) == "101010"
    assert torch.equal(latents(fast), first)
    assert relative(first, latents(plain)) > 1e-3
    other = latents(fast, conditioning_frames=pipelines.images(4, 9))
    assert torch.equal(latents(reusing(plain), conditioning_frames=pipelines.images(4, 9)), other)


@pytest.mark.parametrize("build", [pipelines.with_sparse_controlnet, pipelines.sdxl], ids=["sparse", "sdxl"])
def test_other_pipelines(build: Callable[[], Any]) -> None:
    fast = reusing(build())
    with watched() as bits:
        first = latents(fast)
    assert "".join(bits) == "101010"
    assert torch.equal(latents(fast), first)


# ------------------------------------------------------------------------------------------------- times of the steps


def spatial(window: tuple[float, float]) -> fmecompile.reuse.PyramidAttention:
    """Spatial attention at every second step within a window of timesteps."""
    return fmecompile.reuse.PyramidAttention(spatial=Broadcast(2, window), temporal=None, cross=None)


def planned(policy: Any, pipe: Any, timesteps: Any) -> str:
    return fmecompile.reuse.to_bits(policy.plan(Steps(timesteps=tuple(timesteps.tolist()))))


@pytest.mark.parametrize(
    ("build", "window"),
    [
        pytest.param(pipelines.svd, (-1.0, 1.5), id="svd"),
        pytest.param(pipelines.animatediff, (100.0, 800.0), id="ddim", marks=pytest.mark.slow),
    ],
)
def test_windows_are_on_the_timesteps_of_the_sampler(build: Callable[[], Any], window: tuple[float, float]) -> None:
    """In its own unit: logarithms of sigmas here, numbers up to 1000 there."""
    policy = spatial(window)
    fast = reusing(build(), policy)
    bits = steps_of(fast, num_inference_steps=8)
    assert bits == planned(policy, fast, fast.scheduler.timesteps)
    assert "0" in bits and bits != ("10" * 8)[:8]
    fast.enable_model_cpu_offload(device="cpu")
    assert steps_of(fast, num_inference_steps=8) == bits
    assert kept_bytes(fast.unet) == 0


def test_windows_of_a_run_that_begins_in_the_middle() -> None:
    policy = spatial((100.0, 800.0))
    fast = reusing(pipelines.video_to_video(), policy)
    for strength, count in ((1.0, 8), (0.6, 4)):
        bits = steps_of(fast, strength=strength, num_inference_steps=8)
        assert bits == planned(policy, fast, fast.scheduler.timesteps[8 - count :])


@pytest.mark.parametrize("clock", [pytest.param("timestep", marks=pytest.mark.slow), "sigma"])
def test_a_forecast_knows_the_times_of_its_steps(clock: Any) -> None:
    """They are read once in a generation, and the weights of differences are those of the sampler's own list."""
    policy = fmecompile.DeepCache(interval=2, mode="forecast", clock=clock)
    fast = reusing(pipelines.svd(), policy)
    with mock.patch.object(_Mark, "rest", autospec=True, side_effect=_Mark.rest) as read:
        with mock.patch.object(type(policy), "coefficients", autospec=True, side_effect=Policy.coefficients) as asked:
            latents(fast)
        assert read.call_count == 1
    sampler = fast.scheduler
    for call in asked.call_args_list:
        _, steps, *_ = call.args
        assert steps == Steps(STEPS, tuple(sampler.timesteps.tolist()), tuple(sampler.sigmas.tolist()))
    assert asked.call_count == 3
    assert relative(latents(fast), latents(reusing(pipelines.svd(), POLICIES["forecast"]))) > 1e-6


def test_sigmas_of_a_sampler_without_any_are_asked_for() -> None:
    policy = fmecompile.DeepCache(interval=2, mode="forecast", clock="sigma")
    with pytest.raises(fmecompile.OptionError, match="sigmas of this run are not known"):
        latents(reusing(pipelines.animatediff(), policy))


def test_times_are_not_read_for_those_who_do_not_ask(animatediff: Any) -> None:
    with mock.patch.object(_Mark, "rest", side_effect=AssertionError):
        assert steps_of(animatediff) == "101010"


# ------------------------------------------------------------------------------------------- what happens in between


def stop_at(step: int) -> Callable[..., Any]:
    def stop(pipe: Any, now: int, timestep: Any, values: Any) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return values

    return stop


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_generation_that_was_stopped_leaves_nothing_to_reuse(animatediff: Any, step: int) -> None:
    want = latents(animatediff)
    with pytest.raises(KeyboardInterrupt):
        latents(animatediff, seed=3, callback_on_step_end=stop_at(step))
    with watched() as bits:
        assert torch.equal(latents(animatediff), want)
    assert "".join(bits) == "101010"
    assert kept_bytes(animatediff.unet) == 0


@pytest.mark.usefixtures("one_thread")  # a library may share work among its own threads otherwise on a busy machine
def test_threads_have_generations_of_their_own(animatediff: Any) -> None:
    """On one UNet, at the same time; what a thread leaves unfinished goes with it."""
    pipes = [diffusers.AnimateDiffPipeline(**animatediff.components) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = copy.deepcopy(animatediff.scheduler)
    calls = [{"num_inference_steps": 6, "seed": 1}, {"num_inference_steps": 5, "seed": 2, "prompt": "c d"}]
    alone = [latents(pipe, **call) for pipe, call in zip(pipes, calls, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            waiting = [pool.submit(latents, pipe, **call) for pipe, call in zip(pipes, calls, strict=True)]
            assert all(torch.equal(w.result(), want) for w, want in zip(waiting, alone, strict=True))
        stopped = pool.submit(latents, pipes[0], callback_on_step_end=stop_at(0))
        assert isinstance(stopped.exception(), KeyboardInterrupt)
        assert kept_bytes(animatediff.unet) > 0
    del waiting, stopped
    gc.collect()
    assert kept_bytes(animatediff.unet) == 0


@pytest.mark.parametrize("sampler", [diffusers.DDIMScheduler, diffusers.HeunDiscreteScheduler])
def test_model_cpu_offload(animatediff: Any, sampler: Any) -> None:
    """Its hooks hand the UNet copies of the timesteps; those are told by the sampler."""
    fast = copy.deepcopy(animatediff)
    fast.scheduler = sampler.from_config(fast.scheduler.config)
    with watched() as bits:
        want = latents(fast)
    fast.enable_model_cpu_offload(device="cpu")
    with mock.patch.object(Timeline, "at", autospec=True, side_effect=Timeline.at) as at:
        with watched() as offloaded:
            assert torch.equal(latents(fast), want)
        assert all(call.args[1]._base is None for call in at.call_args_list)
    assert offloaded == bits
    assert steps_of(fast, num_inference_steps=1) == "1"
    assert torch.equal(latents(fast), want)
    assert kept_bytes(fast.unet) == 0
    fmecompile.restore(fast)
    assert relative(latents(fast), want) > 1e-3


@pytest.mark.slow
def test_precision_changes_between_generations(plain: Any) -> None:
    fast = reusing(plain)
    want = latents(fast)
    fast.to(torch.float64)
    got = latents(fast)
    assert got.dtype == torch.float64
    assert torch.equal(latents(reusing(copy.deepcopy(plain).to(torch.float64))), got)
    assert torch.equal(latents(fast.to(torch.float32)), want)


def test_new_weights_drop_what_old_ones_left() -> None:
    """A LoRA that is loaded after a step: the next one is full, though the policy wanted to reuse."""
    from peft import LoraConfig

    fast = reusing(pipelines.animatediff())
    want = latents(fast)
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)

    def load(pipe: Any, now: int, timestep: Any, values: Any) -> Any:
        if now == 0:
            pipe.unet.add_adapter(lora)
            pipe.unet.requires_grad_(False)
        return values

    assert steps_of(fast, callback_on_step_end=load) == "111010"
    changed = latents(fast)
    assert relative(changed, want) > 1e-3
    assert torch.equal(latents(fast), changed)
    fast.unet.delete_adapters("default")
    assert kept_bytes(fast.unet) == 0


def test_restore_gives_the_plain_pipeline_back(plain: Any) -> None:
    fast = copy.deepcopy(plain)
    before = pipelines.state(fast)
    fmecompile.optimize(fast, reuse=EVERY_SECOND, strict=True)
    with pytest.raises(KeyboardInterrupt):
        latents(fast, callback_on_step_end=stop_at(0))
    assert kept_bytes(fast.unet) > 0
    gone = weakref.ref(find(fast.unet)._compiler.timeline)  # pyright: ignore
    fmecompile.restore(fast)
    gc.collect()
    assert gone() is None
    assert [c for c in pipelines.changes(before, pipelines.state(fast)) if not c.startswith("pipeline")] == []
    assert torch.equal(latents(fast), latents(plain))


def test_a_copied_pipeline_keeps_for_itself(animatediff: Any) -> None:
    want = latents(animatediff)
    with pytest.raises(KeyboardInterrupt):
        latents(animatediff, callback_on_step_end=stop_at(0))
    twin = copy.deepcopy(animatediff)
    assert kept_bytes(animatediff.unet) > 0 == kept_bytes(twin.unet)
    assert torch.equal(latents(twin), want)
    assert torch.equal(latents(animatediff), want)


# ------------------------------------------------------------------------------------------------------------ guidance


@torch.no_grad()
def denoised(
    unet: nn.Module,
    guided: Callable[[int], str],
    *,
    timesteps: torch.Tensor | None = None,
    prompts: Callable[[torch.Tensor], torch.Tensor] = lambda prompt: prompt,
) -> torch.Tensor:
    """A sampler with guidance of its own: ``guided(step)`` names the calls it makes, "c" for the conditional one, "u"
    for the other, "b" for both in one batch. ``prompts`` is what it does with embeddings at every call."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 4, 8, 8, generator=generator)
    states = {kind: torch.randn(4, 7, pipelines.WIDTH, generator=generator) for kind in "cu"}
    states["b"] = torch.cat([states["u"], states["c"]])
    for step, t in enumerate(torch.linspace(900, 20, STEPS) if timesteps is None else timesteps):
        kinds = guided(step)
        results = [
            unet(torch.cat([sample] * (1 + (kind == "b"))), t, encoder_hidden_states=prompts(states[kind])).sample
            for kind in kinds
        ]
        halves = torch.cat(results[::-1] if kinds == "cu" else results)
        uncond, cond = halves[0], halves[-1]
        sample = sample - 0.1 * (uncond + 3 * (cond - uncond))
    return sample


def test_guidance_in_one_call_or_two_is_the_same(animatediff: Any) -> None:
    unet = animatediff.unet
    together, apart, turned = (denoised(unet, lambda step, kinds=kinds: kinds) for kinds in ("b", "uc", "cu"))
    assert relative(apart, together) < TOLERANCE
    assert torch.equal(apart, turned)
    with watched() as bits:
        denoised(unet, lambda step: "uc")
    assert "".join(bits) == "110011001100"
    assert kept_bytes(unet) == 0


@pytest.mark.parametrize(
    ("guided", "bits", "held"),
    [("uc", "11 0 1 10 1 0", [0, 2, 1, 1, 0, 1]), ("b", "1 1 1 1 1 0", [0, 2, 2, 1, 1, 1])],
    ids=["apart", "together"],
)
def test_guidance_for_a_part_of_the_steps(animatediff: Any, guided: str, bits: str, held: list[int]) -> None:
    """What is kept of a half that is left out goes; where it comes back, it is computed."""
    unet, found = animatediff.unet, []

    def interval(step: int) -> str:
        found.append(kept_bytes(unet))
        return guided if step in (0, 3) else "c"

    with watched() as ran:
        first = denoised(unet, interval)
    assert "".join(ran) == bits.replace(" ", "")
    assert found == [found[5] * count for count in held]
    assert torch.equal(denoised(unet, interval), first)
    assert kept_bytes(unet) == 0


@pytest.mark.parametrize("prompts", [lambda x: x[:], lambda x: x.view(x.shape)], ids=["sliced", "viewed"])
def test_prompts_are_known_though_they_are_taken_out_of_a_tensor_again(animatediff: Any, prompts: Any) -> None:
    """Else the conditional call would be taken for the other one where that is left out."""

    def interval(step: int) -> str:
        return "uc" if step == 0 else "c"

    want = denoised(animatediff.unet, interval)
    assert torch.equal(denoised(animatediff.unet, interval, prompts=prompts), want)


def test_prompts_that_are_new_tensors_are_told_by_their_order(animatediff: Any) -> None:
    want = denoised(animatediff.unet, lambda step: "uc")
    assert torch.equal(denoised(animatediff.unet, lambda step: "uc", prompts=torch.clone), want)


def test_a_list_of_one_timestep_is_one_step(animatediff: Any) -> None:
    with watched() as bits:
        for t in (500.0, 400.0, 400.0):
            denoised(animatediff.unet, lambda step: "uc", timesteps=torch.tensor([t]))
            assert kept_bytes(animatediff.unet) == 0
    assert "".join(bits) == "11" * 3


def test_inference_mode(animatediff: Any) -> None:
    """Where torch tells neither views nor changes in place."""
    want, one = latents(animatediff), latents(animatediff, num_inference_steps=1)
    with torch.inference_mode():
        assert torch.equal(latents(animatediff), want)
        assert torch.equal(latents(animatediff, num_inference_steps=1), one)
    assert torch.equal(latents(animatediff), want)


def test_a_sampler_of_ones_own_declares_its_steps(animatediff: Any) -> None:
    """Of timesteps that are no list, even beside a pipeline that has one."""
    latents(animatediff, num_inference_steps=2)
    want = denoised(animatediff.unet, lambda step: "uc")
    timesteps: Any = [t.clone() for t in torch.linspace(900, 20, STEPS)]
    with pytest.raises(fmecompile.OptionError, match=r"fmecompile\.generation"):
        denoised(animatediff.unet, lambda step: "uc", timesteps=timesteps)
    with fmecompile.generation(steps=STEPS):
        assert torch.equal(denoised(animatediff.unet, lambda step: "uc", timesteps=timesteps), want)
    assert kept_bytes(animatediff.unet) == 0


# -------------------------------------------------------------------------------------------------------------- budget


POLICIES = {
    "feature": fmecompile.DeepCache(interval=2),
    "residual": fmecompile.StepRehash(full_steps=3, mode="residual"),
    "forecast": fmecompile.DeepCache(interval=2, mode="forecast", order=2),
}


@pytest.fixture
def with_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMECOMPILE_MIN_TRIP_BYTES", "0")


@pytest.fixture
def unet() -> nn.Module:
    return pipelines.one_level_animatediff()


def unet_inputs() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(1, 4, 4, 8, 8), "encoder_hidden_states": torch.randn(4, 7, pipelines.WIDTH)}


def at_rest(unet: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of weights and inputs, a timestep included."""
    return sum(t.nbytes for t in (*unet.parameters(), *unet.buffers(), *inputs.values())) + 4


@torch.no_grad()
def measured(unet: nn.Module, inputs: dict[str, torch.Tensor]) -> list[tuple[str, int, int]]:
    """Of each step: whether it is full, its measured bytes, and what was kept before it."""
    found = []
    for t in torch.linspace(900, 20, STEPS):
        before = kept_bytes(unet)
        with watched() as bits:
            peak_bytes = fmecompile.measure(unet, timestep=t, **inputs).peak_bytes
        found.append((bits[0], peak_bytes, before))
    return found


@functools.cache
def needs(kind: str) -> tuple[dict[str, int], int]:
    """The least bytes of activations of both kinds of steps, and those of the value that is reused."""
    unet = pipelines.one_level_animatediff()
    measured(fmecompile.optimize(unet, reuse=POLICIES[kind], strict=True), unet_inputs())
    (reuse,) = reuse_of(unet)
    return {"0" if decision else "1": plan.floor_bytes for decision, plan in reuse.plans.items()}, reuse.kept_bytes


@pytest.mark.usefixtures("with_loops")
@pytest.mark.parametrize(
    "kind", [kind if kind == "forecast" else pytest.param(kind, marks=pytest.mark.slow) for kind in POLICIES]
)
def test_what_is_kept_counts_in_a_budget(unet: nn.Module, kind: str) -> None:
    """Allowed >= projected >= measured at every step; all that is held then is within the budget."""
    policy, inputs = POLICIES[kind], unet_inputs()
    floors, kept = needs(kind)
    budget = at_rest(unet, inputs) + max(floors.values()) + kept + ROUNDING_BYTES
    fmecompile.optimize(unet, reuse=policy, strict=True, memory_budget=budget)
    measured(unet, inputs)  # constants are made at first use
    steps = measured(unet, inputs)
    (reuse,) = reuse_of(unet)
    plans = {"0" if decision else "1": (plan, reuse.allowances[decision]) for decision, plan in reuse.plans.items()}
    assert {bit for bit, *_ in steps} == {"0", "1"}
    for bit, peak_bytes, before in steps:
        plan, allowance = plans[bit]
        assert peak_bytes <= plan.projected_peak_bytes <= plan.allowed_bytes == allowance.activation_bytes
        assert allowance.kept_bytes == (0 if bit == "1" and kind != "forecast" else kept)
        assert before <= max(allowance.kept_bytes, kept if bit == "1" else 0)
        assert allowance.taken_bytes + peak_bytes <= budget
    assert "kept for later steps" in str(fmecompile.explain(unet))


@pytest.mark.slow
@pytest.mark.usefixtures("with_loops")
@pytest.mark.parametrize("kind", ["residual", "forecast"])
def test_a_budget_without_room_for_it_is_refused_at_the_first_step(unet: nn.Module, kind: str) -> None:
    inputs = unet_inputs()
    floors, kept = needs(kind)
    budget = at_rest(unet, inputs) + max(floors.values()) + kept // 2
    fmecompile.optimize(unet, reuse=POLICIES[kind], memory_budget=budget)
    with mock.patch("fmecompile.backends.reusing.within_budget", side_effect=within_budget) as searched:
        for _ in range(2):
            with torch.no_grad(), pytest.raises(fmecompile.BudgetInfeasible, match="kept for later steps") as caught:
                unet(timestep=torch.linspace(900, 20, STEPS)[0], **inputs)
    assert searched.call_count == (2 if kind == "residual" else 1)  # a full step holds what a forecast needs
    fmecompile.optimize(unet, reuse=POLICIES[kind], strict=True, memory_budget=caught.value.floor_bytes)
    measured(unet, inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("with_loops")
@torch.no_grad()
def test_a_budget_counts_what_the_other_half_of_guidance_keeps(unet: nn.Module) -> None:
    one, other = unet_inputs(), unet_inputs()
    floors, kept = needs("feature")
    floor = at_rest(unet, one) + floors["1"] + ROUNDING_BYTES
    t = torch.linspace(900, 20, STEPS)[0]
    fmecompile.optimize(unet, reuse=EVERY_SECOND, memory_budget=floor + kept // 2)
    unet(timestep=t, **one)
    with pytest.raises(fmecompile.BudgetInfeasible, match="kept for later steps"):
        unet(timestep=t, **other)
    fmecompile.optimize(unet, reuse=EVERY_SECOND, strict=True, memory_budget=floor + kept)
    for t in torch.linspace(900, 20, STEPS):
        unet(timestep=t, **one)
        unet(timestep=t, **other)


def test_a_budget_of_a_whole_pipeline(plain: Any) -> None:
    fast = reusing(plain, memory_budget="64MiB")
    assert torch.equal(latents(fast), latents(reusing(plain)))
    (reuse,) = reuse_of(fast.unet)
    full, shallow = reuse.allowances.values()
    assert shallow.kept_bytes == reuse.kept_bytes > 0 == full.kept_bytes
    assert shallow.residents == full.residents != ()


# ---------------------------------------------------------------------------------------------------------- no waiting


@pytest.mark.parametrize("kind", POLICIES)
def test_nothing_waits_for_the_device(kind: str) -> None:
    """Fake tensors hold no numbers, so any look at one raises, the timestep's value included."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with pytest.raises(DataDependentOutputException):
            torch.linspace(900, 20, STEPS)[0].item()
        unet, inputs = pipelines.one_level_animatediff(), unet_inputs()
        fmecompile.optimize(unet, reuse=POLICIES[kind], strict=True)
        for _ in range(2):
            with watched() as bits:
                for t in torch.linspace(900, 20, STEPS):
                    unet(timestep=t, **inputs)
            assert len(bits) == STEPS and bits.count("1") == 3
    assert kept_bytes(unet) == 0
    assert len(reuse_of(unet)[0].plans) == 2
