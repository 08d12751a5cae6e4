"""Policies on graphs: names of cuts and probes, heads and tails of steps, every policy in a sampler's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fmecompile
from fmecompile import reuse
from fmecompile.analysis.cuts import Cuts
from fmecompile.analysis.probes import Probes
from fmecompile.backends.choice import Choice
from fmecompile.graph.program import Kept, compute_nodes
from fmecompile.operators.contraction import all_products
from fmecompile.pipeline import Compilation, finish, lower
from fmecompile.reuse import FULL, REUSE, Broadcast
from fmecompile.reuse.policy import FeedbackPolicy, ProbePolicy
from fmecompile.runtime.change import Frames, changes, motion
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.guidance import Gap, gap_bytes
from fmecompile.runtime.reusing import HEAD, Taken
from tests.models import animatediff_call, small_animatediff, small_svd, svd_call
from tests.test_step_reuse import MODELS, compiler, normalised, record, sampled

STEPS = 6
BUILDS = {"svd": (small_svd, svd_call), "animatediff": (small_animatediff, animatediff_call)}


@pytest.fixture(scope="module", params=list(BUILDS))
def denoiser(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Compilation]:
    build, call = BUILDS[request.param]
    model, inputs = build().double(), call(1, 3, 8, 8, torch.float64)
    return model, inputs, normalised(model, inputs)


# ------------------------------------------------------------------------------------------------------------ the names


@pytest.mark.parametrize(
    ("build", "call", "paths"),
    [
        pytest.param(
            small_svd,
            svd_call,
            "down_blocks.0.resnets.0 down_blocks.0.attentions.0 down_blocks.0.downsamplers.0 down_blocks.1 mid_block "
            "up_blocks.0.resnets.0 up_blocks.0.resnets.1 up_blocks.0.upsamplers.0 up_blocks.1.resnets.0 "
            "up_blocks.1.attentions.0 up_blocks.1.resnets.1 up_blocks.1.attentions.1",
            id="svd",
        ),
    ],
)
def test_blocks_are_found_by_what_they_take_and_return(
    build: Callable[[], nn.Module], call: Callable[..., Any], paths: str
) -> None:
    cuts = Cuts(normalised(build(), call(1, 3, 8, 8, torch.float32)).program)
    assert [block.path for block in cuts.blocks] == paths.split()
    for before, after in pairwise(cuts.blocks):
        assert before.returns == after.takes or "cat" in after.takes[0].name


def test_a_stack_is_a_residual_that_this_steps_input_enters(denoiser: tuple[nn.Module, Any, Compilation]) -> None:
    """In feature mode a step would repeat the last one; as a residual it computes next to nothing."""
    cuts = Cuts(denoiser[2].program)
    for name, least in (("block_stack", 0.98), ("block_stack:1:0", 0.9), ("block_stack:1:1", 0.75)):
        with pytest.raises(fmecompile.OptionError, match="would repeat the last one"):
            cuts.named(name)
        (value,) = cuts.named(name, "residual")
        assert value.source is not None and value.saved > least
        assert set(cuts.clips) & cuts.alive({value.value: value.source})
    assert cuts.named("block_stack:3:3")[0].source is None  # skip connections let the clip in


def test_block_residuals_leave_little_to_compute(denoiser: tuple[nn.Module, Any, Compilation]) -> None:
    cuts = Cuts(denoiser[2].program)
    found = cuts.named("block_residuals")
    assert {path for value in found for path in [value.module]} <= {block.path for block in cuts.blocks}
    running = cuts.running({value.value: None for value in found})
    assert sum(map(all_products, running)) < 0.25 * cuts.work
    assert set(cuts.clips) & cuts.alive({value.value: None for value in found})


def test_probes_are_cheap(denoiser: tuple[nn.Module, Any, Compilation]) -> None:
    cuts = Cuts(denoiser[2].program)
    probes = Probes(cuts)
    shares = {}
    for name in ("time_embedding", "modulated_input", "head_residual:1", "head_residual:2"):
        (value,) = probes.named(name)
        shares[name] = sum(all_products(n) for n in probes.head([value]) if n.op == "call_function") / cuts.work
        assert (value.source is not None) == name.startswith("head")
    assert list(shares.values()) == sorted(shares.values()) and shares["head_residual:2"] < 0.3
    assert "norm1" in probes.named("modulated_input")[0].module
    assert probes.named("time_embedding")[0].nbytes == 128 * 8  # one row


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("block_stak", "near it are block_stack"),
        ("block_stack:one", "whole numbers"),
        ("block_stack:9:9", "blocks, and the cut needs"),
        ("temporal_atention", "near it are temporal_attention"),
    ],
)
def test_names_that_mean_nothing_are_refused(
    denoiser: tuple[nn.Module, Any, Compilation], name: str, words: str
) -> None:
    cuts = Cuts(denoiser[2].program)
    for named in (cuts.named, Probes(cuts).named):
        with pytest.raises(fmecompile.OptionError, match=words):
            named(name)


# ------------------------------------------------------------------------------------------------------ heads and tails

HEADED = [
    pytest.param(reuse.FirstBlockCache(), id="first-block"),
    pytest.param(reuse.DBCache(head_blocks=3, tail_blocks=2), id="db"),
    pytest.param(reuse.TeaCache(threshold=1.0), id="tea"),
    pytest.param(reuse.TeaCache(threshold=1.0, cut="attention", mode="feature"), id="tea-attention"),
]


def _made(model: nn.Module, compilation: Compilation, choice: Choice, decision: Any, loops: bool) -> Executable:
    program = compilation.program.copy()
    choice.rewrite(program, decision, compilation.facts)
    made = Compilation(program, compilation.facts)
    return Executable(lower(made)[0] if loops else finish(made), model)


@pytest.mark.parametrize("policy", HEADED)
def test_a_head_and_its_tail_are_the_whole_step(
    denoiser: tuple[nn.Module, Any, Compilation], policy: ProbePolicy
) -> None:
    """Bitwise; and no work is done twice."""
    model, inputs, compilation = denoiser
    leaves = tree_leaves(inputs)
    choice = Choice.of(policy, compilation.program, compilation.facts)
    want = Executable(finish(Compilation(compilation.program.copy(), compilation.facts)), model)(leaves)[0]
    head, full, shallow = (_made(model, compilation, choice, d, False) for d in (HEAD, FULL, REUSE))
    nothing, crossing = head.run(leaves)
    operands = {(name, 0): value for name, value in crossing.items()}
    result, kept = full.run(leaves, operands)
    again, _ = shallow.run(leaves, {**operands, **{(name, 0): value for name, value in kept.items()}})
    assert nothing == () and torch.equal(result[0], want)
    if policy.mode == "residual":
        assert torch.allclose(again[0], want, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(again[0], want)
    for made in (full, shallow):
        assert made.takes - {cut.name for cut in choice.cuts} <= set(choice.crossing_bytes)
    stated = {name: value.untyped_storage().nbytes() for name, value in crossing.items()}
    assert {name: stated[name] for name in choice.crossing_bytes} == choice.crossing_bytes
    assert sum(stated[cut.name] for cut in choice.probes) == choice.watched_bytes


@pytest.mark.parametrize("policy", HEADED[1:2])
def test_no_work_is_wasted(denoiser: tuple[nn.Module, Any, Compilation], policy: ProbePolicy) -> None:
    _, _, compilation = denoiser
    choice = Choice.of(policy, compilation.program, compilation.facts)
    work = {}
    for decision in (HEAD, FULL, REUSE):
        program = compilation.program.copy()
        choice.rewrite(program, decision, compilation.facts)
        work[decision] = sum(map(all_products, compute_nodes(program.graph)))
        assert all(isinstance(b, Kept) or decision != REUSE or "mid_block" not in str(b) for b in program.bindings)
    whole = sum(map(all_products, compute_nodes(compilation.program.graph)))
    assert work[HEAD] + work[FULL] == whole and work[HEAD] + work[REUSE] < 0.5 * whole


# ----------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("part", [1, 2**22])
def test_changes_are_relative_and_of_the_tokens_that_changed(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmecompile.runtime.change.PART", part)
    then = torch.ones(2, 4, 3, 3, dtype=torch.float64)
    now = then.clone()
    now[:, :, 0, 0] = 1.9
    assert float(changes([now], [then])) == pytest.approx(0.1)
    assert float(changes([now], [then], 0.5)) == pytest.approx(0.9)
    assert float(changes([now], [then], 2.0)) == pytest.approx(0.1)  # none changed so much: all count
    assert float(changes([now, then], [then, then])) == pytest.approx(0.05)
    assert float(changes([now.half()], [then.half()])) == pytest.approx(0.1, rel=1e-3)


def test_motion_is_along_frames() -> None:
    still, moving = torch.ones(2 * 3 * 5, 4), torch.arange(3.0).repeat_interleave(5).repeat(2)[:, None].expand(30, 4)
    frames = Frames(0, 2, 3, 5)
    assert float(motion([still], [frames])) == 0
    assert float(motion([moving], [frames])) == pytest.approx((1 + 1) / (1 + 0 + 2 + 1))
    assert not torch.isfinite(motion([still], [Frames(0, 6, 1, 5)]))


# ---------------------------------------------------------------------------------------------------- a sampler's steps


def _errors(scale: float) -> dict[int, tuple[float, ...]]:
    return {lag: tuple(scale * lag for _ in range(STEPS - lag)) for lag in (1, 2, 3)}


ALWAYS = (0.0, 1000.0)
POLICIES = {
    "first-block": reuse.FirstBlockCache(threshold=0.3),
    "db": reuse.DBCache(head_blocks=3, tail_blocks=2, warm_up_steps=1, threshold=0.3, token_threshold=0.01),
    "tea": reuse.TeaCache(threshold=0.2),
    "tea-forecast": reuse.TeaCache(threshold=1.5, indicator="time_embedding", cut="auto", mode="forecast"),
    "ada": reuse.AdaCache(codebook=((0.3, 2), (1.0, 1))),
    "ada-moreg": reuse.AdaCache(codebook=((0.5, 3), (1.0, 2)), moreg=True),
    "mag": reuse.MagCache(ratios=(1.0,) * STEPS),
    "taylor": reuse.TaylorSeer(interval=2, before=2),
    "faster": reuse.FasterCache(guidance=False, attention_after=2),
    "pyramid": reuse.PyramidAttention(
        scale="progress", spatial=Broadcast(2, ALWAYS), temporal=Broadcast(3, ALWAYS), cross=Broadcast(4, ALWAYS)
    ),
    "smooth": reuse.SmoothCache(
        alpha=0.02, errors={"spatial_attention": _errors(0.01), "block_residuals": _errors(0.015)}
    ),
}


def own_decisions(policy: Any, taken: list[Taken]) -> list[Any]:
    """What the policy says by itself to the changes that were measured."""
    steps = reuse.Steps(STEPS)
    if policy.kind == "static":
        return list(policy.plan(steps))
    run, decisions = policy.start(steps), []
    for told in taken:
        if policy.kind == "probe":
            decisions.append(run.decide(told.step, told.change))
            continue
        decisions.append(run.decide(told.step))
        if decisions[-1] == FULL:
            run.observe(told.step, told.change, told.motion)
    return decisions


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("ada-moreg", "tea-forecast") else ()) for name in POLICIES],
)
@pytest.mark.parametrize(
    ("build", "call"), [pytest.param(*MODELS[0].values, id="svd", marks=pytest.mark.slow), MODELS[1]]
)
def test_every_policy_runs(build: Callable[[], nn.Module], call: Callable[..., Any], name: str) -> None:
    """Its decisions are carried out, some steps reuse, one program is made per kind of step, and nothing is left."""
    policy, model, inputs = POLICIES[name], build().double(), call(1, 3, 8, 8, torch.float64)
    if isinstance(policy, reuse.PyramidAttention) and build is small_svd:
        policy = replace(policy, cross=None)  # over one key: no attention
    with torch.no_grad():
        exact = sampled(model, inputs, STEPS)
        fmecompile.optimize(model, reuse=policy, strict=True)
        first = sampled(model, inputs, STEPS)
        kept = record(model)
        taken = kept.runs[-1]
        assert torch.equal(sampled(model, inputs, STEPS), first)
    decisions = [told.decision for told in taken]
    assert decisions == own_decisions(policy, taken) and len(decisions) == STEPS
    assert decisions[0] == FULL and any(decisions)
    assert 0 < (first - exact).norm() / exact.norm() < 0.3
    assert compiler(model).timeline.kept_bytes() == 0
    assert set(kept.plans) == {*decisions, *([HEAD] if policy.kind == "probe" else [])}
    assert kept.runs[0] == kept.runs[1]
    full = f"latest run, 1 for a full step: {reuse.to_bits(decisions)}, {decisions.count(FULL)} of {STEPS}"
    changes = [told.change for told in taken if told.change is not None]
    told = f"; changes from {min(changes):.3g} to {max(changes):.3g} were measured" if changes else "\n"
    assert bool(changes) == (policy.kind != "static") and full + told in f"{fmecompile.explain(model)}\n"


NEVER = {
    "first-block": reuse.FirstBlockCache(threshold=0.0),
    "db": reuse.DBCache(head_blocks=3, tail_blocks=2, warm_up_steps=1, threshold=0.0),
    "tea": reuse.TeaCache(threshold=0.0),
    "ada": reuse.AdaCache(codebook=((1.0, 1),)),
    "mag": reuse.MagCache(ratios=(1.0, *(1.1,) * (STEPS - 1)), threshold=0.0),
    "smooth": reuse.SmoothCache(alpha=0.0, errors={"attention": _errors(0.01)}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("tea", "mag", "db") else ()) for name in NEVER]
)
def test_what_never_reuses_is_exact(name: str) -> None:
    model, inputs = small_animatediff().double(), animatediff_call(1, 3, 8, 8, torch.float64)
    with torch.no_grad():
        exact = sampled(model, inputs, STEPS)
        fmecompile.optimize(model, reuse=NEVER[name], strict=True)
        got = sampled(model, inputs, STEPS)
    assert not any(told.decision for told in record(model).runs[-1])
    assert (got - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("name", ["first-block", pytest.param("ada", marks=pytest.mark.slow)])
def test_what_is_measured_is_what_eager_modules_return(name: str) -> None:
    """The changes of a run without reuse, against hooks."""
    model, inputs = small_svd().double(), svd_call(1, 3, 8, 8, torch.float64)
    policy: Any = NEVER[name]
    seen: list[torch.Tensor] = []
    paths = Probes(Cuts(normalised(model, inputs).program)).named(policy.probe)[0]
    is_residual = isinstance(policy, ProbePolicy) and not isinstance(policy, FeedbackPolicy)

    def hook(_: nn.Module, args: Any, out: torch.Tensor) -> None:
        seen.append(out - args[0] if is_residual else out)

    handle = model.get_submodule(paths.module).register_forward_hook(hook)
    with torch.no_grad():
        sampled(model, inputs, STEPS)
        handle.remove()
        fmecompile.optimize(model, reuse=policy, strict=True)
        sampled(model, inputs, STEPS)
    told = [taken.change for taken in record(model).runs[-1]]
    want = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(seen)]
    assert told == [None, *(pytest.approx(change, rel=1e-6) for change in want)]


def test_kept_bytes_of_a_policy_that_measures(denoiser: tuple[nn.Module, Any, Compilation]) -> None:
    model, inputs, _ = denoiser
    sample, _, *rest = inputs
    with torch.no_grad():
        fmecompile.optimize(model, reuse=POLICIES["db"], strict=True)
        for k, t in enumerate(torch.linspace(900, 20, STEPS)):
            model(sample, t, *rest)
            stated, shared = record(model).kept_bytes, record(model).shared_bytes
            assert stated and compiler(model).timeline.kept_bytes() == (0 if k == STEPS - 1 else stated + shared)
        fmecompile.restore(model)


def test_a_value_that_a_later_cut_hides_is_kept_until_it_is_read() -> None:
    """The first component is due at step 1, where the second, behind it, is reused: its value of step 0 serves at 2."""
    model, inputs = small_svd().double(), svd_call(1, 3, 8, 8, torch.float64)
    errors = {"mid_block": (9.0, 0.0, 9.0), "up_blocks.1.attentions.0": (0.0, 9.0, 9.0)}

    class Alternating(reuse.SmoothCache):
        def wanted(self, steps: reuse.Steps) -> list[Any]:
            deep, late = errors
            return [FULL, frozenset({late}), frozenset({deep}), FULL]

    rows = {name: {1: row, 2: row[:2], 3: row[:1]} for name, row in errors.items()}
    with torch.no_grad():
        fmecompile.optimize(model, reuse=Alternating(alpha=1.0, errors=rows), strict=True)
        sampled(model, inputs, 4)
    taken = record(model)
    assert [told.decision for told in taken.runs[-1]] == [frozenset(d) for d in ((), [*errors][1:], [*errors][:1], ())]
    assert set(taken.plans) == {told.decision for told in taken.runs[-1]}


def test_a_step_that_reuses_may_hold_what_a_full_one_does() -> None:
    """Memory that is there anyway is spent on time: with what is kept, such a step holds no more at its peak."""
    model, inputs = small_svd().double(), svd_call(1, 3, 8, 8, torch.float64)
    with torch.no_grad():
        sampled(fmecompile.optimize(model, reuse=reuse.DeepCache(interval=2), strict=True), inputs, STEPS)
    made = record(model)
    full, other = made.plans[FULL], made.plans[REUSE]
    assert other.projected_peak_bytes <= other.allowed_bytes == full.projected_peak_bytes - made.kept_bytes


# ------------------------------------------------------------------------------------------------------------- guidance

GUIDED = reuse.FasterCache(attention_after=2, guidance_after=2, guidance_every=4, low_until=9, high_from=0)


@pytest.mark.parametrize(
    ("build", "call"), [pytest.param(*MODELS[0].values, id="svd", marks=pytest.mark.slow), MODELS[1]]
)
def test_a_skipped_branch_is_rebuilt(build: Callable[[], nn.Module], call: Callable[..., Any]) -> None:
    """The conditional half is as exact as without the other; both come out of every step; nothing is left."""
    model, inputs = build().double(), call(2, 3, 8, 8, torch.float64)
    branch = reuse.FasterCache(attention=False, guidance_after=2, guidance_every=4, frequency_gain=1.0)
    with torch.no_grad():
        exact = sampled(model, inputs, STEPS)
        fmecompile.optimize(model, reuse=branch, strict=True)
        got = sampled(model, inputs, STEPS)
        assert torch.allclose(got[1], exact[1], rtol=1e-10, atol=1e-10)
        assert 0 < (got[0] - exact[0]).norm() < 0.1 * exact[0].norm()
        fmecompile.optimize(model, reuse=GUIDED, strict=True)
        first = sampled(model, inputs, STEPS)
        assert torch.equal(sampled(model, inputs, STEPS), first)
    assert [told.decision for told in record(model).runs[-1]] == list(GUIDED.plan(reuse.Steps(STEPS)))
    assert 0 < (first - exact).norm() < 0.3 * exact.norm()
    assert compiler(model).timeline.kept_bytes() == 0
    plans = record(model).plans
    assert plans[frozenset({reuse.UNCOND})].projected_peak_bytes < plans[FULL].projected_peak_bytes


def test_a_gap_completes_what_it_was_taken_of() -> None:
    output = torch.randn(4, 3, 10, 15)
    gap = Gap.of(output)
    assert torch.allclose(gap.completed(output[2:]), output, atol=1e-5)
    assert gap.nbytes == gap_bytes(output.numel(), output.dtype)
    spectrum = torch.fft.fftshift(gap.low[0, 0].abs() > 0)
    assert int(spectrum.sum()) == 13  # whole numbers within a circle of radius 2
    louder = gap.scaled(1.5, 1.0).completed(output[2:])
    assert not torch.allclose(louder, output, atol=1e-3) and torch.equal(louder[2:], output[2:])


def test_a_component_that_is_not_there_is_refused() -> None:
    cuts = Cuts(normalised(small_svd(), svd_call(1, 3, 8, 8, torch.float32)).program)
    with pytest.raises(fmecompile.OptionError, match=r"no cross attention\n.*leave that component out"):
        cuts.named("cross_attention")


def test_guidance_without_two_halves_is_refused() -> None:
    model, inputs = small_svd(), svd_call(1, 3, 8, 8, torch.float32)
    fmecompile.optimize(model, reuse=GUIDED, strict=True)
    with torch.no_grad(), pytest.raises(fmecompile.OptionError, match="guidance is off"):
        sampled(model, inputs, STEPS)
