"""Values that wait in host memory: copied out, and back when they are read again.

Copies run on a stream of their own, so that they overlap with what the device computes meanwhile; the memory they read
or fill is kept until both streams are done with it. At most two copies back are under way, the one in use and the one
that is fetched ahead. On a CPU device the same calls copy in order: host storages are marked, and not counted as bytes
of the device.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque

import torch
from torch._subclasses.fake_tensor import FakeTensor

_COPIES = 2
"""Copies back that may be under way: the one in use, and the one that is fetched ahead."""
_host: dict[int, weakref.ref[torch.UntypedStorage]] = {}
_lanes = threading.local()


def is_host(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` lies in host memory that stands for device memory."""
    return tensor.untyped_storage()._cdata in _host or vars(_lanes).get("is_allocating", False)


def host_empty(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Host memory for a tensor of ``device``: pinned where that is a CUDA device."""
    _lanes.is_allocating = True  # whoever counts storages meets this one before it can be marked
    try:
        pinned = device.type == "cuda" and not isinstance(torch.empty(0, device="cpu"), FakeTensor)
        host = torch.empty_strided(shape, stride, dtype=dtype, device="cpu", pin_memory=pinned)
    finally:
        _lanes.is_allocating = False
    storage = host.untyped_storage()
    key = storage._cdata
    _host[key] = weakref.ref(storage, lambda _: _host.pop(key, None))
    return host


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` in host memory, dense and with its axes in the same order in memory."""
    host = host_empty(tuple(x.shape), _dense(x), x.dtype, x.device)
    copy_out(host, x)
    return host


def _dense(x: torch.Tensor) -> tuple[int, ...]:
    """Strides without gaps, axes in the order they have in the memory of ``x``."""
    strides, step = [0] * x.ndim, 1
    for d in sorted(range(x.ndim), key=lambda d: (x.stride(d) or sys.maxsize, -d)):
        strides[d] = step
        step *= max(x.shape[d], 1)
    return tuple(strides)


def copy_out(host: torch.Tensor, x: torch.Tensor) -> None:
    """Copy ``x`` into host memory; on CUDA beside what is computed next."""
    lane = _lane(x)
    if lane is None:
        host.copy_(x)
        return
    lane.stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(lane.stream):
        host.copy_(x, non_blocking=True)
    x.record_stream(lane.stream)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of host memory on ``device``; on CUDA it starts as soon as the copy before the last was used up.

    Its memory belongs to the stream of copies: a block of the computing stream might still be read by what was asked of
    that before, while the copy fills it. The host waits too, or it would run ahead and ask for copies without end.
    """
    lane = _lane(torch.empty(0, device=device))
    if lane is None:
        return torch.empty_like(host, device=device).copy_(host)
    compute = torch.cuda.current_stream(device)
    here = torch.cuda.Event()
    here.record(compute)
    lane.used.append(here)
    if len(lane.used) == _COPIES:
        lane.used[0].synchronize()
    with torch.cuda.stream(lane.stream):
        x = torch.empty_like(host, device=device)
        x.copy_(host, non_blocking=True)
    compute.wait_stream(lane.stream)
    x.record_stream(compute)
    return x


class _Lane:
    """The stream for copies of one device, and where the compute streams stood at the last copies back."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.used: deque[torch.cuda.Event] = deque(maxlen=_COPIES)


def _lane(x: torch.Tensor) -> _Lane | None:
    if not x.is_cuda or isinstance(x, FakeTensor):
        return None
    lanes: dict[torch.device, _Lane] = vars(_lanes).setdefault("by_device", {})
    if x.device not in lanes:
        lanes[x.device] = _Lane(x.device)
    return lanes[x.device]
