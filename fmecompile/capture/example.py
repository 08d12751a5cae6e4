"""Example calls without data: what a program was compiled for, kept so that it can be compiled again or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fmecompile.capture.shell import stripped
from fmecompile.graph.specs import TensorSpec, spec_of
from fmecompile.runtime.measure import Measurement, measured


@dataclass(frozen=True)
class Example:
    """The arguments of one call with every tensor replaced by its spec."""

    leaves: tuple[Any, ...]
    tree: TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        leaves, tree = tree_flatten((args, kwargs))
        return cls(tuple(spec_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), tree)

    def materialise(self, mode: FakeTensorMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call again, on fake tensors of ``mode``."""
        with mode:
            leaves = [_empty(leaf) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.tree)
        return args, kwargs


def _empty(spec: TensorSpec) -> torch.Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)


@contextmanager
def fake_weights(module: nn.Module, mode: FakeTensorMode) -> Iterator[dict[str, torch.Tensor]]:
    """Fake twins of the parameters and buffers of ``module``, by qualified name."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    with mode:
        yield {name: _empty(spec_of(tensor)) for name, tensor in named.items()}


def eager_measurement(module: nn.Module, example: Example) -> Measurement:
    """What the unmodified module holds at most during the call, on fake tensors: no data, no weights needed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = example.materialise(mode)
    with fake_weights(module, mode) as weights, mode:
        known = (weights, args, kwargs)
        run = measured(lambda: functional_call(module, weights, args, kwargs, tie_weights=False), known, module)
    return replace(run, modules=tuple((stripped(name), at) for name, at in run.modules))
