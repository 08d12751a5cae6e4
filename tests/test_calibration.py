"""Calibration: what is recorded is what the model computes, the model is left as it was, policies made of it fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fmecompile
from fmecompile.analysis.cuts import Cuts
from fmecompile.backends.reusing import split
from fmecompile.capture.export import capture
from fmecompile.pipeline import Compilation, normalise
from fmecompile.reuse import Steps
from fmecompile.reuse.calibration import Calibration, Trace
from fmecompile.runtime.dispatch import find
from fmecompile.runtime.series import Series
from tests import pipelines
from tests.models import seeded, small_animatediff, small_svd, svd_call

STEPS = 6
CUTS = ("mid_block", "time_embedding", "last_up_temporal", ("down_blocks.0.attentions.0", "mid_block"))
POLICIES = (
    fmecompile.MagCache(ratios=(1.0,), cut="mid_block"),
    fmecompile.MagCache,
    fmecompile.SmoothCache,
    fmecompile.TeaCache(threshold=0.1, indicator="time_embedding"),
)


def inputs(seed: int = 1) -> Any:
    return svd_call(2, 3, 8, 8, torch.float64, seed)


def sampled(model: nn.Module, seed: int = 1, steps: int = STEPS) -> torch.Tensor:
    sample, _, *rest = inputs(seed)
    for t in torch.linspace(900, 20, steps):
        sample = sample - 0.1 * model(sample, t, *rest)[0].repeat(1, 1, 2, 1, 1)
    return sample


class Toy(nn.Module):
    """A denoiser that is compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """(N, 4, F, H, W), a number and (N, 8) -> (N, 4, F, H, W)."""
        h = self.inner(sample * (1 + timestep / 1000)) + states[:, :, None, None, None]
        return sample + self.outer(h.sin())


STATES = torch.ones(1, 8, dtype=torch.float64)


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    return seeded(Toy().double())


def walked(toy: nn.Module, steps: int = 4, seed: int = 0, states: tuple[torch.Tensor, ...] = (STATES,)) -> None:
    """Steps of a sampler, each with as many calls as there are ``states``."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, 4, 4, 32, 32, dtype=torch.float64, generator=generator)
    for t in torch.linspace(900, 20, steps):
        for state in states:
            sample = sample - 0.1 * toy(sample, t, state)


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    yield small_svd().double()


@pytest.fixture(scope="module")
def calibration(model: nn.Module) -> Calibration:
    return fmecompile.calibrate(model, lambda: sampled(model), policies=POLICIES, cuts=CUTS)


# ------------------------------------------------------------------------------------------------------ the figures


def figures(values: list[torch.Tensor], limit_bytes: int = 2**30) -> Trace:
    series = Series("here", limit_bytes)
    for step, value in enumerate(values):
        series.add(step, value)
    return series.trace()


def test_figures_by_hand() -> None:
    trace = figures([torch.tensor(v, dtype=torch.float64) for v in ([1, 1], [2, 2], [3, 0], [0, 0], [1, 1])])
    half = math.sqrt(0.5)
    assert trace.similarity[0] == pytest.approx((1, 1, half, 0, 1))
    assert trace.similarity[3] == (0, 0, 0, 1, 0)
    assert trace.errors[0] == pytest.approx((1 / 2, 1, 1e9, 1))
    assert trace.errors[1] == pytest.approx((1, 1e9, 3 / 2))
    assert trace.errors[2] == pytest.approx((1e9, 1))
    assert trace.moved == pytest.approx((0, 1, 3 / 4, 1, 1e9))
    assert trace.ratios == pytest.approx((1, 2, 3 / math.sqrt(8), 0, 1))


def test_tokens_have_the_channels_of_a_place() -> None:
    frames = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]]]])  # (N, C, H, W): norms 5 and 1
    assert figures([torch.ones(1, 2, 1, 2), frames]).ratios[1] == pytest.approx((5 + 1) / 2 / math.sqrt(2))
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])  # (N, T, C): the same
    assert figures([torch.ones(1, 2, 2), tokens]).ratios[1] == pytest.approx((5 + 1) / 2 / math.sqrt(2))


def test_a_second_value_of_a_step_takes_the_place_of_the_first() -> None:
    series = Series("here", 2**30)
    for step, value in [(0, 1.0), (0, 2.0), (1, 3.0), (1, 4.0)]:
        series.add(step, torch.tensor([value]))
    assert series.trace().moved == (0.0, 1.0)


@pytest.mark.parametrize("limit_bytes", [1, 2**18])
def test_sketches_keep_distances_within_their_error(limit_bytes: int) -> None:
    """Also of values of which a few entries are nearly everything, which a sample of entries would miss."""
    torch.manual_seed(0)
    start = torch.randn(300_000, dtype=torch.float64)
    start[::5000] *= 300
    values = [start + 0.1 * k * torch.randn_like(start) * start.abs() for k in range(5)]
    series = Series("here", limit_bytes)
    for step, value in enumerate(values):
        series.add(step, value)
    sketched, exact = series.trace(), figures(values)
    assert series.sketch_entries == max(limit_bytes // 4, 2**14)
    assert (sketched.errors, sketched.ratios) == (exact.errors, exact.ratios)
    error = math.sqrt(2 / series.sketch_entries)
    off = [
        abs(b - a) / (1 - a)
        for i, pair in enumerate(zip(exact.similarity, sketched.similarity, strict=True))
        for j, (a, b) in enumerate(zip(*pair, strict=True))
        if i != j
    ]
    assert 0 < max(off) < 5 * error


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(fmecompile.OptionError, match=r"here has values at step 1 that are not finite"):
        figures([torch.ones(2), torch.tensor([1.0, math.inf])])


# --------------------------------------------------------------------------------------------------- what is recorded


def hooked(model: nn.Module, path: str, run: Callable[[], Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a module was called with and what it returned, eagerly, at every step."""
    given: list[torch.Tensor] = []
    returned: list[torch.Tensor] = []

    def hook(_: Any, args: Any, kwargs: Any, result: Any) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])
        returned.append(result[0] if isinstance(result, tuple) else result)

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return given, returned


def assert_alike(got: Trace, want: Trace) -> None:
    for name in ("similarity", "errors"):
        for one, other in zip(getattr(got, name), getattr(want, name), strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    assert got.moved == pytest.approx(want.moved, rel=1e-6)
    assert got.ratios == pytest.approx(want.ratios, rel=1e-6)


@pytest.mark.parametrize(
    "cut", [pytest.param("mid_block", marks=pytest.mark.slow), "time_embedding", "last_up_temporal"]
)
def test_records_are_of_what_the_module_computes(model: nn.Module, calibration: Calibration, cut: str) -> None:
    record = calibration.record(cut)
    _, returned = hooked(model, record.modules[0], lambda: sampled(model))
    assert len(returned) == STEPS and record.sketch_entries == 0
    assert_alike(record.trace, figures(returned))
    assert record.nbytes == returned[0].nbytes


def test_residuals_are_out_minus_in(model: nn.Module, calibration: Calibration) -> None:
    given, returned = hooked(model, "mid_block", lambda: sampled(model))
    residuals = [out - into for into, out in zip(given, returned, strict=True)]
    assert_alike(calibration.record("mid_block", "residual").trace, figures(residuals))


def test_several_values_count_as_their_mean(model: nn.Module, calibration: Calibration) -> None:
    record = calibration.record(CUTS[3])
    values = [hooked(model, path, lambda: sampled(model))[1] for path in CUTS[3]]
    means = [sum(figures(value).moved[i] for value in values) / 2 for i in range(STEPS)]
    assert record.trace.moved == pytest.approx(means, rel=1e-6)
    assert record.nbytes == sum(value[0].nbytes for value in values)


def test_what_reuse_saves_is_recorded(model: nn.Module, calibration: Calibration) -> None:
    compilation = Compilation(capture(model, inputs(), {}))
    normalise(compilation)
    split(compilation, [2, 3])
    cuts = Cuts(compilation.program)
    assert calibration.record("last_up_temporal").saved == pytest.approx(cuts.last_up_temporal().saved)
    parts = [cuts.results_of(path)[0].saved for path in CUTS[3]]
    assert max(parts) < calibration.record(CUTS[3]).saved < 1


def test_the_output_is_recorded_and_the_key_says_of_what(model: nn.Module, calibration: Calibration) -> None:
    outputs: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _, args, result: outputs.append(result[0]))
    with torch.no_grad():
        sampled(model)
    handle.remove()
    assert_alike(calibration.record("output").trace, figures(outputs))
    key = calibration.key
    assert (key.model, key.sampler, key.steps) == ("UNetSpatioTemporalConditionModel", "", STEPS)
    assert (key.shape, key.dtype) == (tuple(inputs()[0].shape), "float64")


def test_branches_of_guidance_have_traces_of_their_own(toy: nn.Module) -> None:
    both = (STATES, STATES + 1)
    record = fmecompile.calibrate(toy, lambda: walked(toy, states=both), cuts=["inner"]).record()
    _, returned = hooked(toy, "inner", lambda: walked(toy, states=both))
    _, outputs = hooked(toy, "outer", lambda: walked(toy, states=both))
    assert len(record.branches) == 2
    assert_alike(record.branches[0], figures(returned[::2]))
    output = fmecompile.calibrate(toy, lambda: walked(toy, states=both), cuts=["outer"]).record()
    assert output.branches[0] != output.branches[1]
    for branch in range(2):
        assert_alike(output.branches[branch], figures(outputs[branch::2]))


def test_a_sampler_may_change_outputs_in_place(toy: nn.Module) -> None:
    outputs: list[torch.Tensor] = []

    def run() -> None:
        for t in torch.linspace(900, 20, 4):
            output = toy(torch.ones(1, 4, 4, 32, 32, dtype=torch.float64), t, STATES)
            outputs.append(output.clone())
            output.mul_(t)

    assert_alike(fmecompile.calibrate(toy, run, cuts=["inner"]).record("output").trace, figures(outputs))


def test_of_several_prompts_the_mean_is_taken(toy: nn.Module) -> None:
    runs = [lambda: walked(toy, seed=1), lambda: walked(toy, seed=2)]
    one, other, both = (fmecompile.calibrate(toy, run, cuts=["inner"]).similarity() for run in (*runs, runs))
    assert one != other
    assert both[0] == pytest.approx([(a + b) / 2 for a, b in zip(one[0], other[0], strict=True)], rel=1e-9)


def test_where_values_are_too_large_to_keep_the_error_is_said(toy: nn.Module) -> None:
    exact = fmecompile.calibrate(toy, lambda: walked(toy), cuts=["inner"]).record()
    record = fmecompile.calibrate(toy, lambda: walked(toy), cuts=["inner"], limit_bytes=1).record()
    assert (exact.sketch_entries, exact.similarity_error) == (0, 0.0)
    assert record.sketch_entries == 2**14 and record.similarity_error == pytest.approx(0.01105, rel=1e-3)
    assert record.trace.errors == exact.trace.errors
    far, near = 1 - exact.trace.similarity[0][-1], 1 - record.trace.similarity[0][-1]
    assert 0 < abs(near / far - 1) < 5 * record.similarity_error


# ------------------------------------------------------------------------------------------------- as it was afterwards


def test_a_pipeline_is_calibrated_and_left_as_it_was() -> None:
    pipe = pipelines.svd()
    plain = pipelines.frames(pipe, num_inference_steps=3)
    before = pipelines.state(pipe)
    arguments = pipelines.CALLS[type(pipe)]() | {"num_inference_steps": 3, "generator": torch.Generator()}
    found = fmecompile.calibrate(pipe, arguments, cuts=["last_up_temporal"])
    assert not pipelines.changes(before, pipelines.state(pipe))
    assert "forward" not in vars(pipe.unet)
    assert (found.key.sampler, found.key.steps) == ("EulerDiscreteScheduler", 3)
    assert found.matches(pipe.unet) and found.matches(pipe.unet, 3) and not found.matches(pipe.unet, 4)
    policy = fmecompile.StepRehash.from_calibration(found, full_steps=2)
    fmecompile.optimize(pipe, reuse=policy, strict=True)
    assert pipelines.frames(pipe, num_inference_steps=3).shape == plain.shape
    assert len(fmecompile.explain(pipe.unet).records[0].reuse.plans) == 2


@pytest.mark.slow
def test_what_was_optimized_stays_optimized() -> None:
    model = small_svd().double()
    fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=2), memory_budget="64MiB", strict=True)
    with torch.no_grad():
        want = sampled(model, steps=4)
    dispatcher, record = find(model), fmecompile.explain(model).records[0]
    fmecompile.calibrate(model, lambda: sampled(model, steps=4))
    with pytest.raises(ZeroDivisionError):
        fmecompile.calibrate(model, lambda: [sampled(model, steps=2), 1 / 0])
    assert find(model) is dispatcher
    with torch.no_grad():
        assert torch.equal(sampled(model, steps=4), want)
    assert fmecompile.explain(model).records[0] is record, "it was compiled again"


def test_an_exception_leaves_a_plain_module_plain(model: nn.Module) -> None:
    before = dict(vars(model))
    with pytest.raises(fmecompile.OptionError, match=r"near it are .*mid_block"):
        fmecompile.calibrate(model, lambda: sampled(model), cuts=["mid_blok"])
    assert dict(vars(model)) == before and not fmecompile.is_optimized(model)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda toy: lambda: None, "was not called"),
        (lambda toy: lambda: walked(toy, 1), r"(?s)of 1 steps.*generation\(steps"),
        (lambda toy: [lambda: walked(toy, 2), lambda: walked(toy, 3)], "of 2, 3 steps"),
        (lambda toy: [lambda: walked(toy), lambda: walked(toy, states=(STATES, STATES + 1))], "with and without"),
        (lambda toy: lambda: [walked(toy), toy(torch.ones(1, 4, 2, 4, 4).double(), 1, STATES)], "inputs of 2 kinds"),
        (lambda toy: [], "inputs are empty"),
        (lambda toy: {"prompt": "a"}, "cannot be run"),
    ],
)
def test_runs_that_tell_nothing_are_refused(toy: nn.Module, run: Any, words: str) -> None:
    with pytest.raises(fmecompile.OptionError, match=words):
        fmecompile.calibrate(toy, run(toy), cuts=["inner"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cuts": "mid_block"}, "is one name"),
        ({"policies": ["fast"]}, "is no policy"),
        ({"limit_bytes": 0}, "limit_bytes"),
    ],
)
def test_options_are_checked_before_anything_runs(model: nn.Module, options: Any, words: str) -> None:
    with pytest.raises(fmecompile.OptionError, match=words):
        fmecompile.calibrate(model, lambda: pytest.fail("it ran"), **options)


def test_a_target_without_one_denoiser_is_refused() -> None:
    with pytest.raises(fmecompile.TargetError, match="not int"):
        fmecompile.calibrate(3, lambda: None)
    pipe = pipelines.svd()
    pipe.transformer = small_svd()
    with pytest.raises(fmecompile.TargetError, match=r"has 2 denoisers \(unet, transformer\)"):
        fmecompile.calibrate(pipe, {})


# -------------------------------------------------------------------------------------------- on the model it is of


def test_another_model_is_refused_before_step_0(calibration: Calibration) -> None:
    policy = fmecompile.StepRehash.from_calibration(calibration, full_steps=3, cut="mid_block")
    for other, words in [
        (small_svd(layers=2), "UNetSpatioTemporalConditionModel with another configuration"),
        (small_animatediff(), "of a UNetSpatioTemporalConditionModel, and this is a UNetMotionModel"),
    ]:
        fmecompile.optimize(other, reuse=policy, strict=True)
        with torch.no_grad(), pytest.raises(fmecompile.CalibrationMismatch, match=words):
            other(*svd_call(1, 3, 8, 8, torch.float32))


POLICIES_MADE = {
    "StepRehash": lambda c: fmecompile.StepRehash.from_calibration(c, full_steps=3, cut="last_up_temporal"),
    "SmoothCache": lambda c: fmecompile.SmoothCache.from_calibration(c, alpha=0.3),
    "MagCache": lambda c: fmecompile.MagCache.from_calibration(c, threshold=0.5),
    "TeaCache": lambda c: fmecompile.TeaCache.from_calibration(c, threshold=2.0),
}


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(made, id=name, marks=[pytest.mark.slow] * (name != "StepRehash"))
        for name, made in POLICIES_MADE.items()
    ],
)
def test_a_policy_of_a_calibration_runs_as_it_was_decided(
    model: nn.Module, calibration: Calibration, made: Callable[[Calibration], Any]
) -> None:
    """In another object of the same model; refused with another number of steps, at the first of them."""
    policy = made(calibration)
    twin = copy.deepcopy(model)
    fmecompile.optimize(twin, reuse=policy, strict=True)
    with torch.no_grad():
        got, exact = sampled(twin), sampled(model)
        with pytest.raises(fmecompile.CalibrationMismatch, match=f"of {STEPS} steps, the run has 4"):
            sampled(twin, steps=4)
    assert 0 < (got - exact).norm() / exact.norm() < 0.2
    ran = [step.decision for step in next(iter(fmecompile.explain(twin).records[0].reuse.runs))]
    assert ran == list(policy.plan(Steps(STEPS))) and not ran[0]
    assert any(ran)
