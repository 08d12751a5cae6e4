"""Amounts of memory: what is understood, and what is refused with a next step."""

from __future__ import annotations

from typing import Any

import pytest

from fmecompile.budget import parse_bytes
from fmecompile.errors import OptionError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        (" 8 GB ", 8 * 10**9),
        ("7.5GiB", 15 * GIB // 2),
        (".5 GiB", GIB // 2),
        ("0.1GB", 10**8),
        ("1TiB", 1024 * GIB),
        ("1.5KiB", 1536),
        ("12B", 12),
        ("1024", 1024),
        (1024, 1024),
        (1, 1),
    ],
)
def test_amounts(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-8GiB",
        "8 GiB 2",
        "8,5GiB",
        "1e9",
        "nan",
        "inf",
        "8G",
        "8 apples",
        "0.5",
        "0",
        "0GiB",
        "0.1B",
        "٨GiB",
    ],
)
def test_what_is_no_amount_is_refused_with_a_next_step(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value) and "8GiB" in caught.value.next_step


@pytest.mark.parametrize("value", [0, -1, True, 0.5, None, b"8GiB"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(OptionError):
        parse_bytes(value)
