"""A fused run: several operators behind one call of a compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fmecompile.runtime.measure import count_allocated

Kernel = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes its operands in a list, which it may empty, and returns new tensors."""


class FusedRun(nn.Module):
    """Runs ``kernel`` on real operands that have ``strides``, and ``operators``, which say what it computes, on others:
    a library may return other strides than it says it would. On fake operands only its results are
    allocated, by the shape, stride and dtype of each in ``results``. ``allocated_bytes`` are what a call allocates, its
    results included."""

    def __init__(
        self,
        operators: fx.GraphModule,
        kernel: Kernel,
        strides: Sequence[tuple[int, ...]],
        results: Sequence[tuple[Any, Any, Any]],
        allocated_bytes: int,
    ) -> None:
        super().__init__()
        self.operators = operators
        self._kernel, self._strides = kernel, tuple(strides)
        self.results = tuple(results)
        self.allocated_bytes = allocated_bytes

    def forward(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if isinstance(operands[0], FakeTensor):
            device = operands[0].device
            return tuple(torch.empty_strided(s, t, dtype=d, device=device) for s, t, d in self.results)
        if tuple(operand.stride() for operand in operands) != self._strides:
            return self.operators(*operands)
        results = tuple(self._kernel(list(operands)))
        count_allocated(results)
        return results
