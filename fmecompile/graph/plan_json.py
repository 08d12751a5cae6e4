"""From JSON text to frozen dataclasses, by their type hints: whatever does not fit is a PlanMismatch that says where.

A plan file is data from anywhere: nothing of it is run, imported, or looked up by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fmecompile.errors import PlanMismatch

LARGEST = 2**62
"""Bytes, rows and counts are less, by far."""
_NEXT = "make it again with fmecompile.plan"
_Data = TypeVar("_Data")


def parsed(text: str) -> dict[str, Any]:
    """A JSON object. Raises PlanMismatch for anything else, keys that occur twice, and numbers that are none."""
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise PlanMismatch("not a plan: it is nested too deeply", next_step=_NEXT) from error
    except ValueError as error:  # JSONDecodeError is one, and whole numbers of thousands of digits raise a plain one
        raise PlanMismatch(f"not a plan: {error}", next_step=_NEXT) from error
    if not isinstance(data, dict):
        raise PlanMismatch(f"not a plan: {type(data).__name__} instead of an object", next_step=_NEXT)
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def decoded(kind: type[_Data], data: dict[str, Any]) -> _Data:
    """``data`` as the dataclass ``kind``, types checked throughout."""
    return _decoded(kind, data, "")


def _decoded(kind: Any, value: Any, place: str) -> Any:
    if is_dataclass(kind):
        return _record(kind, value, place)
    if hasattr(kind, "_fields"):  # a NamedTuple
        return kind(*_tuple(tuple(_hints(kind).values()), value, place))
    if get_origin(kind) is tuple:
        return _tuple(get_args(kind), value, place)
    if get_origin(kind) is UnionType:
        some = next(option for option in get_args(kind) if option is not NoneType)
        return None if value is None else _decoded(some, value, place)
    _require(_CHECKS[kind](value), f"{_shortened(value)} is no {_NAMES[kind]}", place)
    return kind(value)


def _record(kind: Any, value: Any, place: str) -> Any:
    _require(isinstance(value, dict), f"{_shortened(value)} is no object", place)
    names = {field.name for field in fields(kind)}
    lacking, unknown = sorted(names - value.keys()), sorted(value.keys() - names)
    _require(not lacking, f"the plan lacks fields: {', '.join(lacking)}", place)
    _require(not unknown, f"the plan has unknown fields: {_shortened(', '.join(unknown))}", place)
    hints = _hints(kind)
    made = {name: _decoded(hints[name], item, f"{place}.{name}".lstrip(".")) for name, item in value.items()}
    try:
        return kind(**made)
    except ValueError as error:
        raise PlanMismatch(str(error), place=place, next_step=_NEXT) from error


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    _require(isinstance(value, list), f"{_shortened(value)} is no list", place)
    kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
    _require(len(value) == len(kinds), f"{len(value)} items instead of {len(kinds)}", place)
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_decoded(kind, item, f"{place}[{k}]") for k, (kind, item) in pairs)


def _require(holds: bool, fact: str, place: str) -> None:
    if not holds:
        raise PlanMismatch(fact, place=place, next_step=_NEXT)


def _shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # half a character pair is not


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_real(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and isfinite(value))


_CHECKS: dict[Any, Callable[[Any], bool]] = {
    str: _is_text,
    int: _is_whole,
    float: _is_real,
    bool: lambda value: isinstance(value, bool),
}
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
