"""Where a compiled program leaves what eager computes, or holds more than was projected: the first pass, then the
first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf, isnan, nan
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmecompile.backends.eager import EagerCompiler, silent
from fmecompile.backends.reusing import ReusingCompiler
from fmecompile.errors import OptionError, TargetError
from fmecompile.graph.group import Group
from fmecompile.graph.invariants import module_path
from fmecompile.pipeline import Compilation, finish
from fmecompile.runtime.dispatch import Dispatcher, find, plain_forward
from fmecompile.runtime.executable import Compiled, Executable
from fmecompile.runtime.measure import StorageMeter
from fmecompile.runtime.signature import flatten_call

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative to the largest value of the output, by its dtype; 2e-2 for smaller ones."""
SLACK_BYTES = 4096
"""By so little a call may exceed its projection: literals that a call makes for itself."""
_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided}


@dataclass(frozen=True)
class StageCheck:
    """One stage, run on the real inputs. ``error`` is max|stage - eager| / max|eager|, bytes are peaks of activations,
    ``culprit`` is the first call that is wrong, ``overshoot`` the first that holds more than was projected for it."""

    name: str
    error: float
    measured_bytes: int
    projected_bytes: int
    culprit: str = ""
    overshoot: str = ""


@dataclass(frozen=True)
class Verdict:
    """All stages in order, and the first that is wrong in a value or in bytes, with the first call that is."""

    stages: tuple[StageCheck, ...]
    tolerance: float

    @property
    def wrong(self) -> StageCheck | None:
        """The first stage whose output leaves tolerance."""
        return next((stage for stage in self.stages if stage.error > self.tolerance), None)

    @property
    def over(self) -> StageCheck | None:
        """The first stage that holds more than was projected."""
        return next((stage for stage in self.stages if stage.overshoot), None)

    @property
    def is_clean(self) -> bool:
        return self.wrong is None and self.over is None

    def __str__(self) -> str:
        mib = 2**20
        lines = [
            f"{stage.name:<18} error {stage.error:.1e}  measured {stage.measured_bytes / mib:10.2f} MiB  "
            f"projected {stage.projected_bytes / mib:10.2f} MiB"
            for stage in self.stages
        ]
        if self.wrong is not None:
            lines.append(f"wrong from {self.wrong.name} on (tolerance {self.tolerance:.0e}): {self.wrong.culprit}")
        if self.over is not None:
            lines.append(f"more bytes than projected from {self.over.name} on: {self.over.overshoot}")
        return "\n".join([*lines, *(["every stage is right"] if self.is_clean else [])])


def bisect(target: nn.Module, *args: Any, tolerance: float | None = None, **kwargs: Any) -> Verdict:
    """Compile one call of ``target`` and run every stage on the real inputs, beside eager.

    ``target`` may be optimized or not, and stays as it is; an optimized one is compiled with its options, and by its
    plan where that is of the same call. ``tolerance`` is relative to the largest value of the output; by default 1e-9
    in float64, 1e-3 in float32, 2e-2 in smaller dtypes. Takes one eager call, and two of each stage.

    Raises:
        TargetError: ``target`` is no ``nn.Module``.
        OptionError: ``tolerance`` is no positive number.
        CaptureError: the module cannot be captured.
    """
    if not isinstance(target, nn.Module):
        raise TargetError(f"bisect takes an nn.Module, not {type(target).__name__}", next_step="pass the model itself")
    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"tolerance={tolerance!r} is no positive number", next_step="leave it out")
    dispatcher = find(target)
    forward = plain_forward(target) if dispatcher is None else dispatcher.eager
    with torch.no_grad():
        wanted = _tensors(forward(*args, **kwargs))
        allowed = tolerance or max((TOLERANCE.get(t.dtype, 2e-2) for t in wanted), default=1e-3)
        checker = _Checker(target, flatten_call(args, kwargs).leaves, wanted, allowed)
        _compiler(dispatcher, checker)(target, forward, args, kwargs)
    return Verdict(tuple(checker.found), allowed)


def _compiler(dispatcher: Dispatcher | None, checker: _Checker) -> EagerCompiler:
    """With the options and plans that the module is optimized with, if it is; reuse between steps is left out."""
    compiler = None if dispatcher is None else dispatcher.compiler
    if isinstance(compiler, ReusingCompiler):
        compiler = compiler.eager
    if dispatcher is None or not isinstance(compiler, EagerCompiler):
        return EagerCompiler(watcher=checker)
    plans = tuple(record.plan for record in dispatcher.records.values())
    return replace(compiler, saved=plans, progress=silent, graphs=None, watcher=checker)


class _Checker:
    """The observer between stages: runs each on the real inputs, and keeps the one before it to compare with. Where a
    compilation goes back and tries again, what came after that is forgotten."""

    def __init__(self, module: nn.Module, leaves: list[Any], wanted: list[torch.Tensor], tolerance: float) -> None:
        self._module, self._leaves, self._wanted, self._tolerance = module, leaves, wanted, tolerance
        self._before: list[Compiled] = []
        self.found: list[StageCheck] = []

    def __call__(self, name: str, compilation: Compilation) -> None:
        place = len(compilation.notes) - 1
        del self.found[place:], self._before[place:]
        projection = compilation.project()
        compiled = _snapshot(compilation)
        limits = {moment.node.name: moment.total_bytes for moment in projection.moments}
        meter = _Meter(limits, [*self._module.parameters(), *self._module.buffers(), *self._leaves])
        error = _error(self._run(compiled, meter), self._wanted)
        culprit = ""
        if error > self._tolerance and self._before:
            culprit = self._first_difference(self._before[-1], compiled, compilation.groups)
        self._before.append(compiled)
        self.found.append(StageCheck(name, error, meter.peak_bytes, projection.peak_bytes, culprit, meter.over))

    def _run(self, compiled: Compiled, watch: _Meter | _Recorder) -> list[torch.Tensor]:
        watched = replace(compiled, graph_module=_Watched(compiled.graph_module, watch))
        with watch.meter if isinstance(watch, _Meter) else nullcontext(), _NoStaleValues():
            return _tensors(Executable(watched, self._module)(self._leaves))

    def _first_difference(self, before: Compiled, after: Compiled, groups: Mapping[str, Group]) -> str:
        """The first value of ``after`` that the stage before computes otherwise; all values of that one are kept."""
        known = _Recorder(lambda node, value: None, keep=True)
        self._run(before, known)
        differing: list[str] = []

        def compare(node: fx.Node, value: Any) -> None:
            name, place = _counterpart(node, groups)
            earlier = known.values.get(name)
            if differing or earlier is None or not isinstance(value, torch.Tensor) or value.shape != earlier.shape:
                return
            if _error([value], [earlier]) > self._tolerance:
                differing.append(place)

        self._run(after, _Recorder(compare))
        return differing[0] if differing else "no value that both stages name"


def _snapshot(compilation: Compilation) -> Compiled:
    """The program of a stage, which later passes do not change."""
    compiled = finish(compilation)
    graph = fx.Graph()
    graph.output(graph.graph_copy(compilation.program.graph, {}))
    return replace(compiled, graph_module=fx.GraphModule(compiled.graph_module, graph))


def _counterpart(node: fx.Node, groups: Mapping[str, Group]) -> tuple[str, str]:
    """The name that a value has before loops were made, and where it is computed, for a person."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and str(source.target) in groups:
        group = groups[str(source.target)]
        result = group.results[int(str(node.args[1]))]
        return result.name, f"{source.target}, which makes {result.name} (in {module_path(result) or 'the module'})"
    return node.name, f"{node.name} = {node.target} (in {module_path(node) or 'the module'})"


class _Watched(nn.Module):
    """Runs a graph node by node, and shows each value."""

    def __init__(self, module: Any, watch: _Meter | _Recorder) -> None:
        super().__init__()
        self.inner, self._watch = module, watch

    def forward(self, *operands: Any) -> Any:
        return _Interpreter(self.inner, self._watch).run(*operands)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: Any, watch: _Meter | _Recorder) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        self._watch.before(n)
        value = super().run_node(n)
        self._watch.after(n, value)
        return value


class _NoStaleValues(TorchDispatchMode):
    """Fills what is allocated with NaN: a block that an earlier run freed may still hold right values, and would hide
    rows that nothing writes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS and (result.is_floating_point() or result.is_complex()):
            result.fill_(nan)
        return result


class _Meter:
    """Compares what is held while each node runs with ``limits``; ``over`` is the first that holds more."""

    def __init__(self, limits: Mapping[str, int], known: list[Any]) -> None:
        self.meter, self._limits = StorageMeter(known), limits
        self.peak_bytes, self.over = 0, ""

    def before(self, node: fx.Node) -> None:
        self.meter.reset_peak()

    def after(self, node: fx.Node, value: Any) -> None:
        held, limit = self.meter.peak_bytes, self._limits.get(node.name)
        self.peak_bytes = max(self.peak_bytes, held)
        if limit is not None and held > limit + SLACK_BYTES and not self.over:
            where = module_path(node) or "the module"
            self.over = f"{node.name} = {node.target} (in {where}) holds {held} bytes, {limit} projected"


class _Recorder:
    """Hands every value to ``show``, and keeps copies where asked to."""

    def __init__(self, show: Callable[[fx.Node, Any], None], *, keep: bool = False) -> None:
        self._show, self._keep = show, keep
        self.values: dict[str, torch.Tensor] = {}

    def before(self, node: fx.Node) -> None:
        pass

    def after(self, node: fx.Node, value: Any) -> None:
        self._show(node, value)
        if self._keep and isinstance(value, torch.Tensor) and node.op != "placeholder":
            self.values[node.name] = value.detach().clone()


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """max|found - wanted| / max|wanted|, the worst of all pairs; infinite where only one is finite."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        worst = max(worst, inf if isnan(difference) else difference / (other.double().abs().max().item() or 1.0))
    return worst
