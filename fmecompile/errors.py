"""Errors: one class each, with the place and the next step in the message."""

from __future__ import annotations


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


class CaptureError(FmeError):
    """The module could not be turned into a graph."""


class TargetError(FmeError, TypeError):
    """The object given to a public function is not one it can work on."""


class OptionError(FmeError, ValueError):
    """An option has a value that is not understood, or not supported yet."""


class GradientError(FmeError, RuntimeError):
    """An optimized module was called in a way that needs gradients; fmecompile is for inference."""


class PlanMismatch(FmeError, ValueError):
    """A saved plan does not belong to this module, signature or version."""


class VerificationError(FmeError, AssertionError):
    """A compiled program held more bytes than its projection, or broke an invariant of the graph."""
