"""Addresses of elements in any layout: dimensions sorted and joined on the host, offsets computed in the kernel."""

# pyright: reportInvalidTypeForm=false
# Without Triton its annotations are a stand-in.

from collections.abc import Sequence
from typing import Any

import torch

from fmecompile.kernels.registry import jit, tl

BLOCK = 1024
"""Elements that one program of a pointwise kernel computes."""

Strides = tuple[int, ...]


def joined(shape: Sequence[int], *strides: Sequence[int]) -> tuple[Strides, list[Strides]]:
    """Sizes, and strides in elements of each operand, of the fewest dimensions that reach the same addresses.

    Dimensions go from the outermost to the innermost in the memory of the first operand; neighbours become one where
    every operand steps through them evenly, and those of size 1 go. At least one dimension is left.
    """
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: (-strides[0][d], d))
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d in order:
        if sizes and all(s[-1] == own[d] * shape[d] for s, own in zip(steps, strides, strict=True)):
            sizes[-1] *= shape[d]
            for s, own in zip(steps, strides, strict=True):
                s[-1] = own[d]
            continue
        sizes.append(shape[d])
        for s, own in zip(steps, strides, strict=True):
            s.append(own[d])
    return tuple(sizes) or (1,), [tuple(s) or (0,) for s in steps]


def is_wide(*tensors: torch.Tensor) -> bool:
    """Whether an offset in one of ``tensors``, or a count of elements, takes 64 bits."""
    spans = (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return max(*spans, *(t.numel() for t in tensors)) > 2**31 - BLOCK


def programs(count: int) -> tuple[int]:
    """The grid of a pointwise kernel: one dimension, which alone goes up to 2**31 - 1."""
    return (-(-count // BLOCK),)


def computed_in(dtype: torch.dtype) -> Any:
    """The type that a kernel computes in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@jit
def places(WIDE: tl.constexpr, SIZE: tl.constexpr):
    """The numbers of the elements that this program computes."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * SIZE + tl.arange(0, SIZE)


@jit
def offsets(place, sizes, strides):
    """Where the elements numbered ``place``, the last dimension fastest, lie in an operand with ``strides``."""
    offset = place * 0
    rank: tl.constexpr = len(sizes)
    for step in tl.static_range(rank):
        offset += (place % sizes[rank - 1 - step]) * strides[rank - 1 - step]
        place = place // sizes[rank - 1 - step]
    return offset
