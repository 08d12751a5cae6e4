"""How fast a device computes and how fast values travel between it and host memory: measured once, or assumed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

ASSUMED_BYTES_PER_S = 20e9
"""Pinned host memory over PCIe 4 with 16 lanes, one direction."""
ASSUMED_PRODUCTS_PER_S = 20e12
"""Multiply-adds in half precision that a recent consumer GPU sustains in convolutions and matrix products."""

_COPY_BYTES, _SIZE = 64 << 20, 4096


def bytes_per_s(device: torch.device) -> tuple[float, bool]:
    """Bytes a second from host memory to ``device``, and whether they were measured."""
    if device.type == "cuda" and torch.cuda.is_available():
        return _copy_rate(device), True
    return ASSUMED_BYTES_PER_S, False


def products_per_s(device: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    """Products a second in a matrix product of ``dtype``, and whether they were measured."""
    if device.type == "cuda" and torch.cuda.is_available():
        return _product_rate(device, dtype), True
    return ASSUMED_PRODUCTS_PER_S, False


@functools.cache
def _copy_rate(device: torch.device) -> float:
    with unset_fake_temporarily(), torch.no_grad():
        host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=device)
        return _COPY_BYTES / _seconds(lambda: there.copy_(host, non_blocking=True), device)


@functools.cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    with unset_fake_temporarily(), torch.no_grad():
        factor = torch.zeros(_SIZE, _SIZE, dtype=dtype, device=device)
        return _SIZE**3 / _seconds(lambda: factor @ factor, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of five runs."""
    found = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)
