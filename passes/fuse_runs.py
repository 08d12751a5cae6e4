"""fuse-runs: put one call of a compiled kernel where a run of operators was, in loop bodies and between loops.

    before  a = slice(y, 2, 0, 320);  g = gelu(slice(y, 2, 320, 640));  h = mul(a, g)
    after   fused_0 = fused_0(y);  h = fused_0[0]

Runs of equal structure share a kernel, whichever graph they are in, so that neither chunks nor depth add kernels. Only
those that spare most are compiled, and none that would hold more than was projected: a call holds all its operands to
its end, where operators would have let go of some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.memory import Projection
from fmecompile.analysis.runs import Run, runs
from fmecompile.analysis.storages import storages, tensor_operands
from fmecompile.graph import edit
from fmecompile.graph.group import Group
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, specs_in, tensor_spec
from fmecompile.graph.structure import structure
from fmecompile.runtime.chunk_loop import ChunkLoop
from fmecompile.runtime.fused import FusedRun

MAX_KERNELS = 6
"""Kernels of one program: what compiling takes is bounded, however many kinds of runs there are."""

Fuse = Callable[[fx.GraphModule, int], FusedRun | None]
"""``fuse(operators, room_bytes)`` makes one call of a run that allocates so much at most, or None."""


@dataclass(frozen=True)
class FuseRuns:
    """Calls ``fuse`` for the runs that spare most, ``min_bytes`` of writing or more in one call of the program, and
    puts what it returns into ``program``, its loop bodies and ``loops``. ``peak_bytes`` may be held at most."""

    fuse: Fuse
    peak_bytes: int
    min_bytes: int

    def apply(
        self,
        program: Program,
        groups: Mapping[str, Group],
        loops: dict[str, nn.Module],
        projection: Projection,
        facts: FactTable,
    ) -> str:
        kinds: dict[Any, _Kind] = {}
        places = [_around(program, loops, projection, self.peak_bytes, facts)]
        places += _bodies(groups, loops, projection, self.peak_bytes, facts)
        for place in places:
            for run in runs(place.graph, facts):
                graph = edit.isolated(run.inside, run.operands, run.results, run.placed)
                kinds.setdefault(structure(graph), _Kind(graph)).add(place, run)
        worth = [kind for kind in kinds.values() if kind.saved_bytes >= self.min_bytes]
        worth.sort(key=lambda kind: -kind.saved_bytes)
        fused = [kind for k, kind in enumerate(worth[:MAX_KERNELS]) if kind.put(self.fuse, f"fused_{k}")]
        for place in places:
            place.finish()
        calls = sum(len(kind.uses) for kind in fused)
        spared = sum(kind.saved_bytes for kind in fused) / 2**20
        return f"{len(fused)} kernels at {calls} places spare {spared:.0f} MiB of {len(kinds)} kinds of runs"


@dataclass
class _Place:
    """A graph, what is live when each of its nodes starts and what that adds, what may be held, and how often it runs.
    ``modules`` takes its submodules."""

    graph: fx.Graph
    live: dict[fx.Node, int]
    own: dict[fx.Node, int]
    limit_bytes: int
    trips: int
    owner: fx.GraphModule | None
    modules: Callable[[str, nn.Module], None]
    facts: FactTable
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def room_bytes(self, run: Run) -> int:
        """What a call in the place of ``run`` may allocate."""
        between = edit.between(run.core[0], run.core[-1])
        others = sum(self.own[node] for node in between if node not in run.core)
        return self.limit_bytes - self.live[run.core[0]] - others

    def may_lay_out(self, run: Run, specs: Sequence[TensorSpec]) -> bool:
        """Whether ``run`` may return values with ``specs`` instead of what it was planned with: where every reader does
        the same with either, and holds no more. Loops and kernels count on the strides they were made for."""
        return all(self._is_read_alike(node, spec) for node, spec in zip(run.results, specs, strict=True))

    def _is_read_alike(self, node: fx.Node, spec: TensorSpec) -> bool:
        return tensor_spec(node) == spec or all(self._does_the_same(user, node, spec) for user in node.users)

    def _does_the_same(self, user: fx.Node, node: fx.Node, spec: TensorSpec) -> bool:
        """Whether ``user`` may read ``node`` with ``spec``: a call that makes the same of it, or a view of it whose
        readers do."""
        if user.op != "call_function":
            return False
        operands = list(tensor_operands(user))
        now = self.facts(user.target, specs_in(user.args), specs_in(user.kwargs))  # type: ignore[arg-type]
        then = self.facts(user.target, *(_specs_with(given, node, spec) for given in (user.args, user.kwargs)))  # type: ignore[arg-type]
        if then.alias != now.alias or then.hidden_bytes > now.hidden_bytes:
            return False
        if then.result == now.result:
            return True
        is_view = isinstance(then.result, TensorSpec) and now.alias == (operands.index(node),)
        return is_view and self._is_read_alike(user, then.result)

    def put(self, name: str, module: FusedRun, run: Run, specs: Sequence[Any]) -> None:
        self.modules(name, module)
        operands = [self.moved.get(operand, operand) for operand in run.operands]
        stands = edit.outline(name, run.core, operands, run.results, specs)
        self.moved |= stands
        for value in stands.values():
            self._annotate_readers(value)

    def _annotate_readers(self, value: fx.Node) -> None:
        for user in value.users:
            known = node_spec(user)
            if user.op == "call_function":
                edit.annotate([user], self.facts)
            if node_spec(user) != known:
                self._annotate_readers(user)

    def finish(self) -> None:
        edit.drop_dead(self.graph)
        if self.owner is not None:
            self.owner.recompile()


@dataclass
class _Kind:
    """All runs of one structure."""

    graph: fx.Graph
    uses: list[tuple[_Place, Run]] = field(default_factory=list)
    saved_bytes: int = 0

    def add(self, place: _Place, run: Run) -> None:
        self.uses.append((place, run))
        self.saved_bytes += run.saved_bytes * place.trips

    def put(self, fuse: Fuse, name: str) -> bool:
        """Put a kernel at every place; False where there is none."""
        room = min(place.room_bytes(run) for place, run in self.uses)
        operators = fx.GraphModule(nn.Module(), self.graph, class_name="Run")
        module = fuse(operators, room)
        if module is None:
            return False
        specs = [node_spec(node) for node in self.graph.output_node().args[0]]  # type: ignore[union-attr]
        specs = [s._replace(stride=tuple(stride)) for s, (_, stride, _) in zip(specs, module.results, strict=True)]
        self.uses = [(place, run) for place, run in self.uses if place.may_lay_out(run, specs)]
        for place, run in self.uses:
            place.put(name, module, run, specs)
        return bool(self.uses)


def _specs_with(given: Any, node: fx.Node, spec: TensorSpec) -> Any:
    """Operands in specs, with ``spec`` for ``node``."""
    return fx.map_arg(given, lambda operand: spec if operand is node else node_spec(operand))


def _around(
    program: Program, loops: dict[str, nn.Module], projection: Projection, peak_bytes: int, facts: FactTable
) -> _Place:
    live = {moment.node: moment.live_bytes for moment in projection.moments}
    own = {moment.node: moment.own_bytes for moment in projection.moments}
    return _Place(program.graph, live, own, peak_bytes, 1, None, loops.__setitem__, facts)


def _bodies(
    groups: Mapping[str, Group],
    loops: Mapping[str, nn.Module],
    projection: Projection,
    peak_bytes: int,
    facts: FactTable,
) -> Iterator[_Place]:
    """Every body once; a body that several loops share may hold what the fullest of them leaves."""
    moments = {str(moment.node.target): moment for moment in projection.moments if moment.node.op == "call_module"}
    limits: dict[fx.GraphModule, int] = {}
    trips: Counter[fx.GraphModule] = Counter()
    for name, group in groups.items():
        loop = loops[name]
        assert isinstance(loop, ChunkLoop)
        limit = group.body_bytes + peak_bytes - moments[name].total_bytes
        for kind, body in enumerate(loop.bodies):
            assert isinstance(body, fx.GraphModule)
            limits[body] = min(limits.get(body, limit), limit)
            trips[body] += loop.trips_of(kind)
    for body, limit in limits.items():
        nodes = compute_nodes(body.graph)
        held = storages(nodes, body.graph.output_node().args[0], facts)  # type: ignore[arg-type]
        live = dict(zip(nodes, held.live_bytes(), strict=False))
        own = {node: a + b for node, a, b in zip(nodes, held.nbytes, held.hidden, strict=True)}
        yield _Place(body.graph, live, own, limit, trips[body], body, body.add_module, facts)
