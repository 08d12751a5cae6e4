"""Who watches chunk loops: a measurement that times them, or a recording of allocations that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """What a loop is called, the modules that it runs operators of, and what its trips under way hold at most."""

    name: str = "chunk_loop"
    modules: str = ""
    held_bytes: int = 0


NO_LABEL = Label()

Watcher = Callable[[Label | None], AbstractContextManager[object]]
"""Given the label of a loop, or None for a trip of it, what stands around that while it runs."""

_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_IDLE = nullcontext()


@contextmanager
def watched_by(watcher: Watcher | None) -> Iterator[None]:
    """Loops that this thread runs in here are seen by ``watcher`` and by no other, or by nobody."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def watched(label: Label | None = None) -> AbstractContextManager[object]:
    """What stands around a loop, or without a label a trip: nothing where nobody watches."""
    watcher = _WATCHER.get()
    return _IDLE if watcher is None else watcher(label)
