"""The input signature of a call: what a compiled program is specialised to."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten


class Call(NamedTuple):
    """One call's arguments, flattened. ``key`` is equal for calls that one program can serve."""

    leaves: list[Any]
    spec: TreeSpec
    key: tuple[Any, ...]


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any], situation: Hashable = ()) -> Call:
    """Flatten ``(args, kwargs)``. Tensors enter the key by shape, strides, dtype and device, other leaves by value;
    ``situation`` is whatever else the program depends on.
    """
    leaves, spec = tree_flatten((args, kwargs))
    return Call(leaves, spec, (spec, situation, *map(_leaf_key, leaves)))


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), id(leaf))
    return (type(leaf), leaf)


def fake_mode_of(leaves: list[Any]) -> Any:
    """The fake tensor mode of a call, or None when it runs on real tensors."""
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def describe(leaves: list[Any]) -> str:
    """The signature in words: ``(2, 14, 8, 72, 128) float16 cpu; ...``."""
    parts = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append(f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')} {leaf.device}")
        else:
            parts.append(repr(leaf)[:40])
    return "; ".join(parts)
