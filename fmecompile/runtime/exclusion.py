"""Capture and execution exclude each other across threads.

While torch captures a module it puts fake tensors in the place of its weights and wraps ``nn.Module.__call__`` for the
whole process; a program that ran in another thread at that moment would see both.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.fx import Tracer


class Exclusion:
    """Many runs at a time, or one capture. Each may be nested in the other within one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs: Counter[int] = Counter()
        self._capturing: int | None = None

    @property
    def is_capturing(self) -> bool:
        """Whether any thread captures; torch's own flag is one for the whole process."""
        return self._capturing is not None

    @property
    def is_capturing_here(self) -> bool:
        return self._capturing == threading.get_ident()

    @contextmanager
    def run(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._capturing in (None, me))
            self._runs[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._runs[me] -= 1
                self._runs += Counter()  # drops the threads that run nothing
                self._changed.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Wait for every run of another thread. A run of this one is suspended, so two that wait do not lock up."""
        me = threading.get_ident()
        if self._capturing == me:
            yield
            return
        with self._changed:
            suspended = self._runs.pop(me, 0)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._capturing is None and not self._runs)
            self._capturing = me
        try:
            with _followed_here_only():
                yield
        finally:
            with self._changed:
                self._capturing = None
                if suspended:
                    self._runs[me] = suspended
                self._changed.notify_all()


@contextmanager
def _followed_here_only() -> Iterator[None]:
    """Let torch follow the modules that are called in this thread only: its tracer has one stack of the modules it is
    in, on which a call in another thread would push and pop too."""
    me, plain = threading.get_ident(), Tracer.call_module

    @wraps(plain)
    def call_module(tracer: Tracer, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != me:
            return forward(*args, **kwargs)
        return plain(tracer, module, forward, args, kwargs)

    Tracer.call_module = call_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tracer.call_module = plain  # type: ignore[method-assign]


EXCLUSION = Exclusion()


@contextmanager
def traced_here_only() -> Iterator[None]:
    """Give modules called in other threads their plain ``__call__`` while torch traces through it in this one.

    The tracer keeps one stack of the modules it is in; a call from another thread would push and pop there too.
    """
    traced = nn.Module.__call__
    if traced is _PLAIN_CALL:
        yield
        return
    me = threading.get_ident()

    @wraps(traced)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        chosen = traced if threading.get_ident() == me else _PLAIN_CALL
        return chosen(module, *args, **kwargs)

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = traced


_PLAIN_CALL = nn.Module.__call__
