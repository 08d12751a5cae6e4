"""How fast a device computes, reads and writes, and is asked to: measured once a machine, or assumed."""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fmecompile.config import cache_folder, may_measure, write_whole

ASSUMED_BYTES_PER_S = 20e9
"""Pinned host memory over PCIe 4 with 16 lanes, one direction."""

KEPT_BYTES = 32 << 20
"""Host memory of smaller values is kept by malloc when they are freed, for later ones. That of larger values goes back
to the system, and every page of the next one is mapped and cleared when it is first written (glibc, mallopt(3):
M_MMAP_THRESHOLD grows up to 4 MiB times the size of a long)."""

_COPY_BYTES, _SIZE, _FEW_ROWS, _SMALL_CALLS = 256 << 20, 4096, 16, 200
_RUNS, _TRIED_S = 5, 0.1


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: ``products_per_s`` multiply-adds in matrix products of one dtype, ``bytes_per_s``
    read or written in its memory, and ``weight_bytes_per_s`` of the weights of products with few rows, which a CPU
    brings into another order first. ``call_s`` is what a call costs however small it is, and ``fresh_s`` what a byte of
    a result of ``KEPT_BYTES`` costs beyond being written; ``issue_s`` what the host takes to ask for a call while the
    device works on earlier ones, 0 where the host is the device."""

    products_per_s: float
    bytes_per_s: float
    weight_bytes_per_s: float
    call_s: float
    fresh_s: float
    issue_s: float = 0.0
    is_measured: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether these are rates, and not what somebody made of the file."""
        rates = (self.products_per_s, self.bytes_per_s, self.weight_bytes_per_s)
        spent = (self.call_s, self.fresh_s, self.issue_s)
        return all(0 < rate < inf for rate in rates) and all(0 <= seconds < inf for seconds in spent)


_KERNEL_S = 2e-6
"""What the smallest kernel takes on a GPU, whatever it is asked from."""
ASSUMED = {
    "cuda": Rates(20e12, 600e9, 600e9, _KERNEL_S, 0.0, 8e-6),  # half precision on a recent consumer GPU
    "cpu": Rates(80e9, 25e9, 8e9, 2e-6, 0.5e-9),  # float32 on two cores with AVX-512
}
"""For devices that cannot be asked, by type; others are taken for a GPU."""


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of ``device`` in ``dtype``. Measured once and written down for later processes, unless that is switched
    off, or the device is not there. Float16 on a CPU stands for a GPU: CPUs hardly multiply it, so whoever asks plans
    on fake tensors."""
    kind = "cuda" if dtype == torch.float16 else device.type
    if not may_measure() or not _is_there(device) or kind != device.type:
        return ASSUMED.get(kind, ASSUMED["cuda"])
    return _measured(device, dtype, torch.get_num_threads())


def bytes_per_s(device: torch.device) -> tuple[float, bool]:
    """Bytes a second from host memory to ``device``, and whether they were measured."""
    if device.type == "cuda" and torch.cuda.is_available():
        return _copy_rate(device), True
    return ASSUMED_BYTES_PER_S, False


def _is_there(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} x{threads}"
    key = f"{name}, {dtype}, torch {torch.__version__}"
    path = cache_folder() / "rates.json"
    known = _read(path)
    if key in known:
        return Rates(**known[key])
    with unset_fake_temporarily(), torch.no_grad():
        found = _measure(device, dtype)
    with suppress(OSError):  # a machine without a place to write measures again
        _write(path, _read(path) | {key: asdict(found)})
    return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What was written down; nothing where that cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = {key: Rates(**value) for key, value in known.items()}
        return {key: asdict(rates) for key, rates in found.items() if rates.is_usable}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _write(path: Path, known: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known, indent=1))


def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Less than a second on a CPU; a CPU multiplies half precision slowly, so less of it."""
    is_gpu = device.type == "cuda"
    size = _SIZE if is_gpu else 512 if dtype.itemsize >= 4 else 256
    factor = torch.zeros(size, size, dtype=dtype, device=device)
    weight = torch.zeros(_SIZE, _SIZE, dtype=dtype, device=device)
    rows = torch.zeros(_FEW_ROWS, _SIZE, dtype=dtype, device=device)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)  # pages never written to would not be there
    target = torch.ones_like(source)
    small = torch.zeros(8, dtype=dtype, device=device)

    def calls() -> None:
        value = small
        for _ in range(_SMALL_CALLS):
            value = torch.ops.aten.add.Tensor(value, small)

    products = size**3 / _seconds(lambda: factor @ factor, device)
    copy = _seconds(lambda: target.copy_(source), device)
    fresh = 0.0 if is_gpu else max(_seconds(source.clone, device) - copy, 0.0) / _COPY_BYTES
    weights = weight.nbytes / _seconds(lambda: torch.nn.functional.linear(rows, weight), device)
    call = _seconds(calls, device) / _SMALL_CALLS
    call, issue = (_KERNEL_S, call) if is_gpu else (call, 0.0)
    return Rates(products, 2 * _COPY_BYTES / copy, weights, call, fresh, issue, is_measured=True)


@functools.cache
def _copy_rate(device: torch.device) -> float:
    with unset_fake_temporarily(), torch.no_grad():
        host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=device)
        return _COPY_BYTES / _seconds(lambda: there.copy_(host, non_blocking=True), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of all runs within a tenth of a second, five at least: others disturb short runs little."""
    found: list[float] = []
    while len(found) < _RUNS or sum(found) < _TRIED_S:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
