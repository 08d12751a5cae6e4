"""The doors, and what happens to those who knock wrongly."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fmecompile
from fmecompile.runtime.dispatch import MAX_PROGRAMS, Dispatcher
from fmecompile.runtime.fingerprint import Fingerprint
from tests.models import seeded, small_svd, svd_call


class Block(nn.Module):
    """A feed-forward large enough to be worth a loop, with a plain attribute that changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 128), nn.Linear(128, 8)
        self.gain = 1.0
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x))) * (self.gain * scale) + self.shift


def block() -> Block:
    return seeded(Block())  # type: ignore[return-value]


def batch(rows: int = 16) -> torch.Tensor:
    return torch.randn(rows, 16, 8, generator=torch.Generator().manual_seed(rows))


def plans(module: nn.Module) -> list[fmecompile.Plan]:
    return [record.plan for record in fmecompile.explain(module).records]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------ optimize and restore


def test_optimize_returns_the_object_and_restore_puts_everything_back() -> None:
    module = block()
    before = dict(vars(module))
    assert fmecompile.optimize(module) is module
    assert fmecompile.is_optimized(module)
    module(batch())
    assert fmecompile.restore(module) is module
    assert not fmecompile.is_optimized(module)
    assert vars(module) == before
    assert fmecompile.restore(module) is module  # a documented no-op


def test_optimize_twice_replaces_options() -> None:
    module = block()
    fmecompile.optimize(module)
    module(batch())
    fmecompile.optimize(module, strict=True)
    assert plans(module) == []
    assert torch.allclose(module(batch()), Block.forward(module, batch()), atol=1e-5)
    fmecompile.restore(module)
    assert "forward" not in vars(module)


def test_a_patched_forward_comes_back() -> None:
    module = block()
    own = lambda x: Block.forward(module, x) * 2  # noqa: E731
    module.forward = own  # type: ignore[method-assign]
    want = module(batch())
    fmecompile.optimize(module, strict=True)
    assert torch.allclose(module(batch()), want, atol=1e-5)
    fmecompile.restore(module)
    assert vars(module)["forward"] is own


class Pipe:
    unet = None


@pytest.mark.parametrize("door", [fmecompile.optimize, fmecompile.restore, fmecompile.plan, fmecompile.explain])
@pytest.mark.parametrize(("target", "hint"), [(3, "the model itself"), (Pipe(), "unet"), (None, "the model itself")])
def test_wrong_targets(door: Any, target: Any, hint: str) -> None:
    with pytest.raises(fmecompile.TargetError, match=hint):
        door(target)


@pytest.mark.parametrize(
    "option", [{"memory_budget": "8 apples"}, {"reuse": object()}, {"backend": "inducter"}, {"plan": "plan.json"}]
)
def test_unsupported_options(option: dict[str, Any]) -> None:
    module = block()
    with pytest.raises(fmecompile.OptionError, match="next:"):
        fmecompile.optimize(module, **option)
    assert not fmecompile.is_optimized(module)


def test_explain_and_stages_want_an_optimized_module() -> None:
    module = block()
    for door in (fmecompile.explain, fmecompile.stages):
        with pytest.raises(fmecompile.TargetError, match="optimize"):
            door(module)
    fmecompile.optimize(module)
    with pytest.raises(fmecompile.TargetError, match="call it once"):
        fmecompile.stages(module)


# -------------------------------------------------------------------------------------------------- signatures, weights


def test_one_program_a_signature_in_a_bounded_cache() -> None:
    module = fmecompile.optimize(block(), strict=True)
    for rows in range(2, 4 + MAX_PROGRAMS):
        module(batch(rows))
        module(batch(rows))
    assert len(plans(module)) == MAX_PROGRAMS
    kept = fmecompile.explain(module).records[-1].plan.key.signature
    assert f"({3 + MAX_PROGRAMS}, 16, 8)" in kept


def test_weights_are_read_at_each_call() -> None:
    module = block()
    fmecompile.optimize(module, strict=True)
    module(batch())
    module.up.weight.mul_(2)
    module.shift.add_(1)
    module.down.weight.data = module.down.weight.data * 3
    assert torch.allclose(module(batch()), Block.forward(module, batch()), atol=1e-4)
    assert len(plans(module)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "gain", 3.0),
        lambda m: setattr(m, "up", nn.Linear(8, 128)),
        lambda m: setattr(m, "up", nn.Sequential(m.up, nn.ReLU())),
        lambda m: m.double().float().half().float(),
    ],
    ids=["attribute", "sub-module", "wrapped", "dtype and back"],
)
def test_a_change_of_structure_recaptures(change: Any) -> None:
    module = block()
    fmecompile.optimize(module, strict=True)
    module(batch())
    change(module)
    assert torch.allclose(module(batch()), Block.forward(module, batch()), atol=1e-5)


def test_a_hook_on_the_module_itself_is_called_and_recaptures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fmecompile.optimize(block(), strict=True)
    want = module(batch())
    (plan,) = plans(module)
    module.register_forward_hook(lambda _, args, output: output * 2)
    monkeypatch.setattr(Dispatcher, "_compile", lambda *_: pytest.fail("compiled again"))
    assert torch.equal(module(batch()), want * 2)
    assert plans(module) == [plan]


def test_attributes_are_the_same_objects_after_a_capture() -> None:
    """torch.export puts copies of lists back; two modules that share one would no longer do."""
    module = nn.Sequential(block(), block()).eval()
    shared = [1.0, {"a": [2]}]
    module[0].shared = module[1].shared = shared  # type: ignore[assignment]
    inner = shared[1]
    fmecompile.optimize(module, strict=True)
    module(batch())
    assert module[0].shared is shared and module[1].shared is shared
    assert shared == [1.0, {"a": [2]}] and shared[1] is inner


def test_dtype_change_recaptures() -> None:
    module = block()
    fmecompile.optimize(module, strict=True)
    module(batch())
    module.to(torch.float64)
    assert module(batch().double()).dtype == torch.float64
    assert [str(plan.key.signature).count("float64") for plan in plans(module)] == [1]


def test_fingerprint_sees_nested_settings() -> None:
    class Processor:
        def __init__(self) -> None:
            self.scale = [1.0]

    module = nn.Sequential(block())
    module[0].processor = Processor()
    module[0].table = {"a": 1}
    fingerprint = Fingerprint(module)
    assert fingerprint.holds()
    module[0].processor.scale = [2.0]
    assert not fingerprint.holds()
    fingerprint = Fingerprint(module)
    module[0].table["a"] = 2
    assert not fingerprint.holds()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.up.weight, "data", torch.zeros(64, 8)),
        lambda m: setattr(m.up.weight, "data", torch.zeros(8, 128).t()),
        lambda m: m.register_parameter("late", nn.Parameter(torch.zeros(1))),
        lambda m: m.up.register_buffer("late", torch.zeros(1)),
    ],
    ids=["shape", "strides", "parameter", "buffer"],
)
def test_fingerprint_sees_what_a_weight_is(change: Any) -> None:
    """Adapters of another rank are swapped in place."""
    module = block()
    fingerprint = Fingerprint(module)
    module.up.weight.data = module.up.weight.data * 2
    assert fingerprint.holds()
    change(module)
    assert not fingerprint.holds()


def test_fingerprint_is_cheap_on_a_real_unet() -> None:
    """Counted in work, not time: one comparison a sub-module, and no tensor is touched."""
    from benchmarks.cases import fake, svd

    with fake(torch.float16):
        module = svd()
        fingerprint = Fingerprint(module)
        calls = fmecompile.measure(fingerprint.holds)
    assert calls.output
    assert calls.timeline == ()


# ------------------------------------------------------------------------------------------------------------ bad input


class Branches(nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


class Around(nn.Module):
    """Cannot be captured; its inner module can."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool(x.isfinite().all()) else x


class Remembers(nn.Module):
    """Changes a buffer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x + self.seen


@pytest.mark.parametrize("build", [Branches, Remembers])
def test_what_cannot_be_captured_stays_eager(build: Any) -> None:
    module, x = build().eval(), torch.ones(3)
    want = copy.deepcopy(module)(x)
    fmecompile.optimize(module)
    with pytest.warns(UserWarning, match="eager") as caught:
        assert torch.equal(module(x), want)
    if build is Branches:
        assert "test_api.py" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    assert len(fmecompile.explain(module).refused) == 1
    assert "refused" in str(fmecompile.explain(module))
    strict = fmecompile.optimize(build().eval(), strict=True)
    with pytest.raises(fmecompile.CaptureError, match="next:"):
        strict(x)
    assert torch.equal(fmecompile.restore(strict)(x), want)


def test_gradients_and_training_pass_through() -> None:
    module = Block()
    fmecompile.optimize(module)
    with torch.enable_grad(), pytest.warns(UserWarning, match="no_grad"):
        module.eval()(batch()).sum().backward()
    assert module.up.weight.grad is not None
    strict = fmecompile.optimize(Block().eval(), strict=True)
    with torch.enable_grad(), pytest.raises(fmecompile.GradientError, match=r"torch\.no_grad"):
        strict(batch())
    with pytest.raises(fmecompile.GradientError, match="training mode"):
        strict.train()(batch())


def test_wrong_arguments_fail_as_they_do_eagerly() -> None:
    module = fmecompile.optimize(block())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError):
            module()
        with pytest.raises(TypeError):
            module(batch(), nonsense=1)
    assert not fmecompile.explain(module).refused
    assert module(batch()).shape == (16, 16, 8)


def test_an_interrupted_call_leaves_the_module_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fmecompile.optimize(block(), strict=True)
    want = module(batch())
    (program,) = module.forward._programs.values()  # type: ignore[union-attr]
    loop = next(iter(program._compiled.graph_module.children()))
    trips = []

    def interrupted(*operands: torch.Tensor) -> Any:
        trips.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.bodies[0], "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module(batch())
    gc.collect()
    assert trips == [1]
    assert torch.equal(module(batch()), want)


def test_no_growth_from_call_to_call() -> None:
    module = fmecompile.optimize(block(), strict=True)
    x = batch()
    module(x)
    peaks = {fmecompile.measure(module, x).peak_bytes for _ in range(4)}
    assert len(peaks) == 1


def _in_threads(*works: Callable[[], object]) -> list[Any]:
    """The results of ``works``, all begun at the same moment; their errors are raised here."""
    start = threading.Barrier(len(works))

    def wait_and(work: Callable[[], object]) -> object:
        start.wait()
        with torch.no_grad():
            return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(wait_and, works))


def test_threads_that_call_one_module_while_it_is_captured() -> None:
    module = fmecompile.optimize(block(), strict=True)
    rows = (32, 48, 64, 80)
    got = _in_threads(*(lambda n=n: [module(batch(n)) for _ in range(3)] for n in rows))
    for n, results in zip(rows, got, strict=True):
        assert all(torch.allclose(result, Block.forward(module, batch(n)), atol=1e-5) for result in results)


def test_threads_that_run_eagerly_around_an_optimized_module() -> None:
    """A run that suspends itself to capture must not wait for another that does the same."""
    inner = fmecompile.optimize(block(), strict=True)
    outer = fmecompile.optimize(Around(inner))
    plain = block()
    want = plain(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = _in_threads(
            *(lambda n=n: outer(batch(n)).shape for n in (32, 48)),
            lambda: all(torch.allclose(plain(batch()), want, atol=1e-5) for _ in range(500)),
        )
    assert got == [(32, 16, 8), (48, 16, 8), True]


def test_an_optimized_module_refuses_to_be_pickled() -> None:
    with pytest.raises(TypeError, match="restore"):
        pickle.dumps(fmecompile.optimize(block()))


def test_a_deep_copy_is_its_own_module() -> None:
    module = fmecompile.optimize(block(), strict=True)
    module(batch())
    twin = copy.deepcopy(module)
    assert fmecompile.is_optimized(twin)
    assert plans(twin) == []
    twin.up.weight.zero_()
    assert torch.allclose(twin(batch()), Block.forward(twin, batch()), atol=1e-5)
    assert torch.allclose(module(batch()), Block.forward(module, batch()), atol=1e-5)


# ------------------------------------------------------------------------------------------------- plans, stages, fakes


def test_plan_has_no_side_effects_and_survives_json(tmp_path: Path) -> None:
    module = small_svd()
    before = dict(vars(module))
    plan = fmecompile.plan(module, *svd_call(1, 3, 8, 8, torch.float32))
    assert vars(module) == before
    assert not fmecompile.is_optimized(module)
    assert plan.eager_peak_bytes > plan.allowed_bytes >= plan.projected_peak_bytes >= plan.floor_bytes > 0
    assert plan.weight_bytes == sum(p.nbytes for p in module.parameters())
    assert all(group.modules and group.because and group.operators for group in plan.groups)
    plan.save(tmp_path / "plan.json")
    assert fmecompile.Plan.load(tmp_path / "plan.json") == plan
    assert str(len(plan.groups)) in plan.summary()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(fmecompile.PlanMismatch):
        fmecompile.Plan.from_json(text)


def test_a_saved_plan_skips_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmecompile.partition.partition import Partitioner

    module, args = small_svd(), svd_call(1, 3, 8, 8, torch.float32)
    want = module(*args).sample
    fmecompile.optimize(module, strict=True)
    module(*args)
    (plan,) = plans(module)
    with monkeypatch.context() as patch:
        patch.setattr(Partitioner, "search", lambda self: pytest.fail("searched"))
        fmecompile.optimize(module, strict=True, plan=fmecompile.Plan.from_json(plan.to_json()))
        assert torch.allclose(module(*args).sample, want, atol=1e-4)
    assert plans(module) == [plan]
    other = svd_call(1, 2, 8, 8, torch.float32)
    assert module(*other).sample.shape[1] == 2  # another signature: searched


def test_the_key_of_a_plan_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    monkeypatch.setattr(hashlib, "sha256", lambda text: hashed.append(text) or sha256(text))
    sha256 = hashlib.blake2b
    norm = nn.GroupNorm(2, 4).eval()
    fmecompile.plan(norm, torch.ones(2, 4, 8))
    (text,) = (text for text in hashed if b"placeholder" in text)
    assert b"group_norm_moments" in text and b" at 0x" not in text


def test_stages_run_and_say_their_peak() -> None:
    module, x = block(), batch()
    want = module(x)
    fmecompile.optimize(module, strict=True)
    module(x)
    found = fmecompile.stages(module)
    names = [name for name, _, _, _ in found]
    assert names[0] == "capture"
    assert names[-2:] == ["chunk-loops", "fuse-norm"]
    weights = [module.up.weight, module.up.bias, module.down.weight, module.down.bias, module.shift]
    for name, code, peak, program in found:
        assert "def forward" in code, name
        assert torch.allclose(program(*weights, x)[0], want, atol=1e-5), name
        assert fmecompile.measure(program, *weights, x).peak_bytes <= peak, name
    assert found[-1].projected_peak_bytes < found[0].projected_peak_bytes
    assert "chunk_loop_0" in found[-1].code
    assert "trips over" in found[-1].code
    assert "gelu" in found[-1].code


def test_every_node_keeps_its_place() -> None:
    module, args = small_svd(), svd_call(1, 3, 8, 8, torch.float32)
    fmecompile.optimize(module, strict=True)
    module(*args)
    (program,) = module.forward._programs.values()  # type: ignore[union-attr]
    graph_module = program._compiled.graph_module
    loops = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    assert loops
    assert all("nn_module_stack" in node.meta for node in loops)
    for loop in graph_module.children():
        calls = [node for node in loop.bodies[0].graph.nodes if node.op == "call_function"]
        assert any(".py" in node.meta.get("stack_trace", "") for node in calls)


def test_optimized_module_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        module = Block().eval()
        fmecompile.optimize(module, strict=True)
        assert module(torch.empty(16, 16, 8)).shape == (16, 16, 8)


def test_explanation_reads() -> None:
    module = fmecompile.optimize(block(), strict=True)
    module(batch())
    text = str(fmecompile.explain(module))
    assert "Block: 1 compiled signatures, 0 refused" in text
    assert "trips" in text
    assert "at the peak" in text
