"""Recordings of CUDA's allocator in which allocations bear the names of the chunk loops that made them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fmecompile.errors import OptionError
from fmecompile.runtime.watch import Label, watched_by

MAX_ENTRIES = 1_000_000
"""As many allocations and releases are recorded, the latest."""


@contextmanager
def memory_snapshot(path: str | Path) -> Iterator[None]:
    """Record what CUDA's allocator does in here, and write that to ``path`` for the memory viewer of PyTorch.

    What a chunk loop of an optimized module allocates bears the name of its group and its modules as metadata:
    ``chunk_loop_3: down_blocks.0.attentions.0``. Replays of CUDA graphs allocate nothing, and run no loops.

    Raises OptionError where there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise OptionError(
            "a memory snapshot is of the allocator of a CUDA device, and there is none",
            next_step="fmecompile.measure(module, *args) tells what a call holds on every device",
        )
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
    try:
        with watched_by(_named):
            yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _named(label: Label | None) -> Iterator[None]:
    """Allocations of a loop bear its name, and those behind it what they bore before. Trips are of their loop."""
    if label is None:
        yield
        return
    before = torch.cuda.memory._get_memory_metadata()
    torch.cuda.memory._set_memory_metadata(f"{label.name}: {label.modules or 'the module itself'}")
    try:
        yield
    finally:
        torch.cuda.memory._set_memory_metadata(before)
