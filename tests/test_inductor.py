"""The Inductor backend: kernels between library calls, the same output, and no more bytes than the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fmecompile
from benchmarks.inductor import allocated_peak_bytes
from fmecompile.analysis.verify import measured_peak_bytes
from fmecompile.backends import inductor
from fmecompile.errors import BackendError, OptionError
from fmecompile.graph import edit
from fmecompile.graph.specs import spec_of, tensor_spec
from fmecompile.passes.fuse_runs import MAX_KERNELS
from fmecompile.pipeline import Compilation, finish
from fmecompile.runtime.executable import Compiled
from fmecompile.runtime.fused import FusedRun
from tests.models import animatediff_call, as_dtype, small_animatediff, small_svd, svd_call, twin
from tests.test_models import frames_of, latents, relative, video_decoder

F64 = torch.float64


class Block(nn.Module):
    """Two products with a gate between them and a norm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.norm = nn.Linear(16, 128), nn.Linear(64, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.wide(x).chunk(2, -1)
        return self.norm(self.narrow(value * nn.functional.gelu(gate)) + x) * 2


def blocks(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).to(F64).eval().requires_grad_(False)


def clip(rows: int = 96) -> torch.Tensor:
    return torch.randn(rows, 8, 16, generator=torch.Generator().manual_seed(1), dtype=F64)


def kernels(module: nn.Module) -> set[FusedRun]:
    """The kernels of all programs of an optimized module."""
    programs = module.forward._programs.values()  # type: ignore[union-attr]
    found = (m for program in programs for m in program._compiled.graph_module.modules())
    return {m for m in found if isinstance(m, FusedRun)}


def as_operators(operators: fx.GraphModule) -> FusedRun:
    """What Inductor would make, without Inductor."""
    specs = [tensor_spec(node) for node in operators.graph.output_node().args[0]]  # type: ignore[union-attr]
    nbytes = sum(spec.numel * spec.dtype.itemsize for spec in specs)
    strides = [tensor_spec(node).stride for node in operators.graph.nodes if node.op == "placeholder"]
    results = [(s.shape, s.stride, s.dtype) for s in specs]
    return FusedRun(operators, lambda given: operators(*given), strides, results, nbytes)


@pytest.fixture(autouse=True)
def every_run_is_worth_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FMECOMPILE_MIN_FUSED_BYTES", "0")
    inductor._failed.clear()
    yield
    inductor._made.clear()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_compile", as_operators)


# -------------------------------------------------------------------------------------------------- with real kernels


@torch.no_grad()
def test_kernels_are_exact_and_see_weights_as_they_are() -> None:
    module, x = blocks(), clip()
    want = module(x)
    fmecompile.optimize(module, backend="inductor", strict=True)
    assert relative(module(x), want) <= 1e-10
    assert kernels(module)
    for parameter in module.parameters():
        parameter.mul_(1.5)
    changed = module(x)
    assert relative(changed, want) > 1e-3
    assert relative(fmecompile.restore(module)(x), changed) <= 1e-10


@torch.no_grad()
def test_kernels_hold_no_more_than_projected() -> None:
    """By the allocator's own account, in which libraries would be seen too; these products need no workspace."""
    module, x = blocks(), clip()
    fmecompile.optimize(module, backend="inductor", strict=True)
    module(x)
    plan = fmecompile.explain(module).records[0].plan
    measured = fmecompile.measure(module, x).peak_bytes
    assert plan.projected_peak_bytes >= measured > 0.5 * plan.projected_peak_bytes
    assert plan.projected_peak_bytes >= allocated_peak_bytes(lambda: module(x))


@torch.no_grad()
def test_results_have_the_strides_of_the_library() -> None:
    """A GroupNorm of permuted values is contiguous; on fake tensors it says that it is not."""
    x, weight = torch.randn(2, 6, 4).permute(0, 2, 1), torch.rand(4)
    graph = fx.Graph()
    places = [graph.placeholder(name) for name in ("x", "weight")]
    for place, value in zip(places, (x, weight), strict=True):
        edit.set_spec(place, spec_of(value))
    norm = graph.call_function(torch.ops.aten.group_norm.default, (places[0], 2, places[1]))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (norm, 3.0)),))
    operators = fx.GraphModule(nn.Module(), graph)
    (want,), (got,) = operators(x, weight), inductor._compile(operators)(x, weight)
    assert got.stride() == want.stride() != x.stride()
    assert torch.allclose(got, want, atol=1e-6)
    y = x.contiguous()
    assert torch.allclose(inductor._compile(operators)(y, weight)[0], want, atol=1e-6), "it was compiled for x"


@torch.no_grad()
def test_torch_compile_takes_the_backend() -> None:
    module, x = blocks(1), clip()
    want = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="fmecompile", options={"backend": "inductor"})
    assert relative(compiled(x), want) <= 1e-10
    with pytest.raises(Exception, match="near it are inductor"):
        torch.compile(blocks(1), backend="fmecompile", options={"backend": "inducter"})(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "call"),
    [
        (small_svd, lambda dtype: (svd_call(2, 5, 16, 24, dtype), {})),
        (small_animatediff, lambda dtype: (animatediff_call(2, 5, 16, 24, dtype), {})),
        (video_decoder, lambda dtype: ((latents(6, dtype=dtype),), frames_of(2, 3, dtype))),
    ],
    ids=["svd", "animatediff", "video decoder"],
)
@torch.no_grad()
def test_whole_models(build: Callable[[], nn.Module], call: Callable[[torch.dtype], Any]) -> None:
    """float64 as eager to 1e-10, float32 at most 1.5 times eager's error, and no more bytes than without kernels."""
    module = build().to(F64)
    args, kwargs = call(F64)
    want = module(*args, **kwargs)
    eager = fmecompile.optimize(twin(module, F64), strict=True)
    fmecompile.optimize(module, backend="inductor", strict=True)
    assert relative(module(*args, **kwargs), want) <= 1e-10
    assert kernels(module)
    plan = fmecompile.explain(module).records[0].plan
    assert plan.projected_peak_bytes >= fmecompile.measure(module, *args, **kwargs).peak_bytes
    eager(*args, **kwargs)
    libraries = allocated_peak_bytes(lambda: eager(*args, **kwargs))
    assert allocated_peak_bytes(lambda: module(*args, **kwargs)) <= max(libraries, plan.projected_peak_bytes)

    narrow = build()
    args, kwargs = call(torch.float32)
    reference = twin(narrow, F64)(*as_dtype(args, F64), **as_dtype(kwargs, F64))
    error = relative_norm(narrow(*args, **kwargs), reference)
    fmecompile.optimize(narrow, backend="inductor", strict=True)
    assert 0 < relative_norm(narrow(*args, **kwargs), reference) <= 1.5 * error


def relative_norm(got: Any, want: Any) -> float:
    got, want = (value if isinstance(value, torch.Tensor) else value.sample for value in (got, want))
    return ((got.double() - want).norm() / want.norm()).item()


# ------------------------------------------------------------------------------------------------ what becomes a kernel


@pytest.mark.usefixtures("without_inductor")
@torch.no_grad()
def test_depth_adds_no_kernels() -> None:
    counts = []
    for depth in (3, 6):
        module = fmecompile.optimize(blocks(depth), backend="inductor", strict=True)
        assert relative(module(clip()), fmecompile.restore(blocks(depth))(clip())) <= 1e-10
        counts.append(len(kernels(module)))
        note = dict(fmecompile.explain(module).records[0].notes)["fuse-runs"]
        assert note.startswith(f"{counts[-1]} kernels at ")
    assert counts[0] == counts[1] > 0


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("build", "call"),
    [(small_svd, svd_call), pytest.param(small_animatediff, animatediff_call, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_runs_of_whole_models(
    build: Callable[[], nn.Module], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are put where the plan has room for them, and on fake tensors the program holds what was projected."""
    made: list[Compilation] = []

    def finished(compilation: Compilation) -> Compiled:
        made.append(compilation)
        return finish(compilation)

    monkeypatch.setattr("fmecompile.pipeline.finish", finished)
    module, args = build().to(F64), call(1, 2, 8, 8, F64)
    want = module(*args)
    fmecompile.optimize(module, backend="inductor", strict=True)
    assert relative(module(*args), want) <= 1e-10
    assert 4 < len(kernels(module)) <= MAX_KERNELS
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(*(mode.from_tensor(value) for value in args)).sample.shape == want.sample.shape
    plan = fmecompile.explain(module).records[0].plan
    assert plan.projected_peak_bytes >= measured_peak_bytes(made[-1].program, made[-1].loops)


@pytest.mark.usefixtures("without_inductor")
@torch.no_grad()
def test_a_kernel_that_would_hold_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = blocks(), clip()
    want = module(x)

    def greedy(operators: fx.GraphModule) -> FusedRun:
        run = as_operators(operators)
        run.allocated_bytes = 1 << 40
        return run

    monkeypatch.setattr(inductor, "_compile", greedy)
    fmecompile.optimize(module, backend="inductor", strict=True)
    assert relative(module(x), want) <= 1e-10
    assert not kernels(module)


@pytest.mark.usefixtures("without_inductor")
@torch.no_grad()
def test_what_spares_little_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMECOMPILE_MIN_FUSED_BYTES", str(1 << 40))
    module = fmecompile.optimize(blocks(), backend="inductor", strict=True)
    module(clip())
    assert not kernels(module)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@torch.no_grad()
def test_steps_that_reuse_have_kernels_too() -> None:
    module, args = small_svd().to(F64), svd_call(2, 3, 8, 8, F64)
    fmecompile.optimize(module, backend="inductor", reuse=fmecompile.DeepCache(interval=2), strict=True)
    with fmecompile.generation(steps=2):
        first, second = module(*args).sample, module(*args).sample
    assert relative(first, second) <= 1e-10  # the same input: what is reused is what would be computed
    (program,) = module.forward._programs.values()  # type: ignore[union-attr]
    made = [executable._compiled.graph_module for executable in program._variants._made.values()]
    assert len(made) == 2 and all(any(isinstance(m, FusedRun) for m in graph.modules()) for graph in made)


@torch.no_grad()
def test_bisect_names_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(operators: fx.GraphModule) -> FusedRun:
        run = as_operators(operators)
        run._kernel = lambda given: [value + 1 for value in operators(*given)]
        return run

    monkeypatch.setattr(inductor, "_compile", wrong)
    module, x = fmecompile.optimize(blocks(), backend="inductor", strict=True), clip()
    found = fmecompile.bisect(module, x).wrong
    assert found is not None and found.name == "fuse-runs"


# ------------------------------------------------------------------------------------------------------------ bad input


@torch.no_grad()
def test_a_failing_kernel_leaves_its_operators_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(operators: fx.GraphModule) -> FusedRun:
        if any(node.target is torch.ops.aten.gelu.default for node in operators.graph.nodes):
            raise RuntimeError("no such kernel")
        return as_operators(operators)

    monkeypatch.setattr(inductor, "_compile", failing)
    module, x = blocks(), clip()
    want = module(x)
    fmecompile.optimize(module, backend="inductor")
    with pytest.warns(UserWarning, match=r"no kernel of .*gelu.*no such kernel") as told:
        assert relative(module(x), want) <= 1e-10
    assert len(told) == 1
    assert kernels(module), "the others stay"
    inductor._failed.clear()
    fmecompile.optimize(module, backend="inductor", strict=True)
    with pytest.raises(BackendError, match="no such kernel"):
        module(x)


@torch.no_grad()
def test_without_a_compiler_everything_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_found)
    module, x = blocks(), clip()
    want = module(x)
    fmecompile.optimize(module, backend="inductor")
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler") as told:
        assert relative(module(x), want) <= 1e-10
    assert len(told) == 1 and not kernels(module)


@pytest.mark.parametrize(
    ("name", "near"), [("inducter", "near it are inductor"), ("tensorrt", "there are"), (3, "there are")]
)
def test_unknown_backends(name: object, near: str) -> None:
    with pytest.raises(OptionError, match=near):
        fmecompile.optimize(blocks(), backend=name)  # type: ignore[arg-type]
