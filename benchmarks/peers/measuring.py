"""One method on one case: the row of the record. What a peer raises is the row's ``refused``, in a line."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

import fmecompile
from benchmarks.cases import GIB, fake
from benchmarks.peers.methods import Method, Refused
from benchmarks.peers.subjects import Case, Subject
from fmecompile.runtime.measure import StorageMeter

MIB = 2**20
SHORT_RUN = 6
"""Steps of a timed generation, and of one on fake tensors."""
Row = dict[str, Any]


def answer(measurement: Callable[..., Row], case: Case, method: Method, **options: Any) -> Row:
    """The row of ``measurement``, or why there is none."""
    try:
        return measurement(case, method, **options)
    except Exception as error:
        return {"refused": reason(error)}


def reason(error: BaseException) -> str:
    """The first line of what an error says, with its class where that is not this benchmark's own."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "says nothing")
    return first if isinstance(error, Refused) else f"{type(error).__name__}: {first}"


# ---------------------------------------------------------------------------------------------- real size, fake tensors


def real_size(case: Case, method: Method) -> Row:
    """Peak of live storages of a call in float16, on fake tensors: no data, so at any size."""
    with fake(torch.float16):
        subject = case.subject(torch.float16)
        method.enter(subject)
        if subject.compiles and not fmecompile.is_optimized(subject.module):
            raise Refused("generates code that reads memory, so it cannot run on fake tensors")
        if subject.compiles:
            subject.call()
        measured = fmecompile.measure(subject.call).peak_bytes
    return _projected(subject, GIB, "GiB") | {"measured GiB": measured / GIB}


def real_generation(case: Case, method: Method, steps: int = SHORT_RUN) -> Row:
    """Peak and kept bytes of a short generation in float16, on fake tensors."""
    with fake(torch.float16):
        subject = case.subject(torch.float16)
        subject.shorten(steps)
        method.enter(subject)
        if subject.compiles:
            subject.generation()
        peak, kept = held(subject)
    return {"peak GiB": peak / GIB, "kept MiB": kept / MIB}


def held(subject: Subject) -> tuple[int, int]:
    """Peak bytes of one generation, and the most that is there between two steps."""
    gc.collect()
    kept = 0

    def after_step() -> None:
        nonlocal kept
        kept = max(kept, meter.current_bytes)

    with torch.no_grad(), StorageMeter([*subject.module.parameters(), *subject.module.buffers()]) as meter:
        subject.generation(after_step)
    return meter.peak_bytes, kept


# ---------------------------------------------------------------------------------------------- reduced size, real data


def reduced(case: Case, method: Method, scratch: Path | None = None) -> Row:
    """Peak of live storages and as the allocator sees it, error against float64, what compiling took."""
    subject, want = case.subject(torch.float32), reference(case, scratch)
    plain = error(subject.call(), want)
    method.enter(subject)
    first = _seconds(subject.call)
    row: Row = {"error": error(subject.call(), want), "eager error": plain}
    row |= {"measured MiB": live(subject), "allocator MiB": allocated(subject.call) / MIB}
    row |= _projected(subject, MIB, "MiB")
    if subject.compiles:
        row |= {"compile s": first - _seconds(subject.call), "graphs": graphs(subject)}
    return row


def call_time(case: Case, method: Method, pairs: int = 5) -> Row:
    """Time of calls over eager's."""
    eager, subject = case.subject(torch.float32), case.subject(torch.float32)
    method.enter(subject)
    return interleaved(eager.call, subject.call, pairs)


def generation_time(case: Case, method: Method, pairs: int = 5, steps: int = SHORT_RUN) -> Row:
    """Time of short generations over eager's."""
    eager, subject = case.subject(torch.float32), case.subject(torch.float32)
    eager.shorten(steps)
    subject.shorten(steps)
    method.enter(subject)
    return interleaved(eager.generation, subject.generation, pairs)


def interleaved(eager: Callable[[], Any], own: Callable[[], Any], pairs: int) -> Row:
    """The median of the ratios of ``pairs`` neighbours in time, after one call of each."""
    own()
    eager()
    taken = [(_seconds(eager), _seconds(own)) for _ in range(pairs)]
    ratios = [after / before for before, after in taken]
    spread = {"least": min(ratios), "most": max(ratios), "pairs": pairs}
    return {"time": statistics.median(ratios), **spread, "eager s": statistics.median(before for before, _ in taken)}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def reference(case: Case, scratch: Path | None) -> torch.Tensor:
    """The output of the plain model in float64, on the float32 weights and inputs. Kept in ``scratch`` for others."""
    path = None if scratch is None else scratch / f"{case.name.replace(' ', '-')}.pt"
    if path is not None and path.exists():
        return torch.load(path)
    subject = case.subject(torch.float32)
    subject.module.double()
    subject.inputs = copy.copy(tuple(v.double() if _is_floating(v) else v for v in subject.inputs))
    found = subject.call()
    if path is not None:
        torch.save(found, path)
    return found


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest deviation over the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max())


def live(subject: Subject) -> float | None:
    """Peak of live storages in MiB, which is what plans project; None for compiled code, where no operator is seen."""
    is_seen = not subject.compiles or fmecompile.is_optimized(subject.module)
    return fmecompile.measure(subject.call).peak_bytes / MIB if is_seen else None


def allocated(function: Callable[[], Any]) -> int:
    """Peak bytes that the CPU allocator gave out and not yet took back: also the workspaces inside operators, and
    what compiled code asks for, which no tracker of operators sees. Only what ``function`` asks for counts."""
    profiled: Any = profile(profile_memory=True)
    with torch.no_grad(), profiled:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        current += nbytes
        peak = max(peak, current)
    return peak


def graphs(subject: Subject) -> int:
    """Programs that were compiled for the calls so far."""
    if fmecompile.is_optimized(subject.module):
        return sum(1 if record.reuse is None else len(record.reuse.plans) for record in _records(subject))
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _projected(subject: Subject, unit: int, name: str) -> Row:
    if not fmecompile.is_optimized(subject.module):
        return {}
    return {f"projected {name}": max(record.plan.projected_peak_bytes for record in _records(subject)) / unit}


def _records(subject: Subject) -> tuple[Any, ...]:
    return tuple(fmecompile.explain(subject.module).records)
