"""pipeline-chunks: let trips of a loop overlap where that saves time and their working sets have room.

    before  trip 0 | trip 1 | trip 2          one working set
    after   trip 0 | trip 2                   two
              trip 1 | ...

On a device that works while the host asks for more, each kernel takes a little time however small it is, in which most
of the device is idle; another trip's kernels fill it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmecompile.graph.group import Group
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.partition.partition import Answer, Chosen, Partitioner
from fmecompile.runtime.chunk_loop import must_run_in_order
from fmecompile.runtime.rates import Rates

LEAST_GAIN = 0.05
"""The share of a loop's time that pipelining has to save."""
STREAM_BYTES = 32 * 2**20
"""What a stream of its own costs: cuBLAS keeps a workspace for each, of this size on the devices with the largest."""


@dataclass(frozen=True)
class PipelineChunks:
    """Run the loops that gain by it in ``slots`` slots, as long as what is held then stays within ``limit_bytes``."""

    limit_bytes: int
    slots: int = 2

    def apply(self, partitioner: Partitioner, answer: Answer) -> Answer:
        """The answer with slots; peaks and times are those with them."""
        return replace(answer, chosen=tuple(self._pipelined(partitioner, chosen) for chosen in answer.chosen))

    def _pipelined(self, partitioner: Partitioner, chosen: Chosen) -> Chosen:
        group = slotted(partitioner, chosen.group, self.slots)
        peak = chosen.peak_bytes - chosen.group.working_bytes + group.working_bytes
        gain = gain_s(chosen, partitioner.region.rates, self.slots)
        least = LEAST_GAIN * chosen.choice.candidate.trips_s(chosen.choice.trips, chosen.choice.chunk)
        if peak > self.limit_bytes or gain <= least or not _is_on_gpu(group):
            return chosen
        return replace(chosen, group=group, peak_bytes=peak, extra_s=chosen.extra_s - gain)


def slotted(partitioner: Partitioner, group: Group, slots: int) -> Group:
    """The group in so many slots, or in one where its trips must run in order."""
    roots = [partitioner.storages.roots.get(node, node) for node in group.operands]
    return group.with_slots(1 if must_run_in_order(group.spec, roots) else max(min(slots, group.spec.trips), 1))


def gain_s(chosen: Chosen, rates: Rates, slots: int) -> float:
    """Seconds that overlapping trips save: of what kernels take however small they are, one slot's share stays. Nothing
    where the host asks for trips no faster than the device runs them; changing the stream is one more call to ask for.
    """
    candidate, chunk, trips = chosen.choice.candidate, chosen.choice.chunk, chosen.choice.trips
    if not rates.issue_s:
        return 0.0
    calls, run_s = candidate.issue_s / rates.issue_s, candidate.trips_s(trips, chunk)
    overlapped_s = run_s - trips * calls * rates.call_s * (1 - 1 / slots)
    return max(run_s, trips * candidate.issue_s) - max(overlapped_s, trips * (calls + 1) * rates.issue_s)


def _is_on_gpu(group: Group) -> bool:
    """Where there are streams."""
    specs = (node_spec(node) for node in (*group.operands, *group.inside))
    return any(isinstance(spec, TensorSpec) and spec.device.type == "cuda" for spec in specs)
