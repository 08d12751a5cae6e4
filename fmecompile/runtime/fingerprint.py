"""A structure fingerprint of a module, cheap enough to check at every call.

A compiled program stays valid while the module tree, plain attributes and the kind of every weight stay as they were at
capture. Weight *values* may change at will: they are read from the live module at each call. What is noticed: a LoRA
added or scaled, an attention processor swapped, FreeNoise or FreeU switched on, ``.to(dtype)``, ``.to(device)``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set)
_TABLES = ("_modules", "_parameters", "_buffers")
_KINDS = (*map(operator.attrgetter, ("dtype", "device", "shape")), torch.Tensor.stride)
"""What a program is specialised to in a weight. Shapes change when adapters of another rank are swapped in."""


class Fingerprint:
    """The structure of ``module`` at one moment; :meth:`holds` tells whether it still is so.

    Compares, for each sub-module, its attribute dictionary (identities first, so unchanged attributes cost nothing),
    its containers, and the dtype, device, shape and strides of its weights. ``ignore`` names attributes of the root
    that may change.
    """

    def __init__(self, module: nn.Module, ignore: frozenset[str] = frozenset()) -> None:
        modules = list(module.modules())
        self._root = module
        self._ignored = ignore
        self._root_state = self._own_state()
        self._states = [vars(m) for m in modules[1:]]
        self._saved_states = [dict(state) for state in self._states]
        held = [value for m in modules for value in _containers(m, ignore if m is module else frozenset())]
        self._containers = held
        self._saved_containers = [value.copy() for value in held]
        self._weights = [d for m in modules for d in (m._parameters, m._buffers)]
        self._saved_weights = self._weight_kinds()

    def _own_state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._root).items() if name not in self._ignored}

    def _weight_kinds(self) -> tuple[list[Any], ...]:
        tensors = [t for weights in self._weights for t in weights.values() if t is not None]
        return tuple(list(map(kind, tensors)) for kind in _KINDS)

    def holds(self) -> bool:
        """Whether the module still has the structure it had."""
        try:
            return (
                all(map(operator.eq, self._states, self._saved_states))
                and all(map(operator.eq, self._containers, self._saved_containers))
                and self._own_state() == self._root_state
                and self._weight_kinds() == self._saved_weights
            )
        except (RuntimeError, ValueError):  # a tensor attribute was replaced: its comparison has no single truth value
            return False


def _containers(module: nn.Module, ignore: frozenset[str]) -> list[Any]:
    """Mutable attributes that may change behind an unchanged identity: sub-module tables, plain containers and plain
    objects of the user's, such as attention processors with a scale."""
    found: list[Any] = [module._modules] if module._modules else []
    for name, value in vars(module).items():
        if name in ignore or name in _TABLES:
            continue
        if isinstance(value, _CONTAINERS):
            found.append(value)
        elif not isinstance(value, (nn.Module, torch.Tensor)) and _is_settings(value):
            found.append(vars(value))
    return found


def _is_settings(value: Any) -> bool:
    """An object all of whose attributes are plain values."""
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and all(map(_is_plain, attributes.values()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
