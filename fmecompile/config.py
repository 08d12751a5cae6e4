"""The one module that reads the environment."""

from __future__ import annotations

import os

from fmecompile.errors import OptionError


def min_trip_bytes() -> int:
    """The least working set of one chunk trip, in bytes: smaller chunks cost more in calls than they save. 0: no limit.

    4 MiB by default; ``FMECOMPILE_MIN_TRIP_BYTES`` overrides it. Loops of real sizes work on tens of MiB a trip.
    """
    return _bytes_of("FMECOMPILE_MIN_TRIP_BYTES", 4 << 20)


def min_fused_bytes() -> int:
    """The least that a kernel has to spare of what one call writes, in bytes: less is not worth compiling it.

    4 MiB by default; ``FMECOMPILE_MIN_FUSED_BYTES`` overrides it.
    """
    return _bytes_of("FMECOMPILE_MIN_FUSED_BYTES", 4 << 20)


def _bytes_of(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise OptionError(f"{name}={text!r} is not a number of bytes", next_step="unset it, or give a whole number")
    return int(text)
