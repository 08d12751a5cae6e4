"""Amounts of memory as people write them: ``8GiB``, ``7.5 GB``, ``512 MiB``, or a whole number of bytes; and what such
an amount is spent on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Allowance:
    """What a budget is made of at one call, in bytes; what is left is for activations.

    ``residents`` are the other parts of a diffusion pipeline on the same device, by name. ``workspace_bytes`` is what
    the device's libraries hold beside tensors, ``kept_bytes`` what earlier steps kept for later ones.
    """

    budget_bytes: int
    weight_bytes: int
    input_bytes: int
    residents: tuple[tuple[str, int], ...] = ()
    workspace_bytes: int = 0
    kept_bytes: int = 0

    @property
    def owners(self) -> tuple[tuple[str, int], ...]:
        """Everything but activations, by name; nothing of no bytes."""
        named = (
            ("weights", self.weight_bytes),
            ("inputs", self.input_bytes),
            *self.residents,
            ("kept for later steps", self.kept_bytes),
            ("library workspaces", self.workspace_bytes),
        )
        return tuple((name, size) for name, size in named if size)

    @property
    def taken_bytes(self) -> int:
        return sum(size for _, size in self.owners)

    @property
    def activation_bytes(self) -> int:
        """What activations may hold; negative where the rest is too much already."""
        return self.budget_bytes - self.taken_bytes

    def __str__(self) -> str:
        held = ", ".join(f"{name} {mib(size)}" for name, size in self.owners)
        return f"budget {mib(self.budget_bytes)}: {held}; {mib(self.activation_bytes)} left for activations"


def mib(size_bytes: int) -> str:
    """``12.3 MiB``; small amounts keep three digits."""
    return f"{size_bytes / 2**20:.{1 if abs(size_bytes) >= 10 * 2**20 else 3}f} MiB"
