"""A model of a device with streams and a caching allocator, which real chunk loops run on.

The host asks for tasks in order. Each stream runs its own one after another; streams are ordered by waits alone. A
block belongs to the stream that asked for it, and may be given out again on that stream as soon as the host lets go of
it, finished or not. Nothing is computed late: what is modelled is when each task would read and write which bytes of
which block.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmecompile.runtime.schedule import CALLER, Wait

BLOCK_BYTES = 512
Region = tuple[int, np.ndarray]
"""A block, and which of its bytes."""


@dataclass(eq=False)
class Task:
    """One kernel. ``behind`` says for each stream how many of its tasks are done before this one starts."""

    name: str
    stream: int
    number: int
    behind: dict[int, int]
    reads: list[Region]
    writes: list[Region]
    sees: list[np.ndarray] = field(default_factory=list)

    def is_behind(self, other: Task) -> bool:
        return self.behind.get(other.stream, 0) > other.number


class Device(TorchDispatchMode):
    """Records tasks; also the streams that loops ask for. ``known`` are tensors that were there before."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.tasks: list[Task] = []
        self._stream = CALLER
        self._behind: dict[int, dict[int, int]] = {}
        self._free: dict[tuple[int, int], list[int]] = {}
        self._blocks: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._content: list[np.ndarray] = []
        for tensor in known:
            self._allocate(tensor, is_kept=True)

    # ---------------------------------------------------------------------------------------------------- streams

    def wait(self, wait: Wait) -> None:
        mine = self._behind.setdefault(wait.slot, {})
        for stream, count in self._behind.get(wait.on, {}).items():
            mine[stream] = max(mine.get(stream, 0), count)

    @contextmanager
    def on(self, slot: int) -> Iterator[None]:
        before, self._stream = self._stream, slot
        yield
        self._stream = before

    # ------------------------------------------------------------------------------------------------------ memory

    def _allocate(self, tensor: torch.Tensor, *, is_kept: bool = False) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        free = self._free.setdefault((self._stream, size), [])
        if free and not is_kept:
            block = free.pop()
        else:
            block = len(self._content)
            self._content.append(np.full(size, -1))

        def release(_: object) -> None:
            del self._blocks[key]
            free.append(block)

        self._blocks[key] = (block, weakref.ref(storage, release))

    def _region(self, tensor: torch.Tensor) -> Region:
        block, _ = self._blocks[tensor.untyped_storage()._cdata]
        size = tensor.element_size()
        places = np.array([tensor.storage_offset()])
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            places = (places[:, None] + np.arange(length) * stride).ravel()
        touched = np.zeros(len(self._content[block]), dtype=bool)
        for byte in range(size):
            touched[places * size + byte] = True
        return block, touched

    # ------------------------------------------------------------------------------------------------------- tasks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for tensor in given:
            if tensor.untyped_storage()._cdata not in self._blocks:  # made where nobody watches: a literal
                self._allocate(tensor, is_kept=True)
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        new = [t for t in made if t.untyped_storage()._cdata not in self._blocks]
        for tensor in new:
            self._allocate(tensor)
        formal = zip(func._schema.arguments, args, strict=False)
        changed = [t for a, t in formal if a.alias_info is not None and a.alias_info.is_write]
        fills = "empty" not in str(func)
        if changed or (new and fills):
            reads = [t for t in given if not any(t is c for c in changed)]
            self._ask(str(func), reads, [*changed, *new])
        return result

    def _ask(self, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        behind = self._behind.setdefault(self._stream, {})
        number = behind.get(self._stream, 0)
        task = Task(name, self._stream, number, dict(behind), [*map(self._region, reads)], [*map(self._region, writes)])
        behind[self._stream] = number + 1
        task.sees = [self._content[block][touched].copy() for block, touched in task.reads]
        for block, touched in task.writes:
            self._content[block][touched] = len(self.tasks)
        self.tasks.append(task)

    # ------------------------------------------------------------------------------------------------------ answers

    def races(self) -> list[tuple[Task, Task]]:
        """Pairs that touch the same bytes, one of them writing, in an order that nothing holds them to."""
        return [
            (first, second)
            for k, second in enumerate(self.tasks)
            for first in self.tasks[:k]
            if not second.is_behind(first) and _conflict(first, second)
        ]

    def wrong_reads(self, durations: list[float]) -> list[Task]:
        """Tasks that read other bytes than in the order of the host, when the tasks take so long."""
        ends: dict[tuple[int, int], float] = {}
        events: list[tuple[float, int, int]] = []
        for k, (task, duration) in enumerate(zip(self.tasks, durations, strict=True)):
            start = max((ends[stream, count - 1] for stream, count in task.behind.items() if count), default=0.0)
            ends[task.stream, task.number] = start + duration
            events += [(start, 1, k), (start + duration, 0, k)]
        content = [np.full(len(block), -1) for block in self._content]
        wrong: dict[int, None] = {}
        for _, is_start, k in sorted(events):
            task = self.tasks[k]
            seen = [content[block][touched] for block, touched in task.reads]
            own = [np.isin(now, (k, -2 - k)) for now in seen]  # in place: what it writes itself
            if not all(((now == then) | mine).all() for now, then, mine in zip(seen, task.sees, own, strict=True)):
                wrong[k] = None
            for block, touched in task.writes:
                content[block][touched] = -2 - k if is_start else k
        return [self.tasks[k] for k in wrong]


def _conflict(first: Task, second: Task) -> bool:
    pairs = [(a, b) for a in first.writes for b in (*second.reads, *second.writes)]
    pairs += [(a, b) for a in first.reads for b in second.writes]
    return any(a[0] == b[0] and bool((a[1] & b[1]).any()) for a, b in pairs)
