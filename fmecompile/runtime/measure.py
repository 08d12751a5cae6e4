"""Measured bytes: the live storages during a real or fake run.

The counterpart of the memory model's projection. Every storage that an operator allocates is counted from its
allocation to its release, rounded up to 512 bytes as the CUDA caching allocator rounds. Weights and inputs exist
before the call and are not counted. Works on CPU, CUDA and fake tensors alike because it watches dispatched
operators, not the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmecompile.runtime.host import is_host

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
    ``current_bytes`` after each dispatched operator when asked for.
    """

    def __init__(self, known: Any = (), *, keep_timeline: bool = False) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self.timeline: list[int] | None = [] if keep_timeline else None
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for leaf in tree_leaves(known):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf, 0)

    def reset_peak(self) -> None:
        self.peak_bytes = self.current_bytes

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._alive:
                self._watch(leaf, 0 if _is_alias(leaf, args) else storage_bytes(leaf))
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        if self.timeline is not None:
            self.timeline.append(self.current_bytes)
        return result


def _is_alias(result: torch.Tensor, args: Any) -> bool:
    """Whether ``result`` is a view of a tensor that existed before: then its storage is not new."""
    key = result.untyped_storage()._cdata
    return any(isinstance(t, torch.Tensor) and t.untyped_storage()._cdata == key for t in tree_leaves(args))


@dataclass(frozen=True)
class Measurement:
    """What one call held at most. All figures are bytes beyond weights and inputs; CUDA figures are None elsewhere."""

    peak_bytes: int
    output: Any
    timeline: tuple[int, ...]
    cuda_allocated_bytes: int | None = None
    cuda_reserved_bytes: int | None = None
    nvml_used_bytes: int | None = None


def measure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Measurement:
    """Call ``function(*args, **kwargs)`` without gradients and measure the peak of live storages.

    ``function`` may be an ``nn.Module`` (its parameters and buffers are not counted) or any callable. On CUDA the
    allocator's peaks (allocated, reserved) and NVML's figure for the device are reported beside it.
    """
    known = [args, kwargs]
    if isinstance(function, torch.nn.Module):
        known += [list(function.parameters()), list(function.buffers())]
    meter = StorageMeter(known, keep_timeline=True)
    with torch.no_grad(), _cuda_peaks(known) as cuda, meter:
        output = function(*args, **kwargs)
    return Measurement(meter.peak_bytes, output, tuple(meter.timeline or ()), **cuda)


@contextmanager
def _cuda_peaks(known: Any) -> Iterator[dict[str, int]]:
    figures: dict[str, int] = {}
    device = next((t.device for t in tree_leaves(known) if _is_real_cuda(t)), None)
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
