"""A call as a trace for Perfetto or chrome://tracing: slices of modules, loops and trips, and bytes as a counter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmecompile.graph.plan import Plan
    from fmecompile.runtime.measure import Measurement

Event = dict[str, Any]
PROJECTED, MEASURED = 1, 2
MODULES, LOOPS = 1, 2
MICRO = 1e6


def write_trace(plan: Plan, path: Path, measured: Measurement | None) -> None:
    """Write a process of what is projected, and one of what was measured where that is given."""
    events = [*_named(PROJECTED, "projected"), *_projected(plan)]
    if measured is not None:
        events += [*_named(MEASURED, "measured"), *_measured(plan, measured)]
    data = {"traceEvents": events, "displayTimeUnit": "ms"}
    path.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


def _named(process: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    for thread, title in ((MODULES, "modules"), (LOOPS, "chunk loops")):
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": title}}


def _projected(plan: Plan) -> Iterator[Event]:
    starts = list(accumulate(plan.durations_s, initial=0.0))
    steps = list(plan.after.steps())
    runs = zip(plan.after.paths(), starts, starts[1:], strict=False)
    yield from _slices(PROJECTED, ((path, begin, end) for path, begin, end in runs))
    for step, (begin, end) in zip(steps, pairwise(starts), strict=False):
        if step[0].group >= 0:
            yield from _loop(plan, step[0].group, begin, end)
    held = (value + plan.beside_bytes for value in plan.timeline)
    yield from (_counter(PROJECTED, begin, value) for begin, value in zip(starts, held, strict=False))
    yield _counter(PROJECTED, starts[-1], plan.beside_bytes)


def _loop(plan: Plan, place: int, begin: float, end: float) -> Iterator[Event]:
    """A loop and its trips, all equally long."""
    trips = plan.groups[place].trips
    yield _slice(PROJECTED, LOOPS, f"chunk_loop_{place}", begin, end, _about(plan, place))
    edges = [begin + (end - begin) * trip / trips for trip in range(trips + 1)]
    yield from (_slice(PROJECTED, LOOPS, f"trip {k}", *edge, {}) for k, edge in enumerate(pairwise(edges)))


def _about(plan: Plan, place: int) -> Event:
    if place >= len(plan.groups):
        return {}
    group = plan.groups[place]
    axes = " x ".join(f"{axis.size}/{axis.chunk}" for axis in group.axes)
    told = {"modules": ", ".join(group.modules), "axes": axes, "trips": group.trips, "because": group.because}
    return told | {"whole_bytes": group.whole_bytes, "peak_bytes": group.peak_bytes}


def _measured(plan: Plan, measured: Measurement) -> Iterator[Event]:
    times = measured.times_s
    if times:
        runs = ((name, times[start], times[min(stop, len(times) - 1)]) for name, start, stop in _stretches(measured))
        yield from _slices(MEASURED, runs)
    trip = 0
    for span in measured.spans:
        is_trip = span.name == "trip"
        trip = trip + 1 if is_trip else 0
        name, about = (f"trip {trip - 1}", {}) if is_trip else (span.name, _about(plan, _place(span.name)))
        yield _slice(MEASURED, LOOPS, name, span.start_s, span.end_s, about)
    yield from (_counter(MEASURED, at, value) for at, value in zip(times, measured.timeline, strict=False))


def _place(name: str) -> int:
    return int(name.rpartition("_")[2])


def _stretches(measured: Measurement) -> Iterator[tuple[str, int, int]]:
    """Sub-modules that ran operators, with the entries from and to which they did."""
    for (name, start), (_, stop) in pairwise([*measured.modules, ("", len(measured.timeline))]):
        if start < stop:
            yield name, start, stop


def _slices(process: int, runs: Iterable[tuple[str, float, float]]) -> Iterator[Event]:
    """A slice for each module while it runs, nested like the modules."""
    opened: list[tuple[str, float]] = []
    end = 0.0
    for path, begin, stop in runs:
        names = _levels(path)
        common = 0
        while common < min(len(names), len(opened)) and opened[common][0] == names[common]:
            common += 1
        yield from _closed(process, opened[common:], end)
        opened = opened[:common] + [(name, begin) for name in names[common:]]
        end = stop
    yield from _closed(process, opened, end)


def _closed(process: int, opened: list[tuple[str, float]], end: float) -> Iterator[Event]:
    for name, begin in opened:
        yield _slice(process, MODULES, name, begin, end, {})


def _levels(path: str) -> list[str]:
    """``a.0.b`` -> ``a.0``, ``a.0.b``: a number belongs to the name in front of it."""
    names = path.split(".") if path else []
    return [".".join(names[:end]) for end in range(1, len(names) + 1) if not names[end:] or not names[end].isdecimal()]


def _slice(process: int, thread: int, name: str, begin: float, end: float, about: Event) -> Event:
    place = {"pid": process, "tid": thread, "ts": round(begin * MICRO, 3), "dur": round((end - begin) * MICRO, 3)}
    return {"ph": "X", "name": name, **place, "args": about}


def _counter(process: int, at: float, value: int) -> Event:
    return {"ph": "C", "pid": process, "name": "activations", "ts": round(at * MICRO, 3), "args": {"bytes": value}}
