"""What must hold of a random module, however it is compiled: eager's values, no more bytes than projected."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

import fmecompile
from fmecompile.analysis.facts import FactTable
from fmecompile.capture.export import capture
from fmecompile.capture.shell import Shell
from fmecompile.errors import BudgetInfeasible, OptionError
from fmecompile.graph.plan import Plan, PlannedAxis, PlannedGroup
from fmecompile.partition.nests import Nest, roles
from fmecompile.partition.partition import Partitioner
from fmecompile.pipeline import Compilation, normalise
from fmecompile.runtime.dispatch import find, plain_forward
from fmecompile.runtime.measure import StorageMeter
from tests.soak.graphs import Written


class Wrong(AssertionError):
    """A compiled module does what eager does not."""


@dataclass(frozen=True)
class Outcome:
    """How a module was run: ``loops`` of its program, or why it was refused."""

    loops: int = 0
    refused: str = ""


def compare(found: Any, wanted: Any, tolerance: float) -> None:
    """Structure, shapes, dtypes and values."""
    (left, tree), (right, expected) = tree_flatten(found), tree_flatten(wanted)
    if tree != expected:
        raise Wrong(f"returned {tree}, not {expected}")
    for k, (one, other) in enumerate(zip(left, right, strict=True)):
        if not isinstance(other, torch.Tensor):
            if one != other:
                raise Wrong(f"output {k} is {one!r}, not {other!r}")
            continue
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise Wrong(f"output {k} is {one.shape} {one.dtype}, not {other.shape} {other.dtype}")
        _compare_values(k, one, other, tolerance)


def _compare_values(k: int, one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    if not one.is_floating_point():
        if not torch.equal(one, other):
            raise Wrong(f"output {k} differs in {int((one != other).sum())} of {one.numel()} elements")
        return
    scale = max(other.abs().max().item() if other.numel() else 0.0, 1e-3)
    error = ((one - other).abs().max().item() if one.numel() else 0.0) / scale
    if not error <= tolerance:
        raise Wrong(f"output {k} is off by {error:.2e}")


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Collects the texts of warnings."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        yield texts
    texts += [str(item.message) for item in caught]


def run_and_compare(written: Written, module: nn.Module, options: dict[str, Any]) -> Outcome:
    """Optimize, call twice on different data, compare, measure, and restore."""
    try:
        fmecompile.optimize(module, **options)
        return _called(written, module)
    except BudgetInfeasible as error:
        return Outcome(refused=str(error))
    finally:
        fmecompile.restore(module)


def _called(written: Written, module: nn.Module) -> Outcome:
    with quiet() as texts:
        for seed in (0, 1, 1):
            arguments = written.arguments(seed)
            theirs = written.arguments(seed)
            written_module = written.module()
            wanted = written_module(*theirs)
            with StorageMeter([arguments, list(module.parameters())]) as meter:
                found = module(*arguments)
            compare(found, wanted, written.tolerance)
            _overwrite(found, wanted, [*theirs, *written_module.parameters()])
            if any(not torch.equal(a, b) for a, b in zip(arguments, theirs, strict=True)):
                raise Wrong("the inputs are not what eager leaves")
    dispatcher = find(module)
    assert dispatcher is not None
    if not dispatcher.records:
        return Outcome(refused=next(map(str, dispatcher.refused.values()), "eager: " + "; ".join(texts)))
    plan = next(reversed(dispatcher.records.values())).plan
    if meter.peak_bytes > plan.projected_peak_bytes:
        raise Wrong(f"{meter.peak_bytes} bytes were held, {plan.projected_peak_bytes} projected")
    return Outcome(loops=len(plan.groups))


def _overwrite(found: Any, wanted: Any, given: list[torch.Tensor]) -> None:
    """Write to each output that eager returns in a storage of its own: nothing else may change by that."""
    known = {tensor.untyped_storage()._cdata for tensor in given}
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if isinstance(other, torch.Tensor) and other.untyped_storage()._cdata not in known:
            with suppress(RuntimeError):  # of an expanded one
                other.zero_()
                one.fill_(7)


# ------------------------------------------------------------------------------------------------------------ any loops


def forced(rng: Random, written: Written, module: nn.Module, plan: Plan) -> Plan:
    """The same plan with other groups: any runs of operators over any nests that the axes allow."""
    with torch.no_grad():
        compilation = Compilation(capture(Shell(module, plain_forward(module)), written.arguments(), {}))
        normalise(compilation)
        partitioner = Partitioner(compilation.program, FactTable())
    groups, at = [], 0
    while at < len(partitioner.region.nodes):
        group = _random_group(rng, partitioner, at)
        if group is None:
            at += 1
            continue
        groups.append(group[0])
        at = group[1] + rng.choice((0, 0, 1))
    return replace(
        plan, groups=tuple(groups), recomputed=(), spilled=(), joined=plan.joined if rng.random() < 0.3 else ()
    )


def _random_group(rng: Random, partitioner: Partitioner, start: int) -> tuple[PlannedGroup, int] | None:
    region = partitioner.region
    carried = sorted(atom for atom in region.carries[start] if region.sizes[atom])
    if not carried or rng.random() < 0.3:
        return None
    nest: Nest = tuple(rng.sample(carried, rng.choice([k for k in (1, 1, 2) if k <= len(carried)])))
    stops = [stop for stop in range(start + 1, len(region.nodes) + 1) if _is_valid(partitioner, start, stop, nest)]
    if not stops:
        return None
    stop = rng.choice(stops[-3:] if rng.random() < 0.6 else stops)
    size = region.sizes[nest[-1]]
    chunk = rng.randint(1, max(size, 1))
    axes = tuple(_axis(partitioner, start, stop, atom, chunk if atom == nest[-1] else 1) for atom in nest)
    slots = rng.choice((1, 1, 2, 3))
    nodes = region.nodes
    return PlannedGroup(nodes[start].name, nodes[stop - 1].name, axes, (), (), 0, 0, 0, 0.0, 0.0, "drawn", slots), stop


def _axis(partitioner: Partitioner, start: int, stop: int, atom: int, chunk: int) -> PlannedAxis:
    for node in partitioner.region.nodes[start:stop]:
        for dim, axis in enumerate(partitioner.axes[node].axes):
            if atom in axis and atom in partitioner.axes[node].carries:
                return PlannedAxis(node.name, dim, axis.index(atom), partitioner.region.sizes[atom], chunk)
    raise AssertionError("an atom of the nest occurs in the group")


def _is_valid(partitioner: Partitioner, start: int, stop: int, nest: Nest) -> bool:
    region = partitioner.region
    looped = roles(region, start, stop, nest)
    if looped is None:
        return False
    met = {atom for p in range(start, stop) if looped[p] for atom in region.carries[p]}
    ends_whole = all(
        not isinstance(n.meta["fmecompile_spec"], tuple) or hasattr(n.meta["fmecompile_spec"], "shape")
        for n in region.nodes[start:stop]
    )
    return ends_whole and set(nest) <= met


# ---------------------------------------------------------------------------------------------------------- all options


def check(rng: Random, written: Written) -> list[Outcome]:
    """Default plan, a drawn budget, drawn loops, and options at random."""
    module = written.module()
    kernels = rng.choice(("auto", "auto", "reference", "off"))
    with mock.patch.dict("os.environ", {"FMECOMPILE_KERNELS": kernels}):
        fmecompile.optimize(module, max_chunks=rng.choice((None, None, 2, 7)))
        outcome = _called(written, module)
        dispatcher = find(module)
        assert dispatcher is not None
        plans = [record.plan for record in dispatcher.records.values()]
        fmecompile.restore(module)
        outcomes = [outcome]
        if not plans:
            return outcomes
        outcomes.append(run_and_compare(written, module, _budgeted(rng, plans[0])))
        if kernels != "reference":
            plan = Plan.from_json(forced(rng, written, module, plans[0]).to_json())
            outcomes.append(run_and_compare(written, module, {"plan": plan}))
        if rng.random() < 0.3:
            outcomes.append(reused(rng, written, module))
    return outcomes


def reused(rng: Random, written: Written, module: nn.Module) -> Outcome:
    """Steps that reuse, of which every one is called with the same: so all return what eager does."""
    mode = rng.choice(("feature", "feature", "residual", "forecast"))
    options: dict[str, Any] = {"cut": "auto", "mode": mode, "store": rng.choice((None, None, "host"))}
    policy = rng.choice((fmecompile.DeepCache(interval=2, **options), fmecompile.StepRehash(full_steps=2, **options)))
    try:
        fmecompile.optimize(module, reuse=policy, max_chunks=rng.choice((None, 2)))
        with quiet(), fmecompile.generation(steps=4):
            for _ in range(4):
                theirs, twin = written.arguments(), written.module()
                wanted, found = twin(*theirs), module(*written.arguments())
                compare(found, wanted, max(written.tolerance, 1e-9))
                _overwrite(found, wanted, [*theirs, *twin.parameters()])
        return Outcome()
    except (OptionError, BudgetInfeasible) as error:
        return Outcome(refused=str(error))
    finally:
        fmecompile.restore(module)


def _budgeted(rng: Random, plan: Plan) -> dict[str, Any]:
    """A budget from below the floor to more than enough."""
    most = max(plan.timeline, default=0) + plan.projected_peak_bytes
    activations = int(plan.floor_bytes + (most - plan.floor_bytes) * rng.random() * rng.choice((0.1, 1)))
    if rng.random() < 0.3:
        activations = int(plan.floor_bytes * rng.uniform(0.3, 1))
    budget = plan.weight_bytes + plan.input_bytes + max(activations, 1)
    return {
        "memory_budget": budget,
        "spill": rng.choice((None, True, False)),
        "max_chunks": rng.choice((None, None, 3)),
    }
