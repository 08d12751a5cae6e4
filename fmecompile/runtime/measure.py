"""Measured bytes: the live storages during a real or fake run.

The counterpart of the memory model's projection. Every storage that an operator allocates is counted from its
allocation to its release, rounded up to 512 bytes as the CUDA caching allocator rounds. Weights and inputs exist
before the call and are not counted. Works on CPU, CUDA and fake tensors alike because it watches dispatched
operators, not the device.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from fmecompile.runtime.host import is_host
from fmecompile.runtime.watch import Label, watched_by

ROUNDING_BYTES = 512


def rounded_bytes(nbytes: int) -> int:
    """``nbytes`` rounded up to the allocator's block of 512 bytes; 0 stays 0."""
    return -(-nbytes // ROUNDING_BYTES) * ROUNDING_BYTES


def storage_bytes(tensor: torch.Tensor) -> int:
    """What the storage of ``tensor`` takes on the device; nothing when it waits in host memory."""
    return 0 if is_host(tensor) else rounded_bytes(tensor.untyped_storage().nbytes())


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of storages allocated while it is active and still alive.

    ``known`` are tensors whose storages exist already (weights, inputs): they are never counted. ``current_bytes``
    follows releases as they happen; ``peak_bytes`` can be reset with :meth:`reset_peak`. ``timeline`` holds
    ``current_bytes`` after each dispatched operator when asked for, ``times_s`` the :meth:`clock` then.
    """

    def __init__(self, known: Any = (), *, keep_timeline: bool = False) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self.timeline: list[int] | None = [] if keep_timeline else None
        self.times_s: list[float] = []
        self._own_s = 0.0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for leaf in tree_leaves(known):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf, 0)

    def reset_peak(self) -> None:
        self.peak_bytes = self.current_bytes

    def clock(self) -> float:
        """Seconds, without those that counting itself took."""
        return time.perf_counter() - self._own_s

    def _watch(self, tensor: torch.Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        def release(_: object, key: int = key, nbytes: int = nbytes) -> None:
            self._alive.pop(key, None)
            self.current_bytes -= nbytes

        self._alive[key] = weakref.ref(storage, release)
        self.current_bytes += nbytes

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count new tensors."""
        for tensor in tensors:
            self._watch(tensor, storage_bytes(tensor))
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        start = time.perf_counter()
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._alive:
                self._watch(leaf, 0 if _is_alias(leaf, args) else storage_bytes(leaf))
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        if self.timeline is not None:
            self.timeline.append(self.current_bytes)
            self.times_s.append(start - self._own_s)
        self._own_s += time.perf_counter() - start
        return result


def count_allocated(tensors: Iterable[torch.Tensor]) -> None:
    """Tell the meters that are active of tensors that were allocated where they could not see it."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, StorageMeter):
            mode.count(tensors)


def _is_alias(result: torch.Tensor, args: Any) -> bool:
    """Whether ``result`` is a view of a tensor that existed before: then its storage is not new."""
    key = result.untyped_storage()._cdata
    return any(isinstance(t, torch.Tensor) and t.untyped_storage()._cdata == key for t in tree_leaves(args))


TRIP = "trip"


@dataclass(frozen=True)
class Span:
    """A chunk loop by its name, or a ``trip`` of the one that began last; seconds from the start of the call."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Measurement:
    """What one call held at most. All figures are bytes beyond weights and inputs; CUDA figures are None elsewhere.

    ``timeline`` has an entry an operator, and ``times_s`` tells when each had run, in seconds from the start of the
    call; ``modules`` are the sub-modules that ran, each with the entry that it began at; ``spans`` tell when chunk
    loops ran, and on a CPU their trips. Counting takes time of its own, which is left out. Fake tensors take no time.
    """

    peak_bytes: int
    output: Any
    timeline: tuple[int, ...]
    cuda_allocated_bytes: int | None = None
    cuda_reserved_bytes: int | None = None
    nvml_used_bytes: int | None = None
    times_s: tuple[float, ...] = ()
    modules: tuple[tuple[str, int], ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def group_s(self) -> dict[int, float]:
        """Seconds in each chunk loop, by the place of its group in the plan."""
        found: dict[int, float] = {}
        for span in self.spans:
            place = span.name.rpartition("_")[2]
            if span.name != TRIP and place.isdecimal():
                found[int(place)] = found.get(int(place), 0.0) + span.end_s - span.start_s
        return found


def measure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Measurement:
    """Call ``function(*args, **kwargs)`` without gradients and measure the peak of live storages.

    ``function`` may be an ``nn.Module`` (its parameters and buffers are not counted) or any callable. On CUDA the
    allocator's peaks (allocated, reserved) and NVML's figure for the device are reported beside it.
    """
    known: list[Any] = [args, kwargs]
    if isinstance(function, nn.Module):
        known += [list(function.parameters()), list(function.buffers())]
    return measured(lambda: function(*args, **kwargs), known, function if isinstance(function, nn.Module) else None)


def measured(call: Callable[[], Any], known: Any, module: nn.Module | None) -> Measurement:
    """The same of ``call``, where the tensors in ``known`` are not counted; sub-modules of ``module`` are told."""
    meter = StorageMeter(known, keep_timeline=True)
    timer = _Timer(meter, next((t.device for t in tree_leaves(known) if _is_real_cuda(t)), None))
    assert meter.timeline is not None
    with ExitStack() as around:
        runs = around.enter_context(_running(module, meter.timeline)) if module is not None else []
        around.enter_context(torch.no_grad())
        around.enter_context(watched_by(timer))
        cuda = around.enter_context(_cuda_peaks(timer.device))
        around.enter_context(meter)
        start = meter.clock()
        output = call()
    times: list[float] = [] if _is_fake(known) else [at - start for at in meter.times_s]
    spans = [Span(name, first - start, last - start) for name, first, last in sorted(timer.spans, key=_by_time)]
    told = tuple(times), tuple(runs), tuple(spans) if times else ()
    timeline = tuple(meter.timeline)
    return Measurement(meter.peak_bytes, output, timeline, times_s=told[0], modules=told[1], spans=told[2], **cuda)


class _Timer:
    """Watches loops: when each began and ended by the meter's clock. Trips on a GPU only start while they are seen, so
    that loops alone are timed there, each waited for."""

    def __init__(self, meter: StorageMeter, device: torch.device | None) -> None:
        self.device, self.spans = device, list[tuple[str, float, float]]()
        self._meter = meter

    @contextmanager
    def __call__(self, label: Label | None) -> Iterator[None]:
        if self.device is not None and (label is None or torch.cuda.is_current_stream_capturing()):
            yield
            return
        start = self._now()
        yield
        self.spans.append((TRIP if label is None else label.name, start, self._now()))

    def _now(self) -> float:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        return self._meter.clock()


def _by_time(span: tuple[str, float, float]) -> tuple[float, float]:
    """Loops stand in front of their trips."""
    return span[1], -span[2]


@contextmanager
def _running(module: nn.Module, timeline: list[int]) -> Iterator[list[tuple[str, int]]]:
    """While this lasts, which sub-module of ``module`` this thread runs, and from which entry of ``timeline`` on. The
    module itself is not touched."""
    names = {id(inner): name for name, inner in module.named_modules()}
    runs: list[tuple[str, int]] = []
    inside = [""]
    thread = threading.get_ident()

    def begin(inner: nn.Module, *_: Any) -> None:
        if id(inner) in names and threading.get_ident() == thread:
            inside.append(names[id(inner)])
            runs.append((inside[-1], len(timeline)))

    def end(inner: nn.Module, *_: Any) -> None:
        if id(inner) in names and threading.get_ident() == thread and len(inside) > 1:
            inside.pop()
            runs.append((inside[-1], len(timeline)))

    hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True)
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def _is_fake(known: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(known))


@contextmanager
def _cuda_peaks(device: torch.device | None) -> Iterator[dict[str, int]]:
    figures: dict[str, int] = {}
    if device is None:
        yield figures
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield figures
    torch.cuda.synchronize(device)
    figures["cuda_allocated_bytes"] = torch.cuda.max_memory_allocated(device) - before
    figures["cuda_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    used = _nvml_used_bytes(device)
    if used is not None:
        figures["nvml_used_bytes"] = used


def _is_real_cuda(leaf: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(leaf, torch.Tensor) and leaf.is_cuda and not isinstance(leaf, FakeTensor)


def _nvml_used_bytes(device: torch.device) -> int | None:
    """Bytes in use on the device as NVML sees them (all processes), or None where NVML is not there."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None
