"""Between groups and plans: describe what was chosen, and build again what a saved plan says."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fmecompile.errors import PlanMismatch
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import common_module, module_path
from fmecompile.graph.outline import Outline, operator_name
from fmecompile.graph.plan import Plan, PlannedAxis, PlannedGroup
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.partition.candidates import Candidate
from fmecompile.partition.nests import Nest, roles
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
        operators=tuple(map(operator_name, group.inside)),
        peak_bytes=chosen.peak_bytes,
        whole_bytes=chosen.whole_bytes,
        taken_over=sum(output.takes is not None for output in group.spec.outputs),
        extra_s=chosen.extra_s,
        whole_s=sum(cost.whole_s for cost in partitioner.region.costs[candidate.start : candidate.stop]),
        slots=group.spec.slots,
        because=f"run whole it would hold {chosen.whole_bytes / 2**20:.0f} MiB where {allowed_bytes / 2**20:.0f} "
        f"MiB are allowed; {chosen.choice.trips} trips are the fastest way to fit",
    )


def durations(partitioner: Partitioner, groups: Sequence[PlannedGroup], after: Outline) -> tuple[float, ...]:
    """Projected seconds of each call of the finished program. Operators that later passes took away count with the next
    one that is left."""
    region = partitioner.region
    step_of = {row.name: k for k, step in enumerate(after.steps()) for row in step}
    found = [
        groups[step[0].group].whole_s + groups[step[0].group].extra_s if step[0].group >= 0 else 0.0
        for step in after.steps()
    ]
    inside = {row.name for row in after.rows if row.group >= 0}
    gone_s = 0.0
    for node, cost in zip(region.nodes, region.costs, strict=True):
        if node.name not in inside:
            gone_s += cost.whole_s
            if node.name in step_of:
                found[step_of[node.name]] += gone_s
                gone_s = 0.0
    return tuple(float(f"{seconds:.4g}") for seconds in found)


def _anchored(partitioner: Partitioner, group: Group, atom: int, size: int, chunk: int) -> PlannedAxis:
    """Name an atom by a place where it occurs."""
    for node in group.inside:
        for dim, axis in enumerate(partitioner.axes[node].axes):
            if atom in axis:
                return PlannedAxis(node.name, dim, axis.index(atom), size, chunk)
    raise AssertionError("a loop axis occurs in its group")


def _modules(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """The module paths a group spans, each at the depth where most operators agree."""
    if common := common_module(nodes):
        return (common,)
    return tuple(dict.fromkeys(".".join(path.split(".")[:3]) for node in nodes if (path := module_path(node))))


def replay(partitioner: Partitioner, plan: Plan) -> Answer:
    """Build the groups of a saved plan without a search.

    Raises PlanMismatch where a group is none of this graph: a plan file may say anything.
    """
    position = {node.name: at for at, node in enumerate(partitioner.region.nodes)}
    chosen: list[Chosen] = []
    for k, planned in enumerate(plan.groups):
        done = position[plan.groups[k - 1].last] + 1 if k else 0
        chosen.append(_rebuilt(partitioner, planned, position, done))
    return Answer(tuple(chosen), plan.floor_bytes, plan.allowed_bytes, plan.joined)


def _rebuilt(partitioner: Partitioner, planned: PlannedGroup, position: dict[str, int], done: int) -> Chosen:
    """The group, which begins at ``done`` or later."""
    start, stop, nest = _checked(partitioner, planned, position, done)
    chunk = planned.axes[-1].chunk
    group = slotted(partitioner, partitioner.builder.build(start, stop, nest, chunk), planned.slots)
    candidate = Candidate(start, stop, nest, planned.peak_bytes, (), size=planned.axes[-1].size)
    peak = partitioner.peak_bytes(start, group)
    candidate.learn(chunk, peak, 0)
    return Chosen(group, Choice(candidate, chunk, planned.trips), peak, planned.whole_bytes, planned.extra_s)


def _checked(
    partitioner: Partitioner, planned: PlannedGroup, position: dict[str, int], done: int
) -> tuple[int, int, Nest]:
    """Where a planned group begins and ends, and its nest."""
    region = partitioner.region
    place = f"the group from {planned.first} to {planned.last}"
    start, stop = position.get(planned.first, -1), position.get(planned.last, -1) + 1
    _require(done <= start < stop, "no run of operators behind the group before", place)
    nest: Nest = tuple(_atom(partitioner, axis, start, stop, position, place) for axis in planned.axes)
    sizes = [axis.size for axis in planned.axes]
    _require(bool(nest) and len(set(nest)) == len(nest), "its axes are none, or one occurs twice", place)
    _require(sizes == [region.sizes[atom] for atom in nest], "its axes have other sizes", place)
    _require(all(axis.chunk == 1 for axis in planned.axes[:-1]), "outer axes advance one row at a time", place)
    looped = roles(region, start, stop, nest)
    _require(looped is not None, "its axes cannot be sliced here", place)
    carried = {atom for p, role in (looped or {}).items() if role for atom in region.carries[p]}
    _require(set(nest) <= carried, "nothing in it has its axes", place)
    _require(isinstance(node_spec(region.nodes[stop - 1]), TensorSpec), "it ends in front of a result", place)
    return start, stop, nest


def _atom(
    partitioner: Partitioner, axis: PlannedAxis, start: int, stop: int, position: dict[str, int], place: str
) -> int:
    at = position.get(axis.node, -1)
    _require(start <= at < stop, f"{axis.node!r} is no operator of it", place)
    dims = partitioner.axes[partitioner.region.nodes[at]].axes
    _require(0 <= axis.dim < len(dims) and 0 <= axis.part < len(dims[axis.dim]), f"{axis.node!r} lacks its axis", place)
    return dims[axis.dim][axis.part]


def _require(holds: bool, fact: str, place: str) -> None:
    if not holds:
        raise PlanMismatch(
            f"the saved plan does not fit: {fact}", place=place, next_step="make it again, or leave it out"
        )
