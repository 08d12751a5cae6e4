"""``fmecompile doctor``: what this machine has, and what of fmecompile works here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

import fmecompile
from fmecompile.backends.inductor import missing_compiler
from fmecompile.commands.console import (
    BROKEN,
    JsonOption,
    refusals,
    require_writable,
    tell_written,
    told_console,
    write_json,
)
from fmecompile.config import cache_folder, may_measure
from fmecompile.errors import FmeError
from fmecompile.kernels.registry import why_not
from fmecompile.pipeline import package_version
from fmecompile.report import bytes_text
from fmecompile.runtime.rates import rates_of

PACKAGES = ("diffusers", "networkx", "nvidia-ml-py", "numpy", "triton", "transformers", "accelerate", "peft")
NEEDED = ("diffusers", "networkx", "numpy")
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``status``: ``ok``; ``absent``, which only takes a feature away; ``broken``."""

    name: str
    status: str
    fact: str
    next_step: str = ""


def doctor(json: JsonOption = None) -> None:
    """Say what this machine has and what works here. Exits with 1 when something that is needed does not work."""
    with refusals():
        require_writable(json)
    found = [
        finding for look in (_versions, _devices, _compilers, _rates, _cache, _program) for finding in _safely(look)
    ]
    console = told_console(json)
    console.print(_table(found))
    write_json({"fmecompile": package_version(), "findings": [asdict(finding) for finding in found]}, json)
    tell_written(json)
    if any(finding.status == "broken" for finding in found):
        raise typer.Exit(BROKEN)


def _safely(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A look that fails is a finding too."""
    try:
        yield from look()
    except Exception as error:  # a doctor does not fall ill
        yield Finding(
            look.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}", "report this with its text"
        )


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    known = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if known else "broken", python, "" if known else "take Python 3.11 or 3.12")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fits = (2, 11) <= release <= (2, 13)
    yield Finding("torch", "ok" if fits else "broken", torch.__version__, "" if fits else "install torch 2.11 to 2.13")
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            status = "broken" if name in NEEDED else "absent"
            yield Finding(name, status, "not installed", f"pip install {name}")


def _devices() -> Iterator[Finding]:
    threads = torch.get_num_threads()
    yield Finding("cpu", "ok", f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads")
    if not torch.cuda.is_available():
        yield Finding("cuda", "absent", "no CUDA device: plans are made on fake tensors, models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"cuda:{index}", "ok", f"{name}, {bytes_text(free)} free of {bytes_text(total)}")


def _compilers() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = missing_compiler({device.type})
    fact = f"backend='inductor' needs {missing}" if missing else f"backend='inductor' compiles for {device.type}"
    yield Finding("inductor", "absent" if missing else "ok", fact, f"install {missing}" if missing else "")
    reason = why_not(device)
    yield Finding("kernels", "absent" if reason else "ok", reason or "Triton kernels run here")


def _rates() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = rates_of(device, torch.float16 if device.type == "cuda" else torch.float32)
    how = "measured" if rates.is_measured else "assumed"
    yield Finding(
        "rates",
        "ok",
        f"{how}: {rates.products_per_s / 1e9:.0f} G products/s, {rates.bytes_per_s / 1e9:.1f} GB/s, "
        f"{rates.call_s * 1e6:.1f} us a call",
        "" if may_measure() else "unset FMECOMPILE_RATES to measure them",
    )


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield Finding("cache", "ok", str(folder))
    except OSError as error:
        yield Finding(
            "cache", "absent", f"{folder} cannot be written: {error}", "set FMECOMPILE_CACHE to another folder"
        )


@torch.no_grad()
def _program() -> Iterator[Finding]:
    """A small module, compiled and run: the output, and the bytes it holds."""
    layers = [nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1)]
    module = nn.Sequential(*layers).double().eval()
    x = torch.randn(8, 4, 64, 64, dtype=torch.float64)
    want = module(x)
    try:
        fmecompile.optimize(module, strict=True)
        error = ((module(x) - want).abs().max() / want.abs().max()).item()
        held = fmecompile.measure(module, x).peak_bytes
        projected = fmecompile.explain(module).records[0].plan.projected_peak_bytes
    except FmeError as refused:
        yield Finding("program", "broken", str(refused), "report this with its text")
        return
    fine = error <= TOLERANCE and held <= projected
    fact = f"error {error:.0e}, {bytes_text(held)} held, {bytes_text(projected)} projected"
    yield Finding("program", "ok" if fine else "broken", fact, "" if fine else "run: fmecompile bisect --model svd")


def _table(found: list[Finding]) -> Table:
    table = Table(title=f"fmecompile {package_version()}", box=box.SIMPLE_HEAD, padding=(0, 1))
    for head in ("", "status", "found", "next"):
        table.add_column(head, overflow="fold")
    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    for finding in found:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, status, escape(finding.fact), escape(finding.next_step))
    return table
