"""The Inductor backend: what stands between library calls in loop bodies, and between loops, becomes compiled kernels.

Inductor never sees a loop, nor a call of a library: each distinct run of fusible operators (``fuse-runs``) is lowered
once, for the shapes of one chunk, and shared by everything of that structure in this process. Operands are arguments,
weights included, so a change in place is seen.
"""

from __future__ import annotations

import difflib
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fmecompile.errors import BackendError, OptionError
from fmecompile.graph.specs import spec_of, tensor_spec
from fmecompile.graph.structure import structure
from fmecompile.runtime.fused import FusedRun, Kernel
from fmecompile.runtime.measure import rounded_bytes

_OPTIONS: dict[str, Any] = {
    "layout_optimization": False,  # results have the strides that the rest of the program was planned with
    "freezing": False,  # weights stay live
    "compile_threads": 1,  # a kernel at a time: a pool of workers takes longer to start than it saves
    "size_asserts": False,  # the program was planned for these shapes, and a signature lets no others in
    "triton.cudagraphs": False,
}

_compiled: weakref.WeakValueDictionary[Any, FusedRun] = weakref.WeakValueDictionary()
_failed: set[Any] = set()


BACKENDS = ("eager", "inductor")


def fuse_by(backend: object, strict: bool = False) -> Inductor | None:
    """What makes the kernels of a backend, by its name; None where it has none. Raises OptionError for another name."""
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), BACKENDS, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        told = " and ".join(map(repr, BACKENDS))
        raise OptionError(f"there is no backend {backend!r}", next_step=f"{meant}there are {told}")
    return Inductor(strict) if backend == "inductor" else None


@dataclass(frozen=True)
class Inductor:
    """Makes kernels. Where one fails, its operators stay eager with one warning; ``strict`` makes that a
    BackendError."""

    strict: bool = False

    def __call__(self, operators: fx.GraphModule, room_bytes: int) -> FusedRun | None:
        """One call of ``operators`` that allocates ``room_bytes`` at most; None where there is none."""
        key = structure(operators.graph)
        run = _compiled.get(key)
        if run is None and key not in _failed:
            try:
                run = _compiled[key] = _compile(operators)
            except Exception as error:  # whatever a compiler may raise: the operators run without it
                _failed.add(key)
                self._tell(operators, error)
        return run if run is not None and run.allocated_bytes <= room_bytes else None

    def _tell(self, operators: fx.GraphModule, error: Exception) -> None:
        names = ", ".join(str(node.target) for node in operators.graph.nodes if node.op == "call_function")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fact = f"Inductor compiles no kernel of {names}: {type(error).__name__}: {reason}"
        if self.strict:
            raise BackendError(fact, next_step="use backend='eager', or leave out strict") from error
        warnings.warn(f"{fact}; these operators run eagerly", UserWarning, stacklevel=2)


def _compile(operators: fx.GraphModule) -> FusedRun:
    """Raises what tracing, lowering or the C++ compiler raise."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    places = [node for node in operators.graph.nodes if node.op == "placeholder"]
    results = [tensor_spec(node) for node in operators.graph.output_node().args[0]]  # type: ignore[union-attr]
    sizes = _Allocations()
    mode = FakeTensorMode()
    with torch.no_grad(), mode:
        specs = [tensor_spec(place) for place in places]
        fakes = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in specs]
        traced = make_fx(operators, decomposition_table=select_decomp_table())(*fakes)
    made = [spec_of(node.meta["val"]) for node in traced.graph.output_node().args[0]]  # type: ignore[union-attr]
    if made != results:
        raise NotImplementedError(f"the results would be laid out as {made}, and are read as {results}")
    context = torch._guards.TracingContext(mode)
    with torch.no_grad(), torch._guards.tracing(context), config.patch({**_OPTIONS, "_post_fusion_custom_pass": sizes}):
        kernel: Kernel = compile_fx_inner(traced, fakes)  # type: ignore[assignment]
    return FusedRun(operators, kernel, [(s.shape, s.stride, s.dtype) for s in results], sizes.nbytes)


class _Allocations:
    """Adds up the buffers that a kernel allocates, results included; as a pass of Inductor it changes nothing."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, nodes: Sequence[Any]) -> Sequence[Any]:
        for node in nodes:
            inside = {part.get_name() for part in node.get_nodes()}
            for buffer in node.get_outputs():
                users = {user.node.get_name() for user in buffer.users}
                if not users <= inside:
                    self.nbytes += rounded_bytes(buffer.node.get_layout().storage_size() * buffer.node.get_dtype().itemsize)
        return nodes

    def uuid(self) -> None:
        """Not part of the key of cached kernels."""
