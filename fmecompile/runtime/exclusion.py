"""Capture and execution exclude each other across threads.

While torch captures a module it puts fake tensors in the place of its weights and wraps ``nn.Module.__call__`` for the
whole process; a program that ran in another thread at that moment would see both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Exclusion:
    """Many runs at a time, or one capture. A capture may be nested in a capture of the same thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs = 0
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
        with self._changed:
            self._changed.wait_for(lambda: self._capturing in (None, threading.get_ident()))
            self._runs += 1
        try:
            yield
        finally:
            with self._changed:
                self._runs -= 1
                self._changed.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        if self.is_capturing_here:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._capturing is None and self._runs == 0)
            self._capturing = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._capturing = None
                self._changed.notify_all()


EXCLUSION = Exclusion()
