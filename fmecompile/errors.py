"""Errors: one class each, with the place and the next step in the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any, Self


class FmeError(Exception):
    """Base of every error raised on purpose. ``place`` says where, ``next_step`` what to do about it."""

    def __init__(self, fact: str, *, place: str = "", next_step: str = "") -> None:
        self.fact, self.place, self.next_step = fact, place, next_step
        parts = [fact]
        if place:
            parts.append(f"  at: {place}")
        if next_step:
            parts.append(f"  next: {next_step}")
        super().__init__("\n".join(parts))

    def detached(self) -> Self:
        """The same error without its traceback and cause, whose frames hold every tensor of the call."""
        return self._made_again()()

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes with everything they say."""
        return (self._made_again(), ())

    def _made_again(self) -> partial[Self]:
        return partial(type(self), self.fact, place=self.place, next_step=self.next_step)


class CaptureError(FmeError):
    """The module could not be turned into a graph."""


class TargetError(FmeError, TypeError):
    """The object given to a public function is not one it can work on."""


class OptionError(FmeError, ValueError):
    """An option has a value that is not understood, or not supported yet."""


class BudgetInfeasible(FmeError, MemoryError):
    """No plan holds as little as was asked for. ``floor_bytes`` is the least that was found, ``allowed_bytes`` the
    limit; both count the same things (activations, or everything on the device once a door has added the rest)."""

    def __init__(
        self, floor_bytes: int, allowed_bytes: int, *, fact: str = "", place: str = "", next_step: str = ""
    ) -> None:
        self.floor_bytes, self.allowed_bytes = floor_bytes, allowed_bytes
        gib = 2**30
        said = (
            f"{allowed_bytes / gib:.3f} GiB are allowed, the least that any plan holds is {floor_bytes / gib:.3f} GiB"
        )
        super().__init__(fact or said, place=place, next_step=next_step)

    def _made_again(self) -> partial[Self]:
        said = {"fact": self.fact, "place": self.place, "next_step": self.next_step}
        return partial(type(self), self.floor_bytes, self.allowed_bytes, **said)


class BackendError(FmeError, RuntimeError):
    """A backend could not compile something, and running it eagerly was not allowed."""


class GradientError(FmeError, RuntimeError):
    """An optimized module was called in a way that needs gradients; fmecompile is for inference."""


class PlanMismatch(FmeError, ValueError):
    """A saved plan does not belong to this module, signature or version."""


class CalibrationMismatch(OptionError):
    """A calibration is damaged, of another version, or belongs to another model or number of steps."""


class VerificationError(FmeError, AssertionError):
    """A compiled program held more bytes than its projection, or broke an invariant of the graph."""


def near(wanted: str, names: Iterable[str], otherwise: str) -> str:
    """The next step for someone who asked for a name that is not there."""
    found = difflib.get_close_matches(wanted, sorted(set(names)), 3, 0.4)
    return f"near it are {', '.join(found)}" if found else otherwise
