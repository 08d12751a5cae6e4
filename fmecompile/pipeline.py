"""The compiler from end to end: the passes, in order, on one screen.

A normalising pass is a frozen dataclass whose fields are its options, with one ``apply(program, facts) -> str`` that
says what it did. Valid graph in, valid graph out: after any stage the program runs, prints, and states its projected
peak. One hook between stages (``observe``) does printing, checking and recording.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._logging._internal import trace_structured

from fmecompile import config
from fmecompile.analysis.cost import whole_s
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.memory import Projection, project
from fmecompile.analysis.transfers import transfer, work
from fmecompile.analysis.verify import measured_peak_bytes
from fmecompile.budget import Allowance
from fmecompile.capture.example import Example
from fmecompile.capture.export import capture
from fmecompile.config import min_fused_bytes
from fmecompile.errors import BudgetInfeasible
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import check
from fmecompile.graph.outline import EMPTY, Outline
from fmecompile.graph.plan import SMALLER, Owner, Plan, PlanKey
from fmecompile.graph.printing import Annotated, readable
from fmecompile.graph.program import Coefficient, Constant, Input, Kept, Literal, Program, Weight, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.graph.structure import structure
from fmecompile.partition.decide import describe, durations, replay
from fmecompile.partition.search import Eager
from fmecompile.partition.tradeoffs import Limits, Prepared, prepare, replayed
from fmecompile.passes.accept_strides import AcceptStrides
from fmecompile.passes.chunk_loops import ChunkLoops
from fmecompile.passes.drop_noops import DropNoops
from fmecompile.passes.eliminate_common import EliminateCommon
from fmecompile.passes.fold_constants import FoldConstants
from fmecompile.passes.fuse_norm import FuseNorm
from fmecompile.passes.fuse_runs import Fuse, FuseRuns
from fmecompile.passes.kernels import Kernels
from fmecompile.passes.late_expand import LateExpand
from fmecompile.passes.one_key import OneKey
from fmecompile.passes.own_outputs import OwnOutputs, Returned, returned
from fmecompile.passes.pipeline_chunks import STREAM_BYTES, PipelineChunks
from fmecompile.passes.reader_layout import ReaderLayout
from fmecompile.passes.relax_views import RelaxViews
from fmecompile.passes.relax_writes import RelaxWrites
from fmecompile.passes.sink_producers import SinkProducers
from fmecompile.passes.spatial_layout import SpatialLayout
from fmecompile.passes.two_pass_norm import TwoPassNorm
from fmecompile.passes.write_through import WriteThrough
from fmecompile.runtime.executable import Compiled, Slot

PASSES = (
    DropNoops(),
    RelaxViews(),
    RelaxWrites(),
    OneKey(),
    LateExpand(),
    FoldConstants(),
    EliminateCommon(),
    DropNoops(),
    SinkProducers(),
    AcceptStrides(),
    TwoPassNorm(),
    # then: step-reuse (where it is asked for), own-outputs (told what was captured), KERNEL_PASSES, partition (the
    # search), pipeline-chunks, reader-layout and write-through (the bodies of its loops), chunk-loops (the rewrite by
    # its plan), fuse-norm, fuse-runs (a backend's kernels)
)

KERNEL_PASSES = {
    "auto": (Kernels(), SpatialLayout()),
    "off": (),
    "reference": (Kernels(everywhere=True), SpatialLayout()),
}
"""By where kernels are used."""

_LOGGER = logging.getLogger(__name__)  # TORCH_LOGS=fmecompile shows it, "+fmecompile" with the code of each stage
NO_LIMITS = Limits()
MAX_REPAIRS = 3
"""How often a plan that holds more on fake tensors than it said is made again under a lower limit."""


@dataclass
class Compilation:
    """One program on its way through the stages. ``notes`` holds what each stage said it did, ``weight_bytes`` what the
    module reads of its weights, which are there though a rewrite may not read all of them, ``before`` the captured
    graph, ``captured`` where its outputs lay, ``eager_s`` how long it takes, projected. ``fuse`` makes kernels of runs
    of operators, where a backend has any."""

    program: Program
    facts: FactTable = field(default_factory=FactTable)
    groups: dict[str, Group] = field(default_factory=dict)
    loops: dict[str, nn.Module] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    weight_bytes: int | None = None
    fuse: Fuse | None = None
    before: Outline = EMPTY
    captured: tuple[Returned | None, ...] = ()
    eager_s: float = 0.0

    def project(self) -> Projection:
        return project(self.program, self.groups, self.facts)

    def done(self, name: str, note: str, observe: Observe | None) -> None:
        """A stage is done, and says what it did."""
        self.notes.append((name, note))
        _LOGGER.info("%s: %s", name, note)
        if _LOGGER.isEnabledFor(logging.DEBUG):
            _LOGGER.debug("%s: the graph\n%s", name, readable(finish(self).graph_module))
        if observe is not None:
            observe(name, self)


Observe = Callable[[str, Compilation], None]


@dataclass(frozen=True)
class Record:
    """One compiled signature of a module: its plan, the call it was made for, what every stage said, what its
    budget was made of, if it had one, what is reused between steps, if anything is, and what replays its programs.
    """

    plan: Plan
    example: Example
    notes: tuple[tuple[str, str], ...]
    allowance: Allowance | None = None
    reuse: object = None
    graphs: object = None


def compile_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    saved: Sequence[Plan] = (),
    limits: Limits = NO_LIMITS,
    observe: Observe | None = None,
    fuse: Fuse | None = None,
) -> tuple[Compiled, Plan]:
    """Capture, normalise, partition and rewrite one call of ``module``. A matching plan in ``saved`` spares the search.

    Raises:
        CaptureError: the module cannot be captured; whatever cannot be sliced afterwards is only a barrier.
        BudgetInfeasible: every plan holds more than ``limits`` allow.
    """
    compilation = Compilation(capture(module, args, kwargs), fuse=fuse)
    normalise(compilation, observe)
    return lower_within(compilation, saved, limits, observe)


def normalise(compilation: Compilation, observe: Observe | None = None) -> None:
    """Run the passes that need no plan."""
    program, facts = compilation.program, compilation.facts
    edit.annotate(compute_nodes(program.graph), facts)
    compilation.weight_bytes = _bound_bytes(program, Weight)
    compilation.before = Outline.of(program.graph, {})
    compilation.done("capture", f"{len(compute_nodes(program.graph))} operators", observe)
    compilation.captured = returned(program, facts)
    compilation.eager_s = whole_s(program, facts)
    _run(PASSES, compilation, observe)


def _run(passes: Sequence[Any], compilation: Compilation, observe: Observe | None) -> None:
    program, facts = compilation.program, compilation.facts
    for item in passes:
        note = item.apply(program, facts)
        edit.annotate(compute_nodes(program.graph), facts)
        compilation.done(pass_name(item), note, observe)


def lower_within(
    compilation: Compilation,
    saved: Sequence[Plan] = (),
    limits: Limits = NO_LIMITS,
    observe: Observe | None = None,
) -> tuple[Compiled, Plan]:
    """Everything after :func:`normalise`, again under a lower limit where the check on fake tensors finds that the
    result holds more than it said. The program of ``compilation`` stays as it is.
    """
    if limits.is_graphed:
        return _lower_graphed(compilation, saved, limits, observe)
    allowed = limits.activation_bytes
    limit, least = allowed, 0
    for _ in range(MAX_REPAIRS):
        trial = replace(compilation, program=compilation.program.copy(), notes=list(compilation.notes))
        try:
            compiled, plan = lower(trial, saved, replace(limits, activation_bytes=limit), observe)
        except BudgetInfeasible as error:
            if least == 0:
                raise
            raise BudgetInfeasible(least, allowed or 0) from error
        if limit is None or allowed is None:
            return compiled, plan
        if plan.projected_peak_bytes <= allowed:
            return compiled, replace(plan, allowed_bytes=allowed)
        least = plan.projected_peak_bytes
        if any(other.key == plan.key for other in saved):
            saved = ()  # one that holds more than it says: search
        else:
            limit -= 2 * (least - allowed)  # the check on fake tensors found more: ask for less
    assert allowed is not None
    raise BudgetInfeasible(least, allowed)


def _lower_graphed(
    compilation: Compilation, saved: Sequence[Plan], limits: Limits, observe: Observe | None
) -> tuple[Compiled, Plan]:
    """The same beside the buffers of CUDA graphs."""
    program, allowed = compilation.program, limits.activation_bytes
    given = sum(_bound_bytes(program, kind) for kind in (Input, Kept, Coefficient))
    returned = [spec for value in program.outputs if isinstance(value, fx.Node) and (spec := node_spec(value))]
    held = given + 2 * sum(s.numel * s.dtype.itemsize for s in returned if isinstance(s, TensorSpec))
    room = None if allowed is None else allowed - held
    try:
        compiled, plan = lower_within(
            compilation, saved, replace(limits, activation_bytes=room, is_graphed=False), observe
        )
    except BudgetInfeasible as error:
        raise BudgetInfeasible(error.floor_bytes + held, error.allowed_bytes + held) from error
    return compiled, plan.beside(held)


def compile_program(
    compilation: Compilation,
    saved: Sequence[Plan] = (),
    limits: Limits = NO_LIMITS,
    observe: Observe | None = None,
) -> tuple[Compiled, Plan]:
    """Everything after capture."""
    normalise(compilation, observe)
    return lower(compilation, saved, limits, observe)


def lower(
    compilation: Compilation,
    saved: Sequence[Plan] = (),
    limits: Limits = NO_LIMITS,
    observe: Observe | None = None,
) -> tuple[Compiled, Plan]:
    """Partition a normalised program and rewrite it; it is changed."""
    _run((OwnOutputs(compilation.captured), *KERNEL_PASSES[config.kernels()]), compilation, observe)
    program, facts = compilation.program, compilation.facts
    limit_bytes = limits.activation_bytes
    key = _key(program)
    usable = [p for p in saved if p.key == key and _meets(p, limits)]
    if usable:
        prepared = replayed(program, facts, usable[0], may_write_over=compilation.fuse is None)
        answer = replay(prepared.partitioner, usable[0])
    else:
        prepared = prepare(program, facts, limits, may_write_over=compilation.fuse is None)
        answer = prepared.partitioner.search(limit_bytes, Eager(compilation.eager_s, compilation.weight_bytes or 0))
        room = answer.allowed_bytes - (STREAM_BYTES if limit_bytes is not None else 0)
        answer = PipelineChunks(room).apply(prepared.partitioner, answer)
    compilation.program, partitioner = prepared.program, prepared.partitioner
    program = compilation.program
    compilation.groups = {f"chunk_loop_{k}": group for k, group in enumerate(answer.groups)}
    planned = describe(partitioner, answer)
    trips = f"{len(answer.groups)} groups, {sum(g.trips for g in planned)} chunk trips"
    compilation.done("partition", trips + _tradeoffs(prepared), observe)
    compilation.done("pipeline-chunks", f"{sum(g.slots > 1 for g in planned)} groups pipelined", observe)
    computed = work(program)
    groups, laid_out = ReaderLayout(answer.groups).apply(facts)
    groups, written = WriteThrough(groups).apply(program, facts)
    compilation.loops = dict(ChunkLoops(groups).apply(program))
    compilation.done("chunk-loops", f"{len(compilation.loops)} loops, {laid_out}, {written}", observe)
    compilation.done("fuse-norm", FuseNorm(answer.joined).apply(program, facts), observe)
    check(program)
    projection, after = compilation.project(), Outline.of(program.graph, compilation.groups)
    projected = max(projection.peak_bytes, measured_peak_bytes(program, compilation.loops))
    plan = Plan(
        key=key,
        groups=planned,
        projected_peak_bytes=projected,
        allowed_bytes=max(answer.allowed_bytes, projected),
        floor_bytes=min(answer.floor_bytes, projected),
        eager_peak_bytes=0,
        weight_bytes=_bound_bytes(program, Weight) if compilation.weight_bytes is None else compilation.weight_bytes,
        input_bytes=_bound_bytes(program, Input),
        owners=_listed(projection.owners),
        timeline=tuple(m.total_bytes for m in projection.moments),
        eager_timeline=(),
        barriers=partitioner.barriers(),
        recomputed=prepared.recomputed,
        spilled=prepared.spilled,
        joined=answer.joined,
        whole_s=partitioner.region.whole_s,
        eager_s=compilation.eager_s,
        transfer=transfer(program, answer.groups, computed),
        durations_s=durations(partitioner, planned, after),
        before=compilation.before,
        after=after,
    )
    if compilation.fuse is not None:
        fuse_runs = FuseRuns(compilation.fuse, projected, min_fused_bytes())
        note = fuse_runs.apply(program, compilation.groups, compilation.loops, projection, facts)
        compilation.done("fuse-runs", note, observe)
    compiled = finish(compilation)
    _LOGGER.info("%s", plan.summary())
    _trace("fmecompile_plan", "json", plan.to_json)
    _trace("fmecompile_graph", "string", lambda: readable(compiled.graph_module))
    return compiled, plan


def _listed(owners: Sequence[Owner], most: int = 24) -> tuple[Owner, ...]:
    """The largest one by one, the others together."""
    rest = sum(owner.nbytes for owner in owners[most:])
    others = (Owner(f"{len(owners) - most} smaller values", rest, SMALLER),) if rest else ()
    return (*owners[:most], *others)


def _trace(name: str, encoding: str, text: Callable[[], str]) -> None:
    """An artifact for tlparse, where TORCH_TRACE asks for them."""
    about = {"name": name, "encoding": encoding}
    trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text, expect_trace_id=False)


def _meets(plan: Plan, limits: Limits) -> bool:
    """Whether a saved plan keeps within limits."""
    fits = limits.activation_bytes is None or plan.projected_peak_bytes <= limits.activation_bytes
    return fits and (limits.may_spill or not plan.spilled) and all(g.trips <= limits.max_trips for g in plan.groups)


def _tradeoffs(prepared: Prepared) -> str:
    twice = f", {len(prepared.recomputed)} values made twice" if prepared.recomputed else ""
    return twice + (f", {len(prepared.spilled)} values wait in host memory" if prepared.spilled else "")


def finish(compilation: Compilation) -> Compiled:
    """The runnable program of the present stage."""
    program = compilation.program
    root = nn.Module()
    for name, loop in compilation.loops.items():
        root.add_module(name, loop)
    graph_module = Annotated(root, program.graph, class_name="Rewritten")
    slots = tuple(_slot(binding, program) for binding in program.bindings)
    return Compiled(
        graph_module, slots, program.constants, tuple(program.literals.values()), program.out_spec, program.keeps
    )


def pass_name(item: object) -> str:
    """``DropNoops`` -> ``drop-noops``."""
    name = type(item).__name__
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def _slot(binding: object, program: Program) -> Slot:
    if isinstance(binding, Weight):
        return ("weight", binding.name)
    if isinstance(binding, Input):
        return ("input", binding.leaf)
    if isinstance(binding, Constant):
        return ("constant", binding.index)
    if isinstance(binding, Kept):
        return ("kept", (binding.name, binding.order))
    if isinstance(binding, Coefficient):
        return ("coefficient", (binding.component, binding.order))
    assert isinstance(binding, Literal)
    return ("literal", list(program.literals).index(binding.name))


def _bound_bytes(program: Program, kind: type) -> int:
    bound = zip(program.placeholders, program.bindings, strict=True)
    specs = [node_spec(node) for node, binding in bound if isinstance(binding, kind)]
    return sum(spec.numel * spec.dtype.itemsize for spec in specs if isinstance(spec, TensorSpec))


def _key(program: Program) -> PlanKey:
    rows = [tuple(map(_named, row)) for row in structure(program.graph)]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    bound = zip(program.placeholders, program.bindings, strict=True)
    inputs = [node_spec(node) for node, binding in bound if isinstance(binding, Input)]
    signature = "; ".join(f"{spec.shape} {spec.dtype}" for spec in inputs)
    return PlanKey(digest, signature, torch.__version__, package_version())


def _named(value: Any) -> Any:
    """Functions by name: where they lie in memory differs from process to process."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, FunctionType) else value


def package_version() -> str:
    try:
        return version("fmecompile")
    except PackageNotFoundError:
        return "0+source"
