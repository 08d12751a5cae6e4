"""Autocast is part of a program, not of its surroundings.

Capture spells the casts that autocast would make as calls of the graph, where the search counts them. So a program
belongs to the state it was captured in, and all else that is done for a call, compiling and running, is done outside of
autocast, which would cast a second time and hold casts of weights that no plan knows of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""The types of devices whose autocast is looked at."""

State = tuple[tuple[str, torch.dtype], ...]
"""The devices for which autocast is on, and the dtype it casts to."""

_ASIDE: ContextVar[State] = ContextVar("autocast_aside", default=())


def autocast_state() -> State:
    """What is on in this thread."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d))


@contextmanager
def set_aside(state: State) -> Iterator[None]:
    """Leave autocast, which is in ``state``, until the end of the block or until :func:`as_called`."""
    token = _ASIDE.set(state)
    try:
        with _all(torch.autocast(device, enabled=False) for device, _ in state):
            yield
    finally:
        _ASIDE.reset(token)


@contextmanager
def as_called() -> Iterator[None]:
    """In the state that was set aside, without a cache: casts that are being traced must not outlive the trace."""
    with _all(torch.autocast(device, dtype=dtype, cache_enabled=False) for device, dtype in _ASIDE.get()):
        yield


@contextmanager
def _all(contexts: Iterable[torch.autocast]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
