"""Amounts of memory as people write them: ``8GiB``, ``7.5 GB``, ``512 MiB``, or a whole number of bytes."""

from __future__ import annotations

import re
from decimal import Decimal

from fmecompile.errors import OptionError

_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
UNIT_BYTES = {"": 1, **_DECIMAL, **_BINARY}
"""Bytes of each unit, in capitals. ``GB`` is 10^9: where the reader meant 2^30, the smaller promise still holds."""

_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)
_NEXT_STEP = "give a unit, as in '8GiB', '7.5 GB' or '512MiB', or a whole number of bytes"


def parse_bytes(text: str | int) -> int:
    """Bytes, at least 1: ``"8GiB"`` -> 8589934592, ``"7.5 GB"`` -> 7500000000, ``1024`` and ``"1024"`` -> 1024.

    Spaces and capitals do not matter; a fraction of a byte is cut off.

    Raises:
        OptionError: it is no amount of memory, has an unknown unit, or is less than one byte.
    """
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise OptionError(f"{text!r} is not an amount of memory", next_step=_NEXT_STEP)
    amount = text if isinstance(text, int) else _amount(text)
    if amount < 1:
        raise OptionError(f"{text!r} is less than one byte", next_step=_NEXT_STEP)
    return amount


def _amount(text: str) -> int:
    found = _AMOUNT.fullmatch(text)
    if found is None:
        raise OptionError(f"{text!r} is not an amount of memory", next_step=_NEXT_STEP)
    number, unit = found.groups()
    if unit.upper() not in UNIT_BYTES:
        known = ", ".join((*_DECIMAL, "KiB", "MiB", "GiB", "TiB"))
        raise OptionError(f"{text!r} has the unknown unit {unit!r}; there are {known}", next_step=_NEXT_STEP)
    if not unit and not number.isdecimal():
        raise OptionError(f"{text!r} is not a whole number of bytes", next_step=_NEXT_STEP)
    return int(Decimal(number) * UNIT_BYTES[unit.upper()])
