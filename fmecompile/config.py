"""The one module that reads the environment."""

from __future__ import annotations

import os

from fmecompile.errors import OptionError


def min_trip_bytes() -> int:
    """The least working set of one chunk trip, in bytes: smaller chunks cost more in calls than they save. 0: no limit.

    4 MiB by default; ``FMECOMPILE_MIN_TRIP_BYTES`` overrides it. Loops of real sizes work on tens of MiB a trip.
    """
    text = os.environ.get("FMECOMPILE_MIN_TRIP_BYTES", str(4 << 20))
    if not text.isdecimal():
        raise OptionError(
            f"FMECOMPILE_MIN_TRIP_BYTES={text!r} is not a number of bytes", next_step="unset it, or give a whole number"
        )
    return int(text)
