"""Steps that take values from an earlier one: the graphs, the values on offer, and the steps of a sampler."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fmecompile
from fmecompile.analysis.cuts import Cuts
from fmecompile.backends import reusing
from fmecompile.backends.reusing import ReusingCompiler, SplitPrologue
from fmecompile.capture.export import capture
from fmecompile.graph.program import Kept, compute_nodes
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.pipeline import Compilation, compile_module, finish, lower, normalise
from fmecompile.reuse import REUSE
from fmecompile.runtime.dispatch import find
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.prologue import Prologue
from tests.models import CONTEXT, animatediff_call, seeded, small_animatediff, small_svd, svd_call

Inputs = Callable[..., Any]
FLOATS = (torch.float32, torch.float64)
MODELS = [
    pytest.param(small_svd, svd_call, id="svd"),
    pytest.param(small_animatediff, animatediff_call, id="animatediff"),
]


def normalised(model: nn.Module, inputs: Any) -> Compilation:
    compilation = Compilation(capture(model, inputs, {}))
    normalise(compilation)
    return compilation


def variant(compilation: Compilation, model: nn.Module, reuse: StepReuse, *, loops: bool = False) -> Executable:
    program = compilation.program.copy()
    reuse.apply(program, compilation.facts)
    made = Compilation(program, compilation.facts)
    return Executable(lower(made)[0] if loops else finish(made), model)


# ----------------------------------------------------------------------------------------------------------- the graphs


@pytest.mark.parametrize(
    ("dtype", "every"), [(torch.float32, 4), *(pytest.param(d, 1, marks=pytest.mark.slow) for d in FLOATS)], ids=str
)
@pytest.mark.parametrize(
    ("build", "call"), [MODELS[0], pytest.param(*MODELS[1].values, id="animatediff", marks=pytest.mark.slow)]
)
def test_a_shallow_step_on_true_values_is_the_full_one(
    build: Callable[[], nn.Module], call: Inputs, dtype: Any, every: int
) -> None:
    """Bitwise, for so many of the cuts on offer."""
    model, inputs = build().to(dtype), call(1, 3, 8, 8, dtype)
    compilation = normalised(model, inputs)
    want = model(*inputs)
    offered = Cuts(compilation.program).offered()
    assert len(offered) > 8
    for cut in offered[::every]:
        cuts = (Cut("cut", cut.value, "cut"),)
        full = variant(compilation, model, StepReuse(cuts))
        result, kept = full.run(tree_leaves(inputs))
        shallow = variant(compilation, model, StepReuse(cuts, REUSE))
        again, nothing = shallow.run(tree_leaves(inputs), {("cut", 0): kept["cut"]})
        assert torch.equal(again[0], result[0]), cut
        assert torch.allclose(result[0], want[0], rtol=1e-4, atol=1e-4)
        assert not nothing and kept["cut"].untyped_storage().nbytes() <= cut.nbytes  # less where rows are equal


@pytest.mark.parametrize(("build", "call"), MODELS)
def test_what_led_to_the_cut_is_gone(build: Callable[[], nn.Module], call: Inputs) -> None:
    model, inputs = build(), call(1, 3, 8, 8, torch.float32)
    compilation = normalised(model, inputs)
    cut = Cuts(compilation.program).best()
    program = compilation.program.copy()
    StepReuse((Cut("cut", cut.value, "cut"),), REUSE).apply(program, compilation.facts)
    before = Cuts(compilation.program).work
    assert Cuts(program).work == pytest.approx(before * (1 - cut.saved), rel=1e-9)
    assert cut.saved > 0.3
    assert [b for b in program.bindings if isinstance(b, Kept)] == [Kept("cut")]
    assert not any("mid_block" in str(getattr(b, "name", "")) for b in program.bindings)


@pytest.mark.parametrize(
    ("build", "call"), [MODELS[0], pytest.param(*MODELS[1].values, id="animatediff", marks=pytest.mark.slow)]
)
def test_variants_run_in_loops(build: Callable[[], nn.Module], call: Inputs) -> None:
    """Both variants partitioned: as exact as their graphs, no more bytes than projected."""
    model, inputs = build().double(), call(2, 4, 16, 16, torch.float64)
    compilation = normalised(model, inputs)
    cuts = (Cut("cut", Cuts(compilation.program).last_up_temporal().value, "cut"),)
    want = model(*inputs)[0]
    result, kept = variant(compilation, model, StepReuse(cuts), loops=True).run(tree_leaves(inputs))
    shallow = variant(compilation, model, StepReuse(cuts, REUSE), loops=True)
    again, _ = shallow.run(tree_leaves(inputs), {("cut", 0): kept["cut"]})
    assert (result[0] - want).norm() <= 1e-10 * want.norm()
    assert (again[0] - want).norm() <= 1e-10 * want.norm()


def test_a_residual_lets_the_source_of_this_step_in() -> None:
    class Residual(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            return (y + (y * y).sin()).exp()

    x, other = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    model = Residual()
    compilation = normalised(model, (x,))
    double, *_, total, _ = compute_nodes(compilation.program.graph)
    cuts = (Cut("cut", total.name, "cut", double.name),)
    _, kept = variant(compilation, model, StepReuse(cuts)).run([x])
    again, _ = variant(compilation, model, StepReuse(cuts, REUSE)).run([other], {("cut", 0): kept["cut"]})
    assert torch.allclose(kept["cut"], ((2 * x) ** 2).sin())
    assert torch.allclose(again, (2 * other + ((2 * x) ** 2).sin()).exp())


def test_a_forecast_is_one_graph_for_every_distance() -> None:
    x = torch.rand(4, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double().requires_grad_(False)
    compilation = normalised(model, (x,))
    linear = next(n.name for n in compilation.program.graph.nodes if "linear" in str(n.target))
    shallow = variant(compilation, model, StepReuse((Cut("cut", linear, "cut"),), REUSE, order=2))
    kept = {("cut", k): torch.rand(4, 6, dtype=torch.float64) for k in range(3)}
    for weights in [(0.5, 0.25), (3.0, 9.0)]:
        coefficients = {("cut", k): torch.tensor(w, dtype=torch.float64) for k, w in enumerate(weights, 1)}
        got, _ = shallow.run([x], kept, coefficients)
        value = kept["cut", 0] + weights[0] * kept["cut", 1] + weights[1] * kept["cut", 2]
        assert torch.allclose(got, value.tanh(), rtol=1e-14)


# ------------------------------------------------------------------------------------------------- the values on offer


def small_unet3d() -> nn.Module:
    """A model whose temporal layers have other names and places."""
    model = diffusers.UNet3DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        norm_num_groups=8,
        layers_per_block=1,
    )
    return seeded(model)


def unet3d_call(batch: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Any:
    states = torch.randn(batch, 7, CONTEXT, dtype=dtype)
    return torch.randn(batch, 4, frames, height, width, dtype=dtype), torch.tensor(5.0, dtype=dtype), states


@pytest.mark.parametrize(
    ("build", "call", "pattern"),
    [
        pytest.param(small_svd, svd_call, r"(.*\.)?(temporal_res_block|temporal_transformer_blocks\.\d+)", id="svd"),
        pytest.param(small_animatediff, animatediff_call, r".*\.motion_modules\.\d+", id="animatediff"),
        pytest.param(small_unet3d, unet3d_call, r"transformer_in|.*\.(temp_convs|temp_attentions)\.\d+", id="unet3d"),
    ],
)
def test_temporal_modules_are_found_by_what_they_do(build: Callable[[], nn.Module], call: Inputs, pattern: str) -> None:
    model = build()
    found = Cuts(normalised(model, call(1, 3, 8, 8, torch.float32)).program).mixing.temporal
    assert found
    assert set(found) == {path for path, _ in model.named_modules() if re.fullmatch(pattern, path)}


def test_cuts_that_match_nothing_are_refused_with_near_names() -> None:
    cuts = Cuts(normalised(small_svd(), svd_call(1, 3, 8, 8, torch.float32)).program)
    assert cuts.named("up_blocks.1.attentions.0")[0].module == "up_blocks.1.attentions.0"
    with pytest.raises(fmecompile.OptionError, match=r"near it are .*up_blocks\.1\.attentions\.0"):
        cuts.named("up_block.1.attention.0")
    with pytest.raises(fmecompile.OptionError, match="skip connections"):
        cuts.named("deep_feature:99")


def test_what_no_clip_reaches_is_no_cut() -> None:
    """All steps share it; a pattern that matches more than that stands for the rest."""
    cuts = Cuts(normalised(small_svd(), svd_call(1, 3, 8, 8, torch.float32)).program)
    both, moving = "up_blocks.1.attentions.0.t*", {node.name for node in cuts.moving}
    assert "up_blocks.1.attentions.0.time_pos_embed" in {
        v.module for v in cuts.results_of(both) if v.value not in moving
    }
    assert {value.value for value in cuts.named(both)} <= moving
    with pytest.raises(fmecompile.OptionError, match="changes with the clip: add_embedding"):
        cuts.named("add_embedding.*")


# ------------------------------------------------------------------------------------------------------ a sampler's run


def sampled(model: nn.Module, inputs: Any, steps: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A loop that calls the denoiser with views of one list of timesteps, as samplers of diffusers do."""
    sample, _, *rest = inputs
    for t in torch.linspace(900, 20, steps, dtype=dtype):
        out = model(sample, t, *rest)
        noise = out[0] if isinstance(out, tuple) else out.sample
        times = [wanted // there for wanted, there in zip(sample.shape, noise.shape, strict=True)]
        sample = sample - 0.1 * noise.repeat(times)  # of the latents and of an image beside them
    return sample


@pytest.fixture
def svd_run() -> Iterator[tuple[nn.Module, Any]]:
    model = small_svd().double()
    yield model, svd_call(2, 3, 8, 8, torch.float64)
    fmecompile.restore(model)


def record(model: nn.Module) -> Any:
    return fmecompile.explain(model).records[0].reuse


def compiler(model: nn.Module) -> ReusingCompiler:
    dispatcher = find(model)
    assert dispatcher is not None and isinstance(dispatcher._compiler, ReusingCompiler)
    return dispatcher._compiler


def test_full_steps_alone_change_nothing(svd_run: tuple[nn.Module, Any]) -> None:
    model, inputs = svd_run
    with torch.no_grad():
        want = sampled(model, inputs, 4)
        fmecompile.optimize(model, reuse=fmecompile.StepRehash(full_steps=4), strict=True)
        got = sampled(model, inputs, 4)
    assert (got - want).norm() <= 1e-10 * want.norm()
    assert len(record(model).plans) == 1


@pytest.mark.parametrize(
    "mode", ["forecast", *(pytest.param(m, marks=pytest.mark.slow) for m in ("feature", "residual"))]
)
def test_generations_do_not_touch_each_other(svd_run: tuple[nn.Module, Any], mode: Any) -> None:
    """Again, with other steps in between, after an exception: the same frames; nothing is kept at the end."""
    model, inputs = svd_run
    policy = fmecompile.DeepCache(interval=2, mode=mode) if mode != "residual" else fmecompile.DeepCache(interval=2)
    with torch.no_grad():
        exact = sampled(model, inputs, 6)
        fmecompile.optimize(model, reuse=policy, strict=True)
        first = sampled(model, inputs, 6)
        assert len(record(model).plans) == 2
        sampled(model, inputs, 3)
        assert torch.equal(sampled(model, inputs, 6), first)
        with pytest.raises(RuntimeError, match="stop"):
            sampled(model, (inputs[0], inputs[1], *_failing(inputs[2:])), 6)
        assert torch.equal(sampled(model, inputs, 6), first)
    assert 0 < (first - exact).norm() / exact.norm() < 0.2
    assert compiler(model).timeline.kept_bytes() == 0
    assert len(record(model).plans) == 2


def _failing(rest: Any) -> Any:
    raise RuntimeError("stop")


def test_kept_bytes_are_those_that_were_stated(svd_run: tuple[nn.Module, Any]) -> None:
    model, inputs = svd_run
    sample, _, *rest = inputs
    with torch.no_grad():
        fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=3), strict=True)
        for k, t in enumerate(torch.linspace(900, 20, 6)):
            model(sample, t, *rest)
            stated, shared = record(model).kept_bytes, record(model).shared_bytes
            held = (stated if k % 3 != 2 else 0) + (shared if k < 5 else 0)
            assert stated and shared and compiler(model).timeline.kept_bytes() == held


def test_branches_of_guidance_keep_their_own(svd_run: tuple[nn.Module, Any]) -> None:
    """Two calls at each step, with other conditions: each as if it ran alone; in either order, or one left out."""
    model, inputs = svd_run
    sample, _, states, *rest = inputs
    others = states + 1
    timesteps = torch.linspace(900, 20, 6)

    def alone(condition: torch.Tensor) -> list[torch.Tensor]:
        return [model(sample + 0.1 * k, t, condition, *rest)[0] for k, t in enumerate(timesteps.clone())]

    with torch.no_grad():
        fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=3), strict=True)
        want, want_others = alone(states), alone(others)
        for k, t in enumerate(timesteps.clone()):
            got = {}
            for condition in (states, others) if k % 2 else (others, states):
                if condition is states or k < 4:
                    got[id(condition)] = model(sample + 0.1 * k, t, condition, *rest)[0]
            assert torch.equal(got[id(states)], want[k])
            assert id(others) not in got or torch.equal(got[id(others)], want_others[k])


def test_a_declared_generation_needs_no_list(svd_run: tuple[nn.Module, Any]) -> None:
    model, inputs = svd_run
    sample, _, *rest = inputs

    def run() -> list[torch.Tensor]:
        return [model(sample + 0.1 * k, 900 - 100 * k, *rest)[0] for k in range(6)]

    with torch.no_grad():
        fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=3), strict=True)
        with pytest.raises(fmecompile.OptionError, match=r"fmecompile\.generation"):
            run()
        with fmecompile.generation(steps=6):
            first = run()
        with fmecompile.generation(steps=6):
            second = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(record(model).plans) == 2
    with pytest.raises(fmecompile.OptionError, match="no number of steps"), fmecompile.generation(steps=0):
        pass


def test_what_is_kept_goes_with_the_programs(svd_run: tuple[nn.Module, Any]) -> None:
    model, inputs = svd_run
    sample, _, *rest = inputs
    with torch.no_grad():
        fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=3), strict=True)
        model(sample, torch.linspace(900, 20, 6)[0], *rest)
        generation = compiler(model).timeline.at(None)
        assert generation.branches
        gone = weakref.ref(next(iter(generation.branches)))
        del generation
        fmecompile.restore(model)
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("fast", "is no policy"),
        (fmecompile.DeepCache, "is no policy"),
    ],
)
def test_what_is_no_policy_is_refused(policy: object, words: str) -> None:
    with pytest.raises(fmecompile.OptionError, match=words):
        fmecompile.optimize(small_svd(), reuse=policy)


def test_a_cut_that_is_not_there_is_refused_before_anything_runs(svd_run: tuple[nn.Module, Any]) -> None:
    model, inputs = svd_run
    fmecompile.optimize(model, reuse=fmecompile.DeepCache(cut="up_blocks.7"), strict=True)
    with torch.no_grad(), pytest.raises(fmecompile.OptionError, match=r"up_blocks\.7"):
        sampled(model, inputs, 3)


def test_the_module_compiles_as_before_without_reuse() -> None:
    model, inputs = small_svd(), svd_call(1, 3, 8, 8, torch.float32)
    compiled, plan = compile_module(model, inputs, {})
    assert not compiled.keeps and plan.groups is not None


# -------------------------------------------------------------------------------------------------- made once, and kept


def prologues(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which what all steps share was made, from now on."""
    made: list[int] = []
    original = Prologue.values
    monkeypatch.setattr(reusing, "SplitPrologue", partial(SplitPrologue, share=1.0))  # small models share little

    def values(self: Prologue, generation: Any, branch: Any, leaves: Any) -> Any:
        before = branch.made
        found = original(self, generation, branch, leaves)
        if before is None or found is not before.values:
            made.append(branch.step)
        return found

    monkeypatch.setattr(Prologue, "values", values)
    return made


def test_what_all_steps_share_is_made_once(svd_run: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew in every generation, and where an input or a weight was changed in place; the values are right each time."""
    model, inputs = svd_run
    sample, _, states, ids = inputs
    made = prologues(model, monkeypatch)

    def run(change: Callable[[int], None]) -> list[torch.Tensor]:
        found = []
        for k, t in enumerate(torch.linspace(900, 20, 4)):
            change(k)
            found.append(model(sample, t, states, ids)[0])
        return found

    weight = next(p for name, p in model.named_parameters() if name == "add_embedding.linear_1.weight")
    with torch.no_grad():
        for change, steps in [
            (lambda k: None, [0]),
            (lambda k: ids.mul_(1.5) if k == 2 else None, [0, 2]),
            (lambda k: weight.mul_(1.5) if k == 3 else None, [0, 3]),
        ]:
            before = ids.clone(), weight.clone()
            want = run(change)
            ids.copy_(before[0]), weight.copy_(before[1])
            fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=1), strict=True)
            made.clear()
            got = run(change)
            assert made == steps
            assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(got, want, strict=True))
            assert compiler(model).timeline.kept_bytes() == 0
            ids.copy_(before[0]), weight.copy_(before[1])
            fmecompile.restore(model)


def test_what_is_shared_is_made_anew_where_steps_are_not_told(
    svd_run: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = svd_run
    sample, _, *rest = inputs
    made = prologues(model, monkeypatch)
    with torch.no_grad():
        fmecompile.optimize(model, reuse=fmecompile.FirstBlockCache(threshold=0.0), strict=True)
        for k in range(3):
            model(sample, 900 - 100 * k, *rest)
    assert made == [0, 1, 2]
