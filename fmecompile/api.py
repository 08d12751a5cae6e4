"""The doors: optimize, restore, is_optimized, plan, explain, stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.backends.eager import eager_compiler
from fmecompile.capture.example import Example, eager_measurement
from fmecompile.capture.families import SCALAR_INPUTS
from fmecompile.errors import OptionError, TargetError
from fmecompile.explain import Explanation
from fmecompile.graph.plan import Plan
from fmecompile.graph.printing import readable
from fmecompile.pipeline import Compilation, Observe, compile_module, finish
from fmecompile.runtime.dispatch import Dispatcher
from fmecompile.runtime.exclusion import EXCLUSION

Target = TypeVar("Target", bound=nn.Module)


def optimize(
    target: Target,
    *,
    memory_budget: object = None,
    reuse: object = None,
    backend: str = "eager",
    strict: bool = False,
    plan: Plan | None = None,
) -> Target:
    """Make ``target`` run in a fraction of its activation memory, with the same output. In place; returns ``target``.

    Returns at once: the first call of each input signature captures and plans. ``strict`` turns every fall-back to
    eager into an error. ``plan`` is a saved plan; where it matches, the search is skipped. Optimizing again replaces
    the options and drops what was compiled.

    For inference: a module in training mode, or one that is called where gradients are needed, runs eagerly with one
    warning (GradientError when ``strict``).

    Raises:
        TargetError: ``target`` is not an ``nn.Module``.
        OptionError: an option has a value that is not supported.
    """
    _require_module(target, "optimize")
    _refuse(
        memory_budget is not None, "memory_budget", memory_budget, "leave it out: the default plan is near the floor"
    )
    _refuse(reuse is not None, "reuse", reuse, "leave it out: without reuse the output is the same")
    _refuse(backend != "eager", "backend", backend, "use backend='eager'")
    if plan is not None and not isinstance(plan, Plan):
        raise OptionError(f"plan is a {type(plan).__name__}", next_step="pass fmecompile.Plan.load(path)")
    restore(target)
    compiler = eager_compiler(() if plan is None else (plan,), _progress)
    dispatcher = Dispatcher(target, target.forward, compiler, strict=strict, scalars=SCALAR_INPUTS)
    dispatcher.patch()
    return target


def restore(target: Target) -> Target:
    """Put ``target`` back exactly as it was and drop what was compiled. Does nothing to what was never optimized."""
    _require_module(target, "restore")
    dispatcher = _find(target)
    if dispatcher is not None:
        dispatcher.unpatch()
        dispatcher.forget()
    return target


def is_optimized(target: object) -> bool:
    """Whether ``target`` runs through fmecompile."""
    return isinstance(target, nn.Module) and _find(target) is not None


def plan(target: nn.Module, *args: Any, memory_budget: object = None, **kwargs: Any) -> Plan:
    """The plan for one call of ``target``, without side effects and without data: weights and inputs may be fake.

    Raises:
        TargetError: ``target`` is not an ``nn.Module``.
        CaptureError: it cannot be captured for these arguments.
    """
    _require_module(target, "plan")
    _refuse(memory_budget is not None, "memory_budget", memory_budget, "leave it out")
    example = Example.of(args, kwargs)
    with _as_it_was(target):
        made = _compile(target, example)
        eager = eager_measurement(target, example)
    return replace(made, eager_peak_bytes=eager.peak_bytes, eager_timeline=thinned(eager.timeline))


def _compile(target: nn.Module, example: Example, observe: Observe | None = None) -> Plan:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = example.materialise(mode)
    with EXCLUSION.capture(), mode:
        return compile_module(target, args, kwargs, observe=observe)[1]


def thinned(timeline: tuple[int, ...], points: int = 2000) -> tuple[int, ...]:
    """A timeline of at most ``points`` samples that keeps every local peak's height: the maximum of each stretch."""
    step = -(-len(timeline) // points) if timeline else 1
    return tuple(max(timeline[i : i + step]) for i in range(0, len(timeline), step))


def explain(target: nn.Module) -> Explanation:
    """What was done to an optimized module and why, and what was refused and why. Print it.

    Raises TargetError when ``target`` is not optimized.
    """
    dispatcher = _dispatcher(target, "explain")
    refused = tuple(str(error) for error in dispatcher.refused.values())
    return Explanation(type(target).__name__, tuple(dispatcher.records.values()), refused)


class Stage(NamedTuple):
    """A graph after one pass: the pass's name, readable code, the projected peak, and the module that runs it.

    Unpacks as ``name, code, projected_peak_bytes, program``.
    """

    name: str
    code: str
    projected_peak_bytes: int
    program: fx.GraphModule


def stages(target: nn.Module) -> list[Stage]:
    """Every stage of the latest compiled signature of an optimized module, compiled again on fake tensors.

    Raises TargetError when ``target`` is not optimized or was never called.
    """
    dispatcher = _dispatcher(target, "stages")
    if not dispatcher.records:
        raise TargetError(f"this {type(target).__name__} was not called yet", next_step="call it once, then ask again")
    found: list[Stage] = []

    def observe(name: str, compilation: Compilation) -> None:
        graph = fx.Graph()
        graph.output(graph.graph_copy(compilation.program.graph, {}))
        module = fx.GraphModule(finish(compilation).graph_module, graph, class_name=name.replace("-", "_"))
        found.append(Stage(name, readable(module), compilation.project().peak_bytes, module))

    with _as_it_was(target):
        _compile(target, next(reversed(dispatcher.records.values())).example, observe)
    return found


def _dispatcher(target: object, door: str) -> Dispatcher:
    _require_module(target, door)
    assert isinstance(target, nn.Module)
    dispatcher = _find(target)
    if dispatcher is None:
        raise TargetError(
            f"this {type(target).__name__} is not optimized", next_step="call fmecompile.optimize(module) first"
        )
    return dispatcher


def _find(target: nn.Module) -> Dispatcher | None:
    """The dispatcher that stands in for ``target.forward``; the module itself is the only register there is."""
    forward = vars(target).get("forward")
    return forward if isinstance(forward, Dispatcher) else None


@contextmanager
def _as_it_was(target: nn.Module) -> Iterator[None]:
    """The module without its dispatcher, for the time of a capture."""
    dispatcher = _find(target)
    if dispatcher is None:
        yield
        return
    dispatcher.unpatch()
    try:
        yield
    finally:
        dispatcher.patch()


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A line on a terminal that follows the stages; silent elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(f"fmecompile: capturing {name} (once per input signature)") as status:
        yield lambda stage: status.update(f"fmecompile: {name}: {stage} done")


def _require_module(target: object, door: str) -> None:
    if isinstance(target, nn.Module):
        return
    if hasattr(target, "unet") or hasattr(target, "transformer"):
        raise TargetError(
            f"{door} takes a module; {type(target).__name__} is a diffusion pipeline",
            next_step=f"call fmecompile.{door}(pipe.unet)",
        )
    raise TargetError(f"{door} takes an nn.Module, not {type(target).__name__}", next_step="pass the model itself")


def _refuse(condition: bool, option: str, value: object, next_step: str) -> None:
    if condition:
        raise OptionError(f"{option}={value!r} is not supported", next_step=next_step)
