"""What an option of a policy may be: each check raises ``OptionError`` with the fact and the next step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from fmecompile.errors import OptionError


def whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """``value`` is an integer from ``least`` to ``most`` (no upper end when None). A bool is none."""
    if _is_a(Integral, value) and value >= least and (most is None or value <= most):
        return
    reach = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise OptionError(
        f"{name}={value!r} is not a whole number {reach}", next_step=f"give {name} a whole number {reach}"
    )


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """``value`` is a finite real number from ``least`` to ``most``, ends included. A bool is none."""
    if _is_a(Real, value) and math.isfinite(value) and least <= value <= most:
        return
    ends = [f"of at least {least:g}"] * (least > -math.inf) + [f"of at most {most:g}"] * (most < math.inf)
    reach = " and ".join(["a finite number", *ends])
    raise OptionError(f"{name}={value!r} is not {reach}", next_step=f"give {name} {reach}")


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise OptionError(f"{name}={value!r} is not understood", next_step=f"give {name} one of {listed}")


def window(name: str, value: Any) -> None:
    """``value`` is a pair (low, high) of finite numbers with low < high."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise OptionError(f"{name}={value!r} is not a pair", next_step=f"give {name} a tuple (low, high)")
    for end in value:
        number(name, end)
    if value[0] >= value[1]:
        raise OptionError(f"{name}={value!r} holds nothing", next_step=f"give {name} a tuple (low, high), low < high")


def numbers(name: str, values: Any, least: float = -math.inf, most: float = math.inf) -> tuple[float, ...]:
    """The values as floats, each checked like ``number``; there is at least one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{name}={values!r} is no list of numbers", next_step=f"give {name} a tuple of numbers")
    listed = tuple(values)
    if not listed:
        raise OptionError(f"{name} is empty", next_step=f"give {name} at least one number")
    for at, value in enumerate(listed):
        number(f"{name}[{at}]", value, least, most)
    return tuple(float(value) for value in listed)


def names(name: str, value: Any) -> str | tuple[str, ...]:
    """A name or a pattern, or several: a list becomes a tuple."""
    several = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not several or not all(isinstance(item, str) and item for item in several):
        raise OptionError(
            f"{name}={value!r} names nothing", next_step=f'give {name} a name, a tuple of names or "auto"'
        )
    return value if isinstance(value, str) else several
