"""Plan files as nobody would write them."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

STRINGS = (
    "", " ", "x" * 5000, "\x00", "\ud800", "‮", "é☃", "../../etc/passwd", "__import__('os').abort()", "!!python/object",
    "torch.ops.aten.add.Tensor", "None", "0", "getitem", "output", "\n", "{}", "%s%n",
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 5, -1, -7, 10**6, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0, True, False)
OTHERS: tuple[Any, ...] = (None, [], {}, [[]], {"a": 1}, "1", [1], [None])
TOKENS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 2000,
    "{" * 500,
    '"',
    ",",
    "\\u0000",
    "//",
    "0x10",
    "'",
)

Path = tuple[Any, ...]


def mutated(rng: Random, text: str, names: list[str]) -> bytes:
    """``text`` with one to three changes; ``names`` are operators of the graph."""
    data = json.loads(text)
    if rng.random() < 0.15:
        return _as_bytes(rng, text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = _changed(rng, data, names)
    found = json.dumps(data)
    return _as_text(rng, found) if rng.random() < 0.1 else found.encode("utf-8", "surrogatepass")


def _as_bytes(rng: Random, text: str) -> bytes:
    """Bytes flipped, cut out, or doubled."""
    found = bytearray(text.encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(found))
        way = rng.randrange(4)
        if way == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del found[at : at + rng.randint(1, 40)]
        elif way == 2:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        else:
            found[at] = rng.randrange(256)
        found = found or bytearray(b"x")
    return bytes(found)


def _as_text(rng: Random, text: str) -> bytes:
    """A token too many, or a key twice."""
    if rng.random() < 0.5:
        at = rng.randrange(len(text))
        return (text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(3) :]).encode()
    at = text.index("{") + 1
    return (text[:at] + '"groups": [], ' + text[at:]).encode()


def _changed(rng: Random, data: Any, names: list[str]) -> Any:
    data = copy.deepcopy(data)
    paths = [path for path in _paths(data) if path]
    inner = [path for path in paths if path[0] in ("groups", "recomputed", "spilled", "joined")]
    path = rng.choice(inner if inner and rng.random() < 0.7 else paths)
    parent = data
    for step in path[:-1]:
        parent = parent[step]
    way = rng.random()
    if way < 0.1:
        del parent[path[-1]]
    elif way < 0.2 and isinstance(parent, dict):
        parent[rng.choice(STRINGS)] = parent[path[-1]]
    elif way < 0.3 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(parent)))
    elif way < 0.35 and isinstance(parent, list):
        rng.shuffle(parent)
    elif way < 0.4:
        parent[path[-1]] = _nested(rng.choice((3, 20, 90)), parent[path[-1]])
    else:
        parent[path[-1]] = _other(rng, parent[path[-1]], names)
    return data


def _other(rng: Random, value: Any, names: list[str]) -> Any:
    """Of the same kind mostly: a number near it, another operator's name."""
    if rng.random() < 0.2:
        return rng.choice((*OTHERS, *NUMBERS, *STRINGS))
    if isinstance(value, str):
        return rng.choice(names) if rng.random() < 0.8 else rng.choice(STRINGS)
    if isinstance(value, (int, float)):
        return value + rng.choice((-2, -1, 1, 2)) if rng.random() < 0.7 else rng.choice(NUMBERS)
    if isinstance(value, list) and not value:
        return [rng.choice((rng.choice(names), [rng.choice(names), rng.choice(names)]))]
    return rng.choice(OTHERS)


def _nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _paths(data: Any, path: Path = ()) -> list[Path]:
    found = [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        found += _paths(item, (*path, key))
    return found
