"""Check a finished program before its first real call: run it on fake tensors and count live storages.

Trips of a loop that have the same shape hold the same bytes, so one full chunk and the tail of each loop are run.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.graph.program import Program
from fmecompile.graph.specs import tensor_spec
from fmecompile.runtime.chunk_loop import ChunkLoop
from fmecompile.runtime.measure import StorageMeter
from fmecompile.runtime.watch import watched_by


def measured_peak_bytes(program: Program, loops: dict[str, nn.Module]) -> int:
    """Peak of live storages of the program on fake tensors, weights and inputs not counted."""
    root = nn.Module()
    for name, loop in loops.items():
        root.add_module(name, _Probe(loop) if isinstance(loop, ChunkLoop) else loop)
    module = fx.GraphModule(root, program.graph)
    with watched_by(None), FakeTensorMode() as mode, torch.no_grad():
        specs = [tensor_spec(node) for node in program.placeholders]
        operands = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in specs]
        del mode
        with StorageMeter(operands) as meter:
            module(*operands)
    return meter.peak_bytes


class _Probe(nn.Module):
    """A chunk loop that runs one trip of each shape."""

    def __init__(self, loop: ChunkLoop) -> None:
        super().__init__()
        self._loop = loop

    def forward(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._loop.run(operands, self._loop.distinct_trips)
