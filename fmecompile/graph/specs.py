"""What the compiler knows about a tensor: its shape, strides, dtype and device, never its data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._pytree import tree_map_only


class TensorSpec(NamedTuple):
    """Shape and strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def resized(self, shape: tuple[int, ...]) -> TensorSpec:
        """The same strides with another shape: what narrowing gives."""
        return self._replace(shape=shape)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


SPEC = "fmecompile_spec"
"""The one key this project uses in ``node.meta``: the node's TensorSpec, or a tuple of them, or None."""


def node_spec(node: fx.Node) -> Any:
    return node.meta.get(SPEC)


def tensor_spec(node: fx.Node) -> TensorSpec:
    """The spec of a node that is known to be one tensor."""
    spec = node.meta[SPEC]
    assert isinstance(spec, TensorSpec), f"{node.name} is not a single tensor"
    return spec


def specs_in(arguments: Any) -> Any:
    """``arguments`` of a node with every node replaced by its spec."""
    return fx.map_arg(arguments, node_spec)


def real_specs(values: Any) -> Any:
    """``values`` with every tensor replaced by its spec."""
    return tree_map_only(torch.Tensor, spec_of, values)
