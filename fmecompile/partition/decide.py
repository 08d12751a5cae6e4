"""Between groups and plans: describe what was chosen, and build again what a saved plan says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from torch import fx

from fmecompile.graph.group import Group
from fmecompile.graph.invariants import module_path
from fmecompile.graph.plan import Plan, PlannedAxis, PlannedGroup
from fmecompile.partition.candidates import Candidate
from fmecompile.partition.nests import Nest
from fmecompile.partition.partition import Answer, Chosen, Partitioner
from fmecompile.partition.search import Choice
from fmecompile.passes.pipeline_chunks import slotted


def describe(partitioner: Partitioner, answer: Answer) -> tuple[PlannedGroup, ...]:
    """The groups of an answer in words and names."""
    return tuple(_described(partitioner, chosen, answer.allowed_bytes) for chosen in answer.chosen)


def _described(partitioner: Partitioner, chosen: Chosen, allowed_bytes: int) -> PlannedGroup:
    group, candidate = chosen.group, chosen.choice.candidate
    nodes = partitioner.region.nodes[candidate.start : candidate.stop]
    axes = tuple(
        _anchored(partitioner, group, atom, axis.size, axis.chunk)
        for atom, axis in zip(candidate.nest, group.spec.axes, strict=True)
    )
    return PlannedGroup(
        first=nodes[0].name,
        last=nodes[-1].name,
        axes=axes,
        modules=_modules(group.inside),
        operators=tuple(str(node.target) if not callable(node.target) else _name(node) for node in group.inside),
        peak_bytes=chosen.peak_bytes,
        whole_bytes=chosen.whole_bytes,
        taken_over=sum(output.takes is not None for output in group.spec.outputs),
        extra_s=chosen.extra_s,
        whole_s=sum(cost.whole_s for cost in partitioner.region.costs[candidate.start : candidate.stop]),
        slots=group.spec.slots,
        because=f"run whole it would hold {chosen.whole_bytes / 2**20:.0f} MiB where {allowed_bytes / 2**20:.0f} "
        f"MiB are allowed; {chosen.choice.trips} trips are the fastest way to fit",
    )


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _anchored(partitioner: Partitioner, group: Group, atom: int, size: int, chunk: int) -> PlannedAxis:
    """Name an atom by a place where it occurs."""
    for node in group.inside:
        for dim, axis in enumerate(partitioner.axes[node].axes):
            if atom in axis:
                return PlannedAxis(node.name, dim, axis.index(atom), size, chunk)
    raise AssertionError("a loop axis occurs in its group")


def _modules(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """The module paths a group spans, each at the depth where most operators agree."""
    paths = [path for node in nodes if (path := module_path(node))]
    if not paths:
        return ()
    parts = zip(*(path.split(".") for path in paths), strict=False)
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts)]
    if common:
        return (".".join(common),)
    heads = Counter(".".join(path.split(".")[:3]) for path in paths)
    return tuple(heads)


def replay(partitioner: Partitioner, plan: Plan) -> Answer:
    """Build the groups of a saved plan without a search."""
    position = {node.name: at for at, node in enumerate(partitioner.region.nodes)}
    chosen = tuple(_rebuilt(partitioner, planned, position) for planned in plan.groups)
    return Answer(chosen, plan.floor_bytes, plan.allowed_bytes, plan.joined)


def _rebuilt(partitioner: Partitioner, planned: PlannedGroup, position: dict[str, int]) -> Chosen:
    start, stop = position[planned.first], position[planned.last] + 1
    nodes = partitioner.region.nodes
    nest: Nest = tuple(partitioner.axes[nodes[position[a.node]]].axes[a.dim][a.part] for a in planned.axes)
    chunk = planned.axes[-1].chunk
    group = slotted(partitioner, partitioner.builder.build(start, stop, nest, chunk), planned.slots)
    candidate = Candidate(start, stop, nest, planned.peak_bytes, (), size=planned.axes[-1].size)
    peak = partitioner.peak_bytes(start, group)
    candidate.learn(chunk, peak, 0)
    return Chosen(group, Choice(candidate, chunk, planned.trips), peak, planned.whole_bytes, planned.extra_s)
