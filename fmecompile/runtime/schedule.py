"""Pipelined loops as data: which trip runs in which slot, and which slot waits for which.

Slot 0 is the stream that the loop is called on, the others are streams beside it; trip i runs whole in slot
i % slots. In front, every side slot waits for the caller (fork); behind, the caller waits for every side slot (join).
So a trip is ordered against the trips of its own slot and against all that the caller does, and against nothing else
(docs/decisions/0018-pipelined-loops.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor

CALLER = 0
"""The slot whose stream is the caller's."""


@dataclass(frozen=True)
class Wait:
    """What ``slot`` does next starts once all that was asked of ``on`` up to here is done."""

    slot: int
    on: int


@dataclass(frozen=True)
class Schedule:
    """``slots`` has one entry a trip, in the order in which the host asks for them."""

    fork: tuple[Wait, ...]
    slots: tuple[int, ...]
    join: tuple[Wait, ...]


def schedule(trips: int, slots: int) -> Schedule:
    """``trips`` over ``slots``, of which no more are used than there are trips."""
    sides = range(1, min(slots, trips))
    return Schedule(
        tuple(Wait(side, CALLER) for side in sides),
        tuple(trip % slots for trip in range(trips)),
        tuple(Wait(CALLER, side) for side in sides),
    )


class Streams(Protocol):
    """Where slots run."""

    def wait(self, wait: Wait) -> None:
        """Order two slots."""
        ...

    def on(self, slot: int) -> AbstractContextManager[object]:
        """What is asked for in here, memory included, belongs to ``slot``."""
        ...


@contextmanager
def forked(plan: Schedule, streams: Streams) -> Iterator[None]:
    """Fork in front, join behind, also behind an exception: the memory of what was under way may be given back then."""
    try:
        for wait in plan.fork:
            streams.wait(wait)
        yield
    finally:
        for wait in plan.join:
            streams.wait(wait)


def streams_beside(tensor: torch.Tensor, slots: int) -> Streams:
    """Streams of the device of ``tensor``, the current one first; where a device has none, all slots run in order."""
    if slots < 2 or not tensor.is_cuda or isinstance(tensor, FakeTensor):
        return _IN_ORDER
    return _CudaStreams(tensor.device, slots)


class _InOrder:
    def wait(self, wait: Wait) -> None:
        """Nothing to do: one thing runs after another."""

    def on(self, slot: int) -> AbstractContextManager[object]:
        return nullcontext()


_IN_ORDER = _InOrder()
_sides = threading.local()


class _CudaStreams:
    """The current stream, and side streams that all loops of a thread share, so that their memory is reused too."""

    def __init__(self, device: torch.device, slots: int) -> None:
        by_device: dict[torch.device, list[torch.cuda.Stream]] = vars(_sides).setdefault("by_device", {})
        sides = by_device.setdefault(device, [])
        while len(sides) < slots - 1:
            sides.append(torch.cuda.Stream(device))
        self._streams = (torch.cuda.current_stream(device), *sides[: slots - 1])

    def wait(self, wait: Wait) -> None:
        self._streams[wait.slot].wait_stream(self._streams[wait.on])

    def on(self, slot: int) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[slot])
