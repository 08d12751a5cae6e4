"""Errors where nobody expects them, and what is alive afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmecompile.analysis.facts import FactTable
from fmecompile.partition.build import Builder
from fmecompile.passes.chunk_loops import ChunkLoops
from fmecompile.runtime.measure import rounded_bytes

ERRORS = (torch.OutOfMemoryError, torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt, ValueError, MemoryError)
COMPILER = ((FactTable, "_run"), (Builder, "_body"), (ChunkLoops, "apply"), (FactTable, "__call__"))
"""Where the compiler may be cut short."""


class Failing(TorchDispatchMode):
    """Raises at the call number ``at``, counted from 0."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = at, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left == 0:
            self.left = -1
            raise self.error(f"injected at {func}")
        self.left -= 1
        return func(*args, **(kwargs or {}))


@contextmanager
def failing_compiler(rng: Random) -> Iterator[None]:
    """One of the steps of a compilation raises, the first time or later."""
    owner, name = rng.choice(COMPILER)
    left, error, plain = rng.choice((0, 1, 3, 10)), rng.choice(ERRORS), getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise error(f"injected at {owner.__name__}.{name}")
        return plain(*args, **kwargs)

    with mock.patch.object(owner, name, failing):
        yield


def live_bytes() -> int:
    """Bytes of the storages of all tensors that anyone holds."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not isinstance(item, FakeTensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage._cdata] = rounded_bytes(storage.nbytes())
    return sum(storages.values())
