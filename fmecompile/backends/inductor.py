"""The Inductor backend: what stands between library calls in loop bodies, and between loops, becomes compiled kernels.

Inductor never sees a loop, nor a call of a library: each distinct run of fusible operators (``fuse-runs``) is lowered
once, for the shapes of one chunk, and shared by everything of that structure in this process. Operands are arguments,
weights included, so a change in place is seen.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fmecompile.errors import BackendError, OptionError, near
from fmecompile.graph import edit
from fmecompile.graph.specs import spec_of, tensor_spec
from fmecompile.graph.structure import structure
from fmecompile.runtime.fused import FusedRun, Kernel
from fmecompile.runtime.measure import rounded_bytes

_OPTIONS: dict[str, Any] = {
    "layout_optimization": False,  # results have the strides that the rest of the program was planned with
    "freezing": False,  # weights stay live
    "fx_graph_cache": False,  # what a kernel allocates is told while it is lowered; its C++ is cached all the same
    "compile_threads": 1,  # a kernel at a time: a pool of workers takes longer to start than it saves
    "size_asserts": False,  # the program was planned for these shapes, and a signature lets no others in
    "triton.cudagraphs": False,
}

_TRUSTED: dict[str, Any] = {"cpp.vec_isa_ok": True}
"""The compiler knows the vectors of the processor: Inductor tries each kind otherwise, which takes it longer than most
kernels."""

BACKENDS = ("eager", "inductor")

_made: weakref.WeakValueDictionary[Any, FusedRun] = weakref.WeakValueDictionary()
_failed: set[Any] = set()
_lock = threading.RLock()
"""Inductor works on state of the whole process."""


def fuse_by(backend: object, strict: bool = False) -> Inductor | None:
    """What makes the kernels of a backend, by its name; None where it has none. Raises OptionError for another name."""
    if backend not in BACKENDS:
        told = " and ".join(map(repr, BACKENDS))
        raise OptionError(
            f"there is no backend {backend!r}", next_step=near(str(backend), BACKENDS, f"there are {told}")
        )
    return Inductor(strict) if backend == "inductor" else None


@dataclass(frozen=True)
class Inductor:
    """Makes kernels. Where one fails, its operators stay eager with one warning; ``strict`` makes that a
    BackendError."""

    strict: bool = False
    told: set[str] = field(default_factory=set, compare=False)

    def __call__(self, operators: fx.GraphModule, room_bytes: int) -> FusedRun | None:
        """One call of ``operators`` that allocates ``room_bytes`` at most; None where there is none."""
        missing = _missing(operators)
        if missing:
            self._tell(f"backend='inductor' needs {missing}, and there is none", "install one, or use backend='eager'")
            return None
        with _lock:
            run = self._run(operators)
        return run if run is not None and run.allocated_bytes <= room_bytes else None

    def _run(self, operators: fx.GraphModule) -> FusedRun | None:
        key = structure(operators.graph)
        run = _made.get(key)
        if run is None and key not in _failed:
            try:
                run = _made[key] = _compile(operators)
            except Exception as error:  # whatever a compiler may raise: the operators run without it
                names = ", ".join(str(node.target) for node in operators.graph.nodes if node.op == "call_function")
                self._tell(f"Inductor compiles no kernel of {names}: {_reason(error)}", "use backend='eager'", error)
                _failed.add(key)
        return run

    def _tell(self, fact: str, next_step: str, error: Exception | None = None) -> None:
        if self.strict:
            raise BackendError(fact, next_step=f"{next_step}, or leave out strict") from error
        if fact not in self.told:
            self.told.add(fact)
            warnings.warn(f"{fact}; these operators run eagerly\n  next: {next_step}", UserWarning, stacklevel=2)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _missing(operators: fx.GraphModule) -> str:
    """What kernels of ``operators`` need and this machine has not."""
    return missing_compiler({tensor_spec(n).device.type for n in operators.graph.nodes if n.op == "placeholder"})


def missing_compiler(devices: set[str]) -> str:
    """What kernels on such devices need and this machine has not, in words; empty where it has all."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    if devices != {"cpu"}:
        return "" if has_triton() else "Triton"
    try:
        get_cpp_compiler()
    except RuntimeError:
        return "a C++ compiler"
    return ""


def _compile(operators: fx.GraphModule) -> FusedRun:
    """Raises what tracing, lowering or the C++ compiler raise."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.exc import CppCompileError

    mode = FakeTensorMode()
    with torch.no_grad(), mode:
        specs = [tensor_spec(node) for node in operators.graph.nodes if node.op == "placeholder"]
        fakes = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in specs]
        traced = make_fx(operators, decomposition_table=select_decomp_table())(*fakes)
    results = [spec_of(node.meta["val"]) for node in traced.graph.output_node().args[0]]  # type: ignore[union-attr]
    edit.keep_layout(traced.graph)
    try:
        kernel, buffers = _lowered(traced, fakes, mode, _OPTIONS | _TRUSTED)
    except CppCompileError:
        _forget_vectors()
        kernel, buffers = _lowered(traced, fakes, mode, _OPTIONS)
    if buffers.strides != [spec.stride for spec in results]:
        raise NotImplementedError(f"its results would have other strides, {buffers.strides}")
    return FusedRun(
        operators, kernel, [s.stride for s in specs], [(s.shape, s.stride, s.dtype) for s in results], buffers.nbytes
    )


def _lowered(
    traced: fx.GraphModule, fakes: list[torch.Tensor], mode: FakeTensorMode, options: dict[str, Any]
) -> tuple[Kernel, _Buffers]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    buffers = _Buffers()
    context = TracingContext(mode)
    with (
        torch.no_grad(),
        tracing(context),
        config.patch({**options, "_post_fusion_custom_pass": buffers}),
    ):
        return compile_fx_inner(copy.deepcopy(traced), fakes), buffers  # type: ignore[return-value]


def _forget_vectors() -> None:
    """Let Inductor find out by itself which vectors the compiler knows."""
    from torch._inductor import cpu_vec_isa

    for cached in (cpu_vec_isa.valid_vec_isa_list, cpu_vec_isa.VecISA.__bool__impl):
        getattr(cached, "cache_clear", lambda: None)()


class _Buffers:
    """The bytes that a kernel allocates, results included, and the strides of its results. A pass of Inductor that
    changes nothing."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.strides: list[tuple[int, ...]] = []

    def __call__(self, nodes: Sequence[Any]) -> Sequence[Any]:
        from torch._inductor.virtualized import V

        self.strides = [tuple(int(step) for step in result.get_stride()) for result in V.graph.graph_outputs]
        for node in nodes:
            inside = {part.get_name() for part in node.get_nodes()}
            for buffer in node.get_outputs():
                if any(user.node.get_name() not in inside for user in buffer.users):
                    layout = buffer.node.get_layout()
                    self.nbytes += rounded_bytes(int(layout.storage_size()) * layout.dtype.itemsize)
        return nodes
