"""A group ready to be rewritten: which nodes run in the loop, what it slices, what it returns, and its bodies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from fmecompile.runtime.chunk_loop import LoopSpec


@dataclass(frozen=True)
class Group:
    """A run of operators executed as one chunk loop.

    ``inside`` run once a trip; ``hoisted`` and ``outside`` (views of values from before the group that are read after
    it) run once, in front; ``behind`` are views of the group's results that are read after it. ``operands`` are the
    values from outside in the order of the loop's operands; ``results`` own the storages the loop returns.
    """

    inside: tuple[fx.Node, ...]
    hoisted: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    behind: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    spec: LoopSpec
    bodies: tuple[fx.Graph, ...]
    body_bytes: int
    """What one trip holds at most, beyond operands and outputs."""
    result_bytes: tuple[int, ...]
    """The storage of each result; one that takes over an operand's storage allocates nothing."""
    hoisted_bytes: int

    @property
    def output_bytes(self) -> int:
        """What the loop allocates for its outputs."""
        outputs = zip(self.result_bytes, self.spec.outputs, strict=True)
        return sum(nbytes for nbytes, output in outputs if output.takes is None)

    @property
    def working_bytes(self) -> int:
        """What the trips that are under way at once hold at most, beyond operands and outputs."""
        return min(self.spec.slots, self.spec.trips) * self.body_bytes

    def with_slots(self, slots: int) -> Group:
        """The same group with so many trips under way at once."""
        return replace(self, spec=replace(self.spec, slots=slots))
