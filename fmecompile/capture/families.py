"""Facts about families of diffusers models, as data and rules of structure: nothing in the compiler depends on a
model's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

SCALAR_INPUTS = frozenset({"timestep", "timesteps", "t", "sigma"})
"""Arguments of denoisers that arrive as Python numbers and change at every step."""

COMPONENTS = ("unet", "transformer", "transformer_2", "controlnet", "vae")
"""Attributes of a diffusion pipeline that hold what runs on whole clips. Text and image encoders see no clip."""

HALVES = ("decoder", "encoder")
"""Sub-modules of an autoencoder that do its work."""

DECODER = "vae.decoder"
"""The part of a pipeline that turns latents into frames."""

DENOISERS = ("unet", "transformer", "transformer_2")
"""Components that a diffusion pipeline calls at every step; a module that is no part of one is taken for one."""

BRANCHES = "nets"
"""Where a module that only sums over ControlNets keeps them."""


def is_pipeline(target: object) -> bool:
    """Whether ``target`` is a diffusion pipeline: no module, with an attribute that may hold a denoiser or a VAE."""
    return not isinstance(target, nn.Module) and any(hasattr(target, name) for name in COMPONENTS)


def components(pipeline: Any) -> dict[str, Any]:
    """Everything a diffusion pipeline is made of, by attribute name."""
    named = getattr(pipeline, "components", None)
    return dict(named) if isinstance(named, Mapping) else {name: getattr(pipeline, name, None) for name in COMPONENTS}


def parts(target: object) -> dict[str, nn.Module]:
    """The modules whose ``forward`` is compiled when ``target`` is optimized, by path; each once.

    A module is its own part (path ``""``). An autoencoder's are its decoder and encoder, so that the Python of its
    ``decode`` (slices, tiles, hooks, what it returns) stays as it is. A pipeline's are those of its components.
    """
    if isinstance(target, nn.Module):
        found = _inside(target, "")
    else:
        found = (
            part
            for name in COMPONENTS
            for path, module in _listed(getattr(target, name, None), name)
            for part in _inside(module, path)
        )
    once: dict[int, tuple[str, nn.Module]] = {}
    for path, module in found:
        once.setdefault(id(module), (path, module))
    return dict(once.values())


def _listed(component: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A component, or the modules of a list of them; nothing for what is missing or no module."""
    if isinstance(component, nn.Module):
        yield path, component
    elif isinstance(component, (list, tuple)):
        for k, item in enumerate(component):
            yield from _listed(item, f"{path}.{k}")


def _inside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    branches = getattr(module, BRANCHES, None)
    if is_autoencoder(module):
        yield from ((f"{path}.{name}".lstrip("."), getattr(module, name)) for name in HALVES)
    elif isinstance(branches, nn.ModuleList):
        yield from ((f"{path}.{BRANCHES}.{k}".lstrip("."), net) for k, net in enumerate(branches))
    else:
        yield path, module


def is_denoiser(path: str) -> bool:
    """Whether the part at ``path`` is called at every step."""
    return path in ("", *DENOISERS)


def is_autoencoder(module: nn.Module) -> bool:
    """Whether ``module`` has ``encode`` and ``decode``, and sub-modules that do them."""
    methods = all(callable(getattr(module, name, None)) for name in ("encode", "decode"))
    return methods and all(isinstance(getattr(module, name, None), nn.Module) for name in HALVES)
