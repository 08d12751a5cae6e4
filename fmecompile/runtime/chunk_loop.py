"""The chunk loop: one group of operators run over slices of its loop axes, in bounded memory.

A loop nest of axes, outermost first; all but the innermost advance one row at a time, the innermost ``chunk`` rows
with a shorter tail. Each trip slices what it reads, with a halo where a kernel reaches over its border, and runs a
body, which writes its slice of an output, or has it copied there. Trips of the same shape share a body: full chunks,
the tail, and with halos the chunks at the borders. Outputs are allocated once, or take over the storage of an input
that dies in the loop; never a list and a concatenation. With more than one slot, trips that do not depend on each other
overlap (runtime/schedule.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import fx, nn

from fmecompile.runtime.host import copy_out, host_empty
from fmecompile.runtime.schedule import forked, schedule, streams_beside
from fmecompile.runtime.watch import NO_LABEL, Label, watched


@dataclass(frozen=True)
class LoopAxis:
    """``size`` rows handled ``chunk`` at a time."""

    size: int
    chunk: int

    @property
    def trips(self) -> int:
        return -(-self.size // self.chunk)


@dataclass(frozen=True)
class Narrow:
    """Along ``dim`` a trip starts at the sum of ``offset of axis * step`` and spans ``rows * unit``.

    ``inner`` tells whether the innermost axis runs along this dimension; ``rows`` is its chunk then, and 1 otherwise.
    A trip also reads ``halo`` rows before and after, as far as the innermost axis, ``extent`` rows here, has them.
    """

    dim: int
    terms: tuple[tuple[int, int], ...]
    unit: int
    inner: bool
    halo: tuple[int, int] = (0, 0)
    extent: int = 0

    def span(self, offsets: Sequence[int], rows: int) -> tuple[int, int, int]:
        """(dim, start, length) at one trip."""
        start = sum(offsets[axis] * step for axis, step in self.terms)
        if not self.inner:
            return (self.dim, start, self.unit)
        first = offsets[-1] * self.unit
        before, after = min(self.halo[0], first), self.halo[1]
        if after:
            after = min(after, self.extent - first - rows * self.unit)
        return (self.dim, start - before, before + rows * self.unit + after)


@dataclass(frozen=True)
class Slicing:
    """How a trip slices one tensor: viewed as ``shape`` first when given, then narrowed."""

    narrows: tuple[Narrow, ...]
    shape: tuple[int, ...] | None = None

    def spans(self, offsets: Sequence[int], rows: int) -> tuple[tuple[int, int, int], ...]:
        """(dim, start, length) of each narrowed dimension at one trip."""
        return tuple(narrow.span(offsets, rows) for narrow in self.narrows)


@dataclass(frozen=True)
class Output:
    """One result of the loop, with the strides it has outside loops: laid over the storage of the operand ``takes``, or
    allocated where the operand ``like`` is, or on ``device`` where no operand is there; or in host memory where it
    waits for the device ``host_of``. Bodies write their slice of what ``is_written``, and take it as an operand more.
    """

    slicing: Slicing
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    like: int = 0
    device: torch.device | None = None
    takes: int | None = None
    host_of: torch.device | None = None
    is_written: bool = False


@dataclass(frozen=True)
class LoopSpec:
    """``slicings`` has one entry an operand, None for operands every trip reads whole; ``kinds`` says for each chunk of
    the innermost axis which body it runs; ``slots`` how many trips may be under way at once."""

    axes: tuple[LoopAxis, ...]
    slicings: tuple[Slicing | None, ...]
    outputs: tuple[Output, ...]
    kinds: tuple[int, ...]
    slots: int = 1

    @property
    def trips(self) -> int:
        count = 1
        for axis in self.axes:
            count *= axis.trips
        return count


def must_run_in_order(spec: LoopSpec, storages: Sequence[Hashable]) -> str:
    """Why trips of a loop may not overlap, in words; empty where they may. ``storages`` tells for each operand which
    storage it lies in: operands of one storage have equal entries.

    They may where each trip writes rows that no other trip writes, and none that another trip reads.
    """
    if spec.trips < 2 or not spec.outputs:
        return "there is nothing to overlap"
    if not all(_is_own(output.slicing, spec) for output in spec.outputs):
        return "several trips write the same rows"
    taken = {storages[output.takes] for output in spec.outputs if output.takes is not None}
    over = (slicing for slicing, storage in zip(spec.slicings, storages, strict=True) if storage in taken)
    if not all(slicing is not None and _is_own(slicing, spec) for slicing in over):
        return "trips read rows that others write over"
    return ""


def _is_own(slicing: Slicing, spec: LoopSpec) -> bool:
    """Whether no two trips share a row: every axis advances along some dimension, and there are no halos."""
    advances = {axis for narrow in slicing.narrows for axis, _ in narrow.terms}
    looped = {k for k, axis in enumerate(spec.axes) if axis.trips > 1}
    return looped <= advances and all(narrow.halo == (0, 0) for narrow in slicing.narrows)


Span = tuple[tuple[int, int, int], ...]
Trip = tuple[int, tuple[Span, ...], tuple[Span, ...]]
Trips = tuple[Trip, ...]


class ChunkLoop(nn.Module):
    """Runs each chunk through the body of its kind, and returns the outputs as a tuple. ``label`` is for those
    who watch and read."""

    def __init__(self, spec: LoopSpec, bodies: Sequence[fx.GraphModule], label: Label = NO_LABEL) -> None:
        super().__init__()
        self.spec, self.label = spec, label
        self.bodies = nn.ModuleList(bodies)
        self._sliced = tuple((i, slicing) for i, slicing in enumerate(spec.slicings) if slicing is not None)
        self._written = [k for k, output in enumerate(spec.outputs) if output.is_written]
        self._trips = self._plan_trips()

    def _plan_trips(self) -> Trips:
        *outer, inner = self.spec.axes
        trips = []
        for place in product(*(range(axis.size) for axis in outer), range(0, inner.size, inner.chunk)):
            rows = min(inner.chunk, inner.size - place[-1])
            reads = tuple(slicing.spans(place, rows) for _, slicing in self._sliced)
            writes = tuple(output.slicing.spans(place, rows) for output in self.spec.outputs)
            trips.append((self.spec.kinds[place[-1] // inner.chunk], reads, writes))
        return tuple(trips)

    def trips_of(self, kind: int) -> int:
        """How many trips run the body ``kind``."""
        return sum(trip[0] == kind for trip in self._trips)

    @property
    def distinct_trips(self) -> Trips:
        """One trip of each body."""
        return tuple({trip[0]: trip for trip in reversed(self._trips)}.values())

    def forward(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.run(operands, self._trips)

    def run(self, operands: Sequence[torch.Tensor], trips: Trips) -> tuple[torch.Tensor, ...]:
        """Run ``trips`` and return the outputs."""
        with watched(self.label):
            return self._run(operands, trips)

    def _run(self, operands: Sequence[torch.Tensor], trips: Trips) -> tuple[torch.Tensor, ...]:
        outputs = tuple(_place(output, operands) for output in self.spec.outputs)  # the caller's, so before the fork
        readable = [(i, _viewed(operands[i], slicing)) for i, slicing in self._sliced]
        writable = [_viewed(tensor, output.slicing) for tensor, output in zip(outputs, self.spec.outputs, strict=True)]
        bodies = list(self.bodies)
        if self.spec.slots == 1:
            for trip in trips:
                with watched():
                    self._run_trip(bodies, trip, operands, readable, writable)
            return outputs
        home = next((tensor for tensor in (*operands, *outputs) if tensor.is_cuda), outputs[0])
        plan, streams = schedule(len(trips), self.spec.slots), streams_beside(home, self.spec.slots)
        with forked(plan, streams):
            for trip, slot in zip(trips, plan.slots, strict=True):
                with streams.on(slot), watched():
                    self._run_trip(bodies, trip, operands, readable, writable)
        return outputs

    def _run_trip(
        self,
        bodies: Sequence[nn.Module],
        trip: Trip,
        operands: Sequence[torch.Tensor],
        readable: Sequence[tuple[int, torch.Tensor]],
        writable: Sequence[torch.Tensor],
    ) -> None:
        """Run one trip; behind it nothing that it made is alive."""
        kind, reads, writes = trip
        pieces = list(operands)
        for (i, tensor), span in zip(readable, reads, strict=True):
            pieces[i] = _narrowed(tensor, span)
        targets = [_narrowed(tensor, span) for tensor, span in zip(writable, writes, strict=True)]
        into = [targets[k] for k in self._written]
        values = zip(self.spec.outputs, targets, bodies[kind](*pieces, *into), strict=True)
        for output, target, value in values:
            if not output.is_written:
                value = value.view(target.shape) if value.shape != target.shape else value
                copy_out(target, value) if output.host_of else target.copy_(value)


def _place(output: Output, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    if output.takes is not None:
        return operands[output.takes].as_strided(output.shape, output.stride, 0)
    if output.host_of is not None:
        return host_empty(output.shape, output.stride, output.dtype, output.host_of)
    like = operands[output.like]
    return like.new_empty_strided(output.shape, output.stride, dtype=output.dtype, device=output.device)


def _viewed(tensor: torch.Tensor, slicing: Slicing) -> torch.Tensor:
    return tensor if slicing.shape is None else tensor.view(slicing.shape)


def _narrowed(tensor: torch.Tensor, span: Span) -> torch.Tensor:
    for dim, start, length in span:
        tensor = tensor.narrow(dim, start, length)
    return tensor
