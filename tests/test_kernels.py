"""Kernels beside their references: under Triton's interpreter, on fake tensors, in graphs, and without Triton.

The interpreter must be asked for before Triton is imported the first time, and torch may import it anywhere. So what it
runs is in ``interpreted_kernels.py``, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import fmecompile
from fmecompile import config
from fmecompile.capture.export import capture
from fmecompile.errors import OptionError
from fmecompile.graph.invariants import check
from fmecompile.graph.program import compute_nodes
from fmecompile.kernels import blend, geglu, group_norm, registry, temporal_attention
from fmecompile.kernels.blend import BLEND
from fmecompile.kernels.geglu import GEGLU
from fmecompile.kernels.group_norm import GROUP_NORM_APPLY, GROUP_NORM_MOMENTS
from fmecompile.kernels.registry import KERNELS, why_not
from fmecompile.kernels.temporal_attention import TEMPORAL_ATTENTION
from fmecompile.passes.kernels import Kernels
from fmecompile.passes.spatial_layout import SpatialLayout
from fmecompile.pipeline import KERNEL_PASSES, Compilation, finish, lower, normalise
from fmecompile.runtime.executable import Executable
from tests.models import animatediff_call, as_dtype, small_animatediff, small_svd, svd_call, twin

HERE = Path(__file__).parent
F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


needs_triton = pytest.mark.skipif(registry.triton is None, reason="Triton is not installed; next: pip install triton")

CALLS: dict[str, tuple[Any, ...]] = {
    "group_norm_moments": (noise(2, 8, 3, 4, 5), 4),
    "group_norm_apply": (noise(2, 8, 3, 5), noise(2, 2, 4), noise(8), noise(8), True, [0, 2, 3, 1]),
    "geglu": (noise(3, 4, 10), True),
    "temporal_attention": (noise(2, 5, 3, 2, 4), noise(2, 6, 3, 2, 4), noise(2, 6, 3, 2, 4), 0.3),
    "blend": (noise(2, 1, 1), noise(2, 3, 4), noise(2, 3, 4), noise(2, 3, 4)),
}


def test_every_kernel_is_called_here() -> None:
    assert CALLS.keys() == KERNELS.keys()


@needs_triton
def test_kernels_equal_their_references() -> None:
    """The tests of ``interpreted_kernels.py``, where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted_kernels.py"),
    ]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


class Recorder:
    """Stands for a kernel: keeps what it is called with."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._record

    def _record(self, *args: Any) -> None:
        self.args = args


FUNCTIONS = {
    "group_norm_moments": (group_norm, "_moments"),
    "group_norm_apply": (group_norm, "_apply"),
    "geglu": (geglu, "_kernel"),
    "temporal_attention": (temporal_attention, "_kernel"),
    "blend": (blend, "_kernel"),
}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", F64: "*fp64"}


def types_of(function: Any, args: tuple[Any, ...]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """What Triton compiles a kernel for when it is called with ``args``: types, and values that it takes as constant,
    every 1 among them."""
    constants: dict[Any, Any] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, tuple):
            return tuple(kind(item, (*path, k)) for k, item in enumerate(value))
        if function.params[path[0]].is_constexpr or value == 1:
            constants[path] = value
            return "constexpr"
        return "fp32" if isinstance(value, float) else "i32"

    return {
        name: kind(arg, (k,)) for k, (name, arg) in enumerate(zip(function.arg_names, args, strict=True))
    }, constants


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile_for_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to its machine code, with the types of a real call; the GPU need not be there."""
    kernel, (module, attribute), args = KERNELS[name], FUNCTIONS[name], as_dtype(CALLS[name], dtype)
    function, recorder = getattr(module, attribute), Recorder()
    monkeypatch.setattr(module, attribute, recorder)
    kernel.launch(kernel.empty(*args), *args)
    signature, constants = types_of(function, recorder.args)
    source = registry.triton.compiler.ASTSource(function, signature, constants)
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    assert registry.triton.compile(source, target=target).asm["cubin"]


@pytest.mark.parametrize("name", KERNELS)
def test_an_operator_is_what_torch_expects(name: str) -> None:
    """Schema, fake tensors and what is aliased, checked by torch."""
    kernel = KERNELS[name]
    torch.library.opcheck(kernel.target, CALLS[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16], ids=str)
def test_fake_tensors_are_laid_out_as_real_ones(name: str, dtype: torch.dtype) -> None:
    kernel, args = KERNELS[name], as_dtype(CALLS[name], dtype)
    if name == "group_norm_apply" and dtype != F64:
        args = (args[0], args[1].float(), *args[2:])
    permuted = [a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in args]
    for given in (args, permuted):
        real = kernel.target(*given)
        with FakeTensorMode() as mode:
            fake = kernel.target(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


BAD: list[tuple[Any, tuple[Any, ...], str]] = [
    (GEGLU, (noise(4, 7),), "two halves"),
    (GEGLU, (noise(),), "two halves"),
    (BLEND, (noise(5), noise(2, 3, 4), noise(2, 3, 4)), "broadcast"),
    (BLEND, (noise(4), noise(3, 4), noise(2, 3, 4)), "broadcast"),
    (BLEND, (noise(4).float(), noise(3, 4), noise(3, 4)), "one type"),
    (GROUP_NORM_MOMENTS, (noise(2, 8, 3), 3), "divides C"),
    (GROUP_NORM_MOMENTS, (noise(2, 8), 2), "D1"),
    (GROUP_NORM_MOMENTS, (noise(2, 8, 3), 0), "divides C"),
    (GROUP_NORM_APPLY, (noise(3, 8, 4), noise(2, 2, 4)), "batch of N"),
    (GROUP_NORM_APPLY, (noise(2, 8, 4), noise(2, 2, 3)), "divides C"),
    (GROUP_NORM_APPLY, (noise(2, 8, 4), noise(2, 2, 4), None, None, False, [0, 2, 2]), "each of them once"),
    (TEMPORAL_ATTENTION, (noise(2, 4, 3, 2, 5), noise(2, 4, 3, 1, 5), noise(2, 4, 3, 1, 5)), "differ in T"),
    (TEMPORAL_ATTENTION, (noise(2, 4, 3, 2), noise(2, 4, 3, 2), noise(2, 4, 3, 2)), "(B, T, S, H, D)"),
    (TEMPORAL_ATTENTION, (noise(1, 4, 3, 2, 5), noise(1, 4, 3, 2, 5).float(), noise(1, 4, 3, 2, 5)), "one type"),
]


@pytest.mark.parametrize(("target", "args", "words"), BAD)
def test_bad_operands_are_refused(target: Any, args: tuple[Any, ...], words: str) -> None:
    """Before memory is touched, and on fake tensors too."""
    with pytest.raises(OptionError) as caught:
        target(*args)
    assert words in str(caught.value) and "next:" in str(caught.value)
    with FakeTensorMode() as mode, pytest.raises(OptionError):
        target(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


def test_cuda_without_triton_runs_references_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "triton", None)
    registry._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert not any(registry.is_launched(torch.device("cuda")) for _ in range(3))
    assert len(seen) == 1 and "pip install triton" in str(seen[0].message)


def test_a_cpu_runs_references_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "IS_INTERPRETED", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not registry.is_launched(torch.device("cpu"))
    for triton in (None, object()):
        monkeypatch.setattr(registry, "triton", triton)
        assert why_not(torch.device("cpu"))
    assert why_not(torch.device("cuda")) == ""


# -------------------------------------------------------------------------------------------------- graphs with kernels


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(OptionError, match="'flash'"):
        Kernels(frozenset({"flash"}))


UNETS = pytest.mark.parametrize(
    ("build", "call"),
    [(small_svd, svd_call), pytest.param(small_animatediff, animatediff_call, marks=pytest.mark.slow)],
)


@cache
@torch.no_grad()
def unet(build: Callable[[], nn.Module], call: Callable[..., Any]) -> tuple[nn.Module, Any, Compilation]:
    """A small UNet in float64, its arguments, and its normalised program, which is to be copied."""
    module, args = build().to(torch.float64), call(2, 3, 8, 8, torch.float64)
    return module, args, normalised(module, args)


def copy(compilation: Compilation) -> Compilation:
    return replace(compilation, program=compilation.program.copy())


@torch.no_grad()
def normalised(module: nn.Module, args: Any) -> Compilation:
    compilation = Compilation(capture(module, args, {}))
    normalise(compilation)
    return compilation


def with_kernels(compilation: Compilation) -> Compilation:
    for item in KERNEL_PASSES["reference"]:
        item.apply(compilation.program, compilation.facts)
    check(compilation.program)
    return compilation


@torch.no_grad()
def run(compiled: Any, module: nn.Module, args: Any) -> torch.Tensor:
    return tree_leaves(Executable(compiled, module)(tree_leaves(args)))[0]


def calls(compilation: Compilation) -> Counter[str]:
    return Counter(str(node.target) for node in compute_nodes(compilation.program.graph))


def modules(model: nn.Module, *names: str) -> int:
    """How many modules of ``model`` have one of these class names."""
    return sum(type(module).__name__ in names for module in model.modules())


def test_on_a_cpu_nothing_is_rewritten() -> None:
    compilation = normalised(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), (torch.randn(2, 8, 4),))
    before = str(compilation.program.graph)
    assert Kernels().apply(compilation.program, compilation.facts).startswith("no kernel: ")
    assert str(compilation.program.graph) == before


def test_a_cuda_device_has_kernels_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for it is on fake tensors then, and planned as where it would run; Triton may be missing."""
    monkeypatch.setattr(registry, "triton", None)
    registry._warn_once.cache_clear()
    cuda = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert registry.why_not_planned(cuda) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="pip install triton"):
        assert registry.why_not_planned(cuda)
    monkeypatch.setattr(registry, "IS_INTERPRETED", True)
    monkeypatch.setattr(registry, "triton", object())
    assert registry.why_not_planned(torch.device("cpu")) and not registry.why_not_planned(cuda)


def gated(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, -1)
    return value * nn.functional.gelu(gate)


class Gated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gated(x)


@pytest.mark.parametrize(("setting", "is_used"), [("reference", True), ("off", False), ("auto", False)])
def test_the_environment_says_where_kernels_are_used(
    setting: str, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMECOMPILE_KERNELS", setting)
    module, x = fmecompile.optimize(Gated().eval(), strict=True), noise(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(module(x), gated(x), rtol=1e-12, atol=1e-12)
    notes = dict(fmecompile.explain(module).records[0].notes)
    assert ("1 geglu" in notes.get("kernels", "")) == is_used
    assert ("kernels" in notes) == (setting != "off")


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMECOMPILE_KERNELS", "yes")
    with pytest.raises(OptionError, match="FMECOMPILE_KERNELS='yes'"):
        config.kernels()


@UNETS
def test_every_pattern_of_a_unet_becomes_a_kernel(build: Callable[[], nn.Module], call: Callable[..., Any]) -> None:
    """Frames and tokens are so few that all attention is small, but that over the text."""
    module, _, given = unet(build, call)
    compilation = with_kernels(copy(given))
    found = calls(compilation)
    norms = modules(module, "GroupNorm")
    assert found["fmecompile.group_norm_moments.default"] == found["fmecompile.group_norm_apply.default"] == norms
    assert found["fmecompile.geglu.default"] == modules(module, "GEGLU")
    assert found["fmecompile.blend.default"] == modules(module, "AlphaBlender")
    assert found["fmecompile.temporal_attention.default"] > 0
    assert not found["aten.gelu.default"]


def swaps(compilation: Compilation) -> list[fx.Node]:
    """Permutations of frames and tokens."""
    nodes = compute_nodes(compilation.program.graph)
    swap = torch.ops.aten.permute.default
    return [node for node in nodes if node.target is swap and node.args[1] == [0, 2, 1, 3]]


def test_permutations_around_temporal_layers_vanish() -> None:
    module, _, given = unet(small_svd, svd_call)
    compilation = copy(given)
    layers = modules(module, "TemporalBasicTransformerBlock")
    assert len(swaps(compilation)) == 2 * layers
    Kernels(everywhere=True).apply(compilation.program, compilation.facts)
    note = SpatialLayout().apply(compilation.program, compilation.facts)
    assert note.startswith(f"{layers} temporal layers")
    assert not swaps(compilation)


@UNETS
@torch.no_grad()
def test_unets_of_references_are_exact(build: Callable[[], nn.Module], call: Callable[..., Any]) -> None:
    """As graphs, and with loops: kernels keep what loops cut without them, so the peak is no higher."""
    module, args, given = unet(build, call)
    want = module(*args).sample
    compilation = with_kernels(copy(given))
    whole = copy(compilation)
    assert relative(run(finish(whole), module, args), want) <= 1e-10
    compiled, plan = lower(compilation)
    assert plan.groups
    assert relative(run(compiled, module, args), want) <= 1e-10
    assert not any("fmecompile." in barrier.operator and "no axis rule" in barrier.reason for barrier in plan.barriers)
    _, without = lower(copy(given))
    assert plan.floor_bytes <= 1.03 * without.floor_bytes
    assert plan.projected_peak_bytes <= 1.03 * without.projected_peak_bytes


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@UNETS
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_unets_of_references_are_as_good_as_eager(build: Any, call: Any, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded weights and inputs, at most 1.5 times eager's own error."""
    module = build().to(dtype)
    args = call(2, 3, 8, 16, dtype)
    reference = twin(module, torch.float64)(*as_dtype(args, torch.float64)).sample
    eager = (module(*args).sample.double() - reference).norm()
    ours = run(finish(with_kernels(normalised(module, args))), module, args)
    assert eager > 0
    assert (ours.double() - reference).norm() <= 1.5 * eager
