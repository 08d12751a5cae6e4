"""Calibration: what is recorded is what the model computes, the model is left as it was, policies made of it fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fmecompile
from fmecompile.analysis.cuts import Cuts
from fmecompile.capture.export import capture
from fmecompile.pipeline import Compilation, normalise
from fmecompile.reuse import REUSE, Steps, to_bits
from fmecompile.reuse.calibration import Calibration, CalibrationKey, CutRecord, Trace
from fmecompile.reuse.step_rehash import full_steps_for
from fmecompile.runtime.dispatch import find
from fmecompile.runtime.series import Series
from tests import pipelines
from tests.models import seeded, small_animatediff, small_svd, svd_call

STEPS = 6
CUTS = ("mid_block", "time_embedding", "last_up_temporal", ("up_blocks.0", "up_blocks.1"))
MIDDLE = fmecompile.MagCache(ratios=(1.0,), cut="mid_block")


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
    return fmecompile.calibrate(model, lambda: sampled(model), policies=[MIDDLE, fmecompile.SmoothCache], cuts=CUTS)


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


@pytest.mark.parametrize("cut", ["mid_block", "time_embedding", "last_up_temporal"])
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
    cuts = Cuts(compilation.program)
    assert calibration.record("last_up_temporal").saved == pytest.approx(cuts.last_up_temporal().saved)
    parts = [cuts.results_of(path)[0].saved for path in CUTS[3]]
    assert max(parts) - 1e-9 <= calibration.record(CUTS[3]).saved <= sum(parts) + 1e-9


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


# ------------------------------------------------------------------------------------------------- policies made of it


def falling(count: int = 25, saved: float = 0.75, rate: float = 0.012) -> Calibration:
    """Similarities that fall with distance, faster late."""
    way = [step + 0.03 * step**2 for step in range(count)]
    matrix = tuple(tuple(1 - rate * abs(one - other) for other in way) for one in way)
    errors = tuple(tuple(0.05 * lag * (1 + (i > 15)) for i in range(count - lag)) for lag in (1, 2, 3))
    moved = (0.0, *(0.04 for _ in range(count - 1)))
    trace = Trace(matrix, errors, moved, (1.0, *(0.99 for _ in range(count - 1))))
    records = [
        CutRecord("last_up_temporal", "feature", ("up",), 2**20, saved, 0, (trace,)),
        CutRecord("block_stack", "residual", ("up",), 2**20, saved, 0, (trace, trace)),
        CutRecord("temporal_attention", "feature", ("a", "b"), 2**20, 0.1, 0, (trace,)),
        CutRecord("time_embedding", "feature", ("t",), 2**10, 0.0, 0, (trace,)),
    ]
    return Calibration(CalibrationKey("Model", "0" * 16, "Sampler", count, (1, 4, 3, 8, 8), "float32"), tuple(records))


@pytest.mark.parametrize("full_steps", [2, 7, 13, 25])
def test_step_rehash_has_the_full_steps_asked_for(full_steps: int) -> None:
    policy = fmecompile.StepRehash.from_calibration(falling(), full_steps=full_steps)
    assert to_bits(policy.plan(Steps(25))).count("1") == full_steps


@pytest.mark.parametrize("speedup", [1.0, 1.2, 1.8, 2.5, 3.0])
def test_step_rehash_meets_a_speedup_with_the_most_full_steps(speedup: float) -> None:
    def reached(full: int) -> float:
        return 25 / (full + (25 - full) * 0.25)

    full = full_steps_for(speedup, 25, 0.75)
    assert reached(full) >= speedup - 1e-9 and (full == 25 or reached(full + 1) < speedup)
    plan = fmecompile.StepRehash.from_calibration(falling(), speedup=speedup).plan(Steps(25))
    assert reached(to_bits(plan).count("1")) >= speedup - 1e-9


@pytest.mark.parametrize("max_error", [0.0, 0.03, 0.1, 2.0])
def test_step_rehash_stays_within_an_error(max_error: float) -> None:
    calibration = falling()
    plan = fmecompile.StepRehash.from_calibration(calibration, max_error=max_error).plan(Steps(25))
    matrix, anchor, errors = calibration.similarity("last_up_temporal"), 0, [0.0]
    for step, decision in enumerate(plan):
        anchor = anchor if decision == REUSE else step
        errors.append(1 - matrix[step][anchor])
    assert max(errors) <= max_error + 1e-9
    assert (to_bits(plan).count("1") == 25) == (max_error == 0)


def test_a_speedup_out_of_reach_is_refused_with_the_best() -> None:
    with pytest.raises(fmecompile.OptionError, match=r"speedup=4 is out of reach.* it is 3\.23"):
        fmecompile.StepRehash.from_calibration(falling(), speedup=4)


def test_exactly_one_option_decides() -> None:
    for options in ({}, {"full_steps": 3, "speedup": 2.0}):
        with pytest.raises(fmecompile.OptionError, match="decides"):
            fmecompile.StepRehash.from_calibration(falling(), **options)


def test_other_policies_take_their_rows() -> None:
    calibration = falling()
    smooth = fmecompile.SmoothCache.from_calibration(calibration, alpha=0.1)
    assert set(smooth.errors) == {"temporal_attention"}
    assert to_bits(smooth.plan(Steps(25)), "temporal_attention") == "1001001001001001001010101"
    mag = fmecompile.MagCache.from_calibration(calibration, threshold=0.05)
    assert mag.ratios == calibration.record("block_stack", "residual").trace.ratios
    assert to_bits(mag.plan(Steps(25))) == "1111100100100100100100100"
    tea = fmecompile.TeaCache.from_calibration(calibration, threshold=0.1)
    assert tea.kind == "static" and to_bits(tea.plan(Steps(25))) == "1" + "001" * 7 + "001"


@pytest.mark.parametrize(
    "made",
    [
        lambda c: fmecompile.StepRehash.from_calibration(c, full_steps=3, cut="mid_block"),
        lambda c: fmecompile.SmoothCache.from_calibration(c, alpha=0.1, components=["mid_block"]),
        lambda c: fmecompile.MagCache.from_calibration(c, cut="mid_block"),
        lambda c: fmecompile.TeaCache.from_calibration(c, threshold=0.1, indicator="mid_block"),
    ],
)
def test_a_cut_that_was_not_calibrated_is_refused(made: Callable[[Calibration], Any]) -> None:
    with pytest.raises(fmecompile.OptionError, match=r"mid_block was recorded\n  next: name one of last_up_temporal"):
        made(falling())


@pytest.mark.parametrize(
    "policy",
    [
        fmecompile.StepRehash.from_calibration(falling(), full_steps=13),
        fmecompile.SmoothCache.from_calibration(falling(), alpha=0.1),
        fmecompile.MagCache.from_calibration(falling()),
        fmecompile.TeaCache.from_calibration(falling(), threshold=0.1),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_another_number_of_steps_is_refused(policy: Any) -> None:
    assert len(policy.plan(Steps(25))) == 25
    with pytest.raises(fmecompile.CalibrationMismatch, match="is of 25 steps, the run has 30"):
        policy.plan(Steps(30))


def test_another_model_is_refused_before_step_0(calibration: Calibration) -> None:
    policy = fmecompile.StepRehash.from_calibration(calibration, full_steps=3, cut="mid_block")
    for other, words in [
        (small_svd(layers=2), "UNetSpatioTemporalConditionModel with another configuration"),
        (small_animatediff(), "of a UNetSpatioTemporalConditionModel, and this is a UNetMotionModel"),
    ]:
        fmecompile.optimize(other, reuse=policy, strict=True)
        with torch.no_grad(), pytest.raises(fmecompile.CalibrationMismatch, match=words):
            other(*svd_call(1, 3, 8, 8, torch.float32))


def test_a_policy_of_a_calibration_runs_as_it_was_decided(model: nn.Module, calibration: Calibration) -> None:
    """In another object of the same model; refused with another number of steps, at the first of them."""
    policy = fmecompile.StepRehash.from_calibration(calibration, full_steps=3)
    twin = copy.deepcopy(model)
    fmecompile.optimize(twin, reuse=policy, strict=True)
    with torch.no_grad():
        got, exact = sampled(twin), sampled(model)
        with pytest.raises(fmecompile.CalibrationMismatch, match=f"of {STEPS} steps, the run has 4"):
            sampled(twin, steps=4)
    assert 0 < (got - exact).norm() / exact.norm() < 0.2
    bits = to_bits(policy.plan(Steps(STEPS)))
    assert bits[0] == bits[-1] == "1" and 2 <= bits.count("1") <= 3


# ------------------------------------------------------------------------------------------------------- files and page


def test_a_file_brings_back_the_same(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "found.json")
    again = Calibration.load(tmp_path / "found.json")
    assert again == calibration
    assert again.key.differences(calibration.key) == ()
    other = dataclasses.replace(calibration.key, steps=9, sampler="DDIMScheduler")
    assert calibration.key.differences(other) == (f"steps: {STEPS}, not 9",)
    assert again.similarity("mid_block", branch=0) == calibration.similarity("mid_block")


def damaged(path: tuple[Any, ...], value: Any) -> str:
    data = json.loads(falling(5).to_json())
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(data)


TRACE = ("records", 0, "branches", 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\x00",
        damaged(("format",), 99),
        damaged(("key",), ...),
        damaged(("key", "steps"), "5"),
        damaged(("key", "steps"), 6),
        damaged(("key", "model"), None),
        damaged(("key", "shape"), 3),
        damaged(("more",), 1),
        damaged(("records",), None),
        damaged(("records", 0, "mode"), "forecast"),
        damaged(("records", 0, "branches"), []),
        damaged(("records", 0, "saved"), 1.5),
        damaged((*TRACE, "similarity"), [[1.0]]),
        damaged((*TRACE, "similarity", 2, 3), 1.5),
        damaged((*TRACE, "similarity", 2, 3), "x"),
        damaged((*TRACE, "errors", 1), [0.1]),
        damaged((*TRACE, "moved"), None),
        damaged((*TRACE, "ratios", 1), float("nan")),
    ],
)
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(fmecompile.CalibrationMismatch, match=r"(?s)calibration.*bad\.json.*next: make it again"):
        Calibration.load(tmp_path / "bad.json")


def test_the_page_has_a_cell_for_every_pair(calibration: Calibration, tmp_path: Path) -> None:
    hostile = dataclasses.replace(calibration.records[0], cut="</svg><script>alert(1)</script>")
    shown = dataclasses.replace(calibration, records=(*calibration.records, hostile))
    shown.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    cells = [e for e in ElementTree.fromstring(page).iter() if e.get("class") == "cell"]
    assert len(cells) == len(shown.records) * STEPS**2
    assert all(0.04 <= float(cell.get("fill-opacity", "0")) <= 1 for cell in cells)
    assert f"steps 0 and 1: {calibration.records[0].trace.similarity[0][1]:.4f}" in page
    assert "<script" not in page and "http" not in page
