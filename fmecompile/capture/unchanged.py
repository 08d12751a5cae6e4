"""A capture leaves no trace in the module: not a value, not the identity of a list.

``torch.export`` saves the attributes of modules as copies and puts the copies back, so that two modules which shared a
list no longer do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Puts back, afterwards, every attribute of every module inside ``module``, and what their containers held."""
    saved: dict[int, tuple[Any, Any]] = {}
    for inner in module.modules():
        _save(vars(inner), saved)
    try:
        yield
    finally:
        for container, content in saved.values():
            if not _is_same(container, content):
                _put_back(container, content)


def _save(container: Any, saved: dict[int, tuple[Any, Any]]) -> None:
    """A shallow copy of ``container`` and of each dictionary and list in it, at any depth."""
    if id(container) in saved:
        return
    items = container.values() if isinstance(container, dict) else container
    if isinstance(container, (dict, list)):
        saved[id(container)] = (container, dict(container) if isinstance(container, dict) else list(container))
    for item in items:
        if isinstance(item, (dict, list, tuple)) and item:
            _save(item, saved)


def _is_same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in content.items())
    return all(now is value for now, value in zip(container, content, strict=True))


def _put_back(container: Any, content: Any) -> None:
    container.clear()
    container.update(content) if isinstance(container, dict) else container.extend(content)
