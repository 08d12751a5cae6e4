"""Bytes of weights of any component, the ones that are never run included."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fmecompile.offline.calls import build
from fmecompile.offline.figures import weight_bytes
from fmecompile.offline.model import Component


def component_bytes(component: Component, dtype: torch.dtype) -> int | None:
    """Weights in ``dtype``; None where they cannot be told: no stored count, and no library that builds the class."""
    if component.parameters is not None:
        return component.parameters * dtype.itemsize
    if component.library == "diffusers":
        return weight_bytes(build(component, dtype))
    count = _transformers_count(component) if component.library == "transformers" else None
    return None if count is None else count * dtype.itemsize


def _transformers_count(component: Component) -> int | None:
    """Parameters of a class of transformers, where that is installed and the configuration builds one."""
    try:
        transformers: Any = importlib.import_module("transformers")
        kind = getattr(transformers, component.class_name)
        with torch.device("meta"):
            module = kind(kind.config_class(**component.settings))
    except Exception:  # not installed, another version, or a configuration it refuses: then it is not known
        return None
    return sum(parameter.numel() for parameter in module.parameters())
