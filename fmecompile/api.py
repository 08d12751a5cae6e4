"""The doors: optimize, restore, is_optimized, plan, explain, stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.backends.budgeted import Budget, Wishes, compile_budgeted
from fmecompile.backends.eager import EagerCompiler
from fmecompile.backends.inductor import fuse_by
from fmecompile.backends.reusing import ReusingCompiler
from fmecompile.capture.example import Example, eager_measurement
from fmecompile.capture.families import COMPONENTS, DECODER, SCALAR_INPUTS, is_denoiser, is_pipeline, parts
from fmecompile.capture.shell import Shell
from fmecompile.errors import OptionError, TargetError
from fmecompile.explain import Explanation, PipelineExplanation, with_eager
from fmecompile.graph.plan import Plan
from fmecompile.reuse.every_step import EveryStep
from fmecompile.reuse.policy import Policy
from fmecompile.runtime.autocast import autocast_state, set_aside
from fmecompile.runtime.dispatch import Dispatcher, find, plain_forward
from fmecompile.runtime.exclusion import EXCLUSION
from fmecompile.runtime.generation import Timeline
from fmecompile.runtime.graphed import Graphs
from fmecompile.runtime.measure import Measurement
from fmecompile.runtime.whole_clip import WholeClip, can_decode_whole, find_whole_clip
from fmecompile.stages import Stage, StageRecorder

Target = TypeVar("Target")


def optimize(
    target: Target,
    *,
    memory_budget: object = None,
    reuse: object = None,
    backend: str = "eager",
    strict: bool = False,
    plan: Plan | None = None,
    spill: bool | None = None,
    max_chunks: int | None = None,
    cuda_graphs: bool | None = None,
) -> Target:
    """Make ``target`` run in a fraction of its activation memory, with the same output. In place; returns ``target``.

    ``target`` is a module, or a diffusion pipeline of diffusers: then its denoiser, its ControlNets and its VAE. A VAE
    is compiled in its decoder and encoder, by whichever method they are called; a pipeline then decodes whole clips,
    whatever its ``decode_chunk_size``.

    ``memory_budget`` bounds what is on the device while it runs: ``"8GiB"``, bytes, or a fraction of the device as a
    float. Weights, inputs and activations count, and of a pipeline every other component that is on the device at that
    moment. The plan is the fastest that meets it; by default, one near the floor.

    ``reuse`` is a policy (``fmecompile.StepRehash(full_steps=13)`` and others): at some steps the denoiser takes values
    from an earlier step, which is faster and not lossless. What is kept counts in the budget; with ``store`` the policy
    keeps it in a smaller dtype, or in host memory. Without a policy, a pipeline still computes once what is the same at
    every step of a generation, which is lossless.

    ``spill`` says whether values may wait in host memory where no other plan meets the budget: by default where the
    device has a memory of its own. ``max_chunks`` bounds the chunk trips of every group.

    ``backend`` says how operators run: ``"eager"`` one by one, ``"inductor"`` with what stands between library calls
    fused into compiled kernels, where a C++ compiler is at hand.

    ``cuda_graphs=True`` records each program at its second call and replays it from then on, which spares the host most
    of its work; what is returned is still the caller's own. It costs a copy of inputs and outputs, which the budget
    counts. With one warning it goes without: on another device, where recording fails, and where shapes change, or
    weights are moved, too often. Off by default.

    Returns at once: the first call of each input signature captures and plans. ``strict`` turns every fall-back to
    eager into an error. ``plan`` is a saved plan; where it matches, the search is skipped. Optimizing again replaces
    the options and drops what was compiled.

    For inference: a module in training mode, or one that is called where gradients are needed, runs eagerly with one
    warning (GradientError when ``strict``). So does one whose inner modules carry hooks, as group offload puts there.

    Raises:
        TargetError: ``target`` is no ``nn.Module`` and no pipeline that has a model to optimize.
        OptionError: an option has a value that is not supported.
        BudgetInfeasible: the weights alone exceed the budget. The first call raises it where the rest does.
    """
    found = _parts(target, "optimize")
    policy = _policy(reuse, found)
    fuse = fuse_by(backend, strict)
    if plan is not None and not isinstance(plan, Plan):
        raise OptionError(f"plan is a {type(plan).__name__}", next_step="pass fmecompile.Plan.load(path)")
    budget = None if memory_budget is None else Budget.of(memory_budget, target)
    if budget is not None:
        budget.require_weights(found)
    wishes = _wishes(spill, max_chunks, cuda_graphs)
    compiler = EagerCompiler(() if plan is None else (plan,), _progress, budget, wishes, fuse=fuse)
    graphed = {path: replace(compiler, graphs=Graphs()) if cuda_graphs else compiler for path in found}
    compilers = {path: _reusing(path, graphed[path], policy, target) for path in found}
    _install(target, [_dispatcher(module, compilers[path], strict) for path, module in found.items()])
    return target


def _policy(reuse: object, found: dict[str, nn.Module]) -> Policy | None:
    if reuse is not None and not isinstance(reuse, Policy):
        raise OptionError(
            f"reuse={reuse!r} is no policy", next_step="give one, as in reuse=fmecompile.StepRehash(full_steps=13)"
        )
    if reuse is not None and not any(is_denoiser(path) for path in found):
        raise OptionError("reuse needs a denoiser, and there is none to optimize", next_step="leave out reuse")
    return reuse


def _reusing(
    path: str, compiler: EagerCompiler, policy: Policy | None, target: object
) -> EagerCompiler | ReusingCompiler:
    """A pipeline's denoiser makes what is the same at every step only once; another module's caller may call it with
    anything."""
    has_sampler = is_pipeline(target)
    if not is_denoiser(path) or (policy is None and not has_sampler):
        return compiler
    return ReusingCompiler(compiler, policy or EveryStep(), Timeline(target if has_sampler else None))


def _wishes(spill: bool | None, max_chunks: int | None = None, cuda_graphs: bool | None = None) -> Wishes:
    for name, value in {"spill": spill, "cuda_graphs": cuda_graphs}.items():
        if value is not None and not isinstance(value, bool):
            raise OptionError(f"{name}={value!r} is neither True nor False", next_step="leave it out")
    wishes = Wishes(spill, is_graphed=bool(cuda_graphs))
    if max_chunks is None:
        return wishes
    if not isinstance(max_chunks, int) or isinstance(max_chunks, bool) or max_chunks < 1:
        raise OptionError(
            f"max_chunks={max_chunks!r} is no number of chunks", next_step="give a whole number from 1 on"
        )
    return replace(wishes, max_trips=max_chunks)


def _dispatcher(module: nn.Module, compiler: EagerCompiler | ReusingCompiler, strict: bool) -> Dispatcher:
    eager = plain_forward(module)
    return Dispatcher(module, eager, compiler, strict=strict, scalars=SCALAR_INPUTS, situation=compiler.situation)


def _install(target: object, fresh: list[Dispatcher]) -> None:
    """Patch all or nothing; then drop what earlier dispatchers had compiled."""
    earlier = [find(dispatcher.module) for dispatcher in fresh]
    with ExitStack() as undo:
        for dispatcher, before in zip(fresh, earlier, strict=True):
            undo.callback(dispatcher.unpatch if before is None else before.patch)
            dispatcher.patch()
        clip = _whole_clip(target)
        if clip is not None:
            clip.patch()
        undo.pop_all()
    for before in earlier:
        if before is not None:
            before.forget()


def _whole_clip(target: object) -> WholeClip | None:
    """A new stand-in for how a pipeline decodes; None where it has no optimized decoder, or has a stand-in."""
    if not is_pipeline(target) or DECODER not in parts(target):
        return None
    return WholeClip(target, DECODER) if find_whole_clip(target) is None and can_decode_whole(target) else None


def restore(target: Target) -> Target:
    """Put ``target`` back exactly as it was and drop what was compiled. Does nothing to what was never optimized."""
    for module in _parts(target, "restore").values():
        dispatcher = find(module)
        if dispatcher is not None:
            dispatcher.unpatch()
            dispatcher.forget()
    clip = find_whole_clip(target)
    if clip is not None:
        clip.unpatch()
    return target


def is_optimized(target: object) -> bool:
    """Whether ``target`` runs through fmecompile: of a pipeline, every part that ``optimize`` would take."""
    if not isinstance(target, nn.Module) and not is_pipeline(target):
        return False
    found = parts(target).values()
    return bool(found) and all(find(module) is not None for module in found)


def plan(target: nn.Module, *args: Any, memory_budget: object = None, spill: bool | None = None, **kwargs: Any) -> Plan:
    """The plan for one call of ``target``, without side effects and without data: weights and inputs may be fake.

    ``memory_budget`` bounds weights, inputs and activations together, and ``spill`` lets values wait in host memory, as
    for ``optimize``.

    Raises:
        TargetError: ``target`` is not an ``nn.Module``.
        CaptureError: it cannot be captured for these arguments.
        OptionError: the budget is no amount, or a fraction of a device that does not tell its memory.
        BudgetInfeasible: no plan meets the budget.
    """
    module = _module(target, "plan")
    budget = None if memory_budget is None else Budget.of(memory_budget)
    example = Example.of(args, kwargs)
    shell = Shell(module, plain_forward(module))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_args, fake_kwargs = example.materialise(mode)
    with EXCLUSION.capture(), set_aside(autocast_state()), mode:
        made = compile_budgeted(shell, fake_args, fake_kwargs, budget, wishes=_wishes(spill))[1]
    with EXCLUSION.capture():
        eager = eager_measurement(shell, example)
    return with_eager(made, eager)


def explain(target: object) -> Explanation | PipelineExplanation:
    """What was done to an optimized module or pipeline and why, and what was refused and why. Print it.

    Raises TargetError when nothing of ``target`` is optimized.
    """
    found = {path: find(module) for path, module in _parts(target, "explain").items()}
    if not any(found.values()):
        raise _not_optimized(target)
    told = {path: None if d is None else _explanation(d) for path, d in found.items()}
    only = told.get("")
    return only if only is not None else PipelineExplanation(type(target).__name__, told, _decoding(target))


def _explanation(dispatcher: Dispatcher) -> Explanation:
    refused = tuple(str(error) for error in dispatcher.refused.values())
    shell = Shell(dispatcher.module, dispatcher.eager)

    def eager(example: Example) -> Measurement:
        with EXCLUSION.capture():
            return eager_measurement(shell, example)

    return Explanation(type(dispatcher.module).__name__, tuple(dispatcher.records.values()), refused, eager)


def _decoding(target: object) -> str:
    clip = find_whole_clip(target)
    if clip is None:
        return ""
    if clip.refused is not None:
        return f"decode_chunk_size frames at a time, because {clip.refused}"
    unused = f"; decode_chunk_size={clip.overridden} is not used" if clip.overridden is not None else ""
    return f"the whole clip in one call of the decoder{unused}"


def stages(target: nn.Module) -> list[Stage]:
    """Every stage of the signature that was called last of an optimized module, compiled again on fake tensors, with
    the options and the plan that it has. Under a policy of reuse, of a step that computes everything.

    Raises TargetError when ``target`` is not optimized or was never called.
    """
    module = _module(target, "stages")
    dispatcher = find(module)
    if dispatcher is None:
        raise _not_optimized(target)
    if not dispatcher.records:
        raise TargetError(f"this {type(target).__name__} was not called yet", next_step="call it once, then ask again")
    compiler, record = dispatcher.compiler, next(reversed(dispatcher.records.values()))
    assert isinstance(compiler, (EagerCompiler, ReusingCompiler))
    recorder = StageRecorder(type(module).__name__)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = record.example.materialise(mode)
    with EXCLUSION.capture(), mode:
        compiler.watched(recorder, record)(module, dispatcher.eager, args, kwargs)
    return recorder.stages


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A line on a terminal that follows the stages; silent elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(f"fmecompile: capturing {name} (once per input signature)") as status:
        yield lambda stage: status.update(f"fmecompile: {name}: {stage} done")


def _parts(target: object, door: str) -> dict[str, nn.Module]:
    """The parts of a module or pipeline, at least one."""
    if not isinstance(target, nn.Module) and not is_pipeline(target):
        raise TargetError(
            f"{door} takes an nn.Module or a diffusion pipeline, not {type(target).__name__}",
            next_step="pass the model itself",
        )
    found = parts(target)
    for path, module in found.items():
        if hasattr(module, "_orig_mod"):
            raise TargetError(
                f"{path or 'the target'} was given to torch.compile",
                next_step=f"{door} the module itself, or use torch.compile(module, backend='fmecompile') alone",
            )
    if not found:
        raise TargetError(
            f"this {type(target).__name__} has nothing to {door}: none of {', '.join(COMPONENTS)} is a module",
            next_step="load the pipeline with its models, or pass the model itself",
        )
    return found


def _module(target: object, door: str) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    if is_pipeline(target):
        path = next(iter(parts(target)), COMPONENTS[0])
        raise TargetError(
            f"{door} takes one module; {type(target).__name__} is a diffusion pipeline",
            next_step=f"call fmecompile.{door}(pipe.{path})",
        )
    raise TargetError(f"{door} takes an nn.Module, not {type(target).__name__}", next_step="pass the model itself")


def _not_optimized(target: object) -> TargetError:
    return TargetError(
        f"this {type(target).__name__} is not optimized", next_step="call fmecompile.optimize(module) first"
    )
