"""The door ``calibrate``: run a sampler, and compare what its steps compute."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fmecompile.backends.eager import EagerCompiler
from fmecompile.backends.recording import Asked, Found, Recording, RecordingCompiler
from fmecompile.backends.reusing import ReusingCompiler
from fmecompile.capture.families import SCALAR_INPUTS, is_denoiser, is_pipeline, parts
from fmecompile.errors import OptionError, TargetError
from fmecompile.reuse.calibration import OUTPUT, Calibration, CalibrationKey, Cut, CutRecord, Trace, identity, mean
from fmecompile.reuse.options import whole
from fmecompile.reuse.policy import Policy
from fmecompile.reuse.smooth_cache import SmoothCache
from fmecompile.reuse.step_rehash import StepRehash
from fmecompile.reuse.tea_cache import TeaCache
from fmecompile.runtime.dispatch import Dispatcher, find, plain_forward
from fmecompile.runtime.recording import Book, Traced

LIMIT_BYTES = 2**30
"""Host memory for the values of one branch of a generation."""

Inputs = Mapping[str, Any] | Callable[[], Any]


def calibrate(
    target: object,
    inputs: Inputs | Sequence[Inputs],
    *,
    policies: Iterable[Policy | type[Policy]] = (),
    cuts: Iterable[Cut] = (),
    limit_bytes: int = LIMIT_BYTES,
) -> Calibration:
    """Run ``target`` on ``inputs`` and record how far its values move from step to step.

    ``target`` is a diffusion pipeline with one denoiser, or the denoiser itself. ``inputs`` are the keyword
    arguments of a call of the pipeline; latents are asked for, as decoding would be wasted. For a denoiser, and for a
    pipeline that is called in some other way, they are a function that runs one generation. Of a list of those, with
    other prompts and seeds, the mean is taken; all have the same number of steps, shape and dtype.

    ``policies`` are those that will be made of the calibration, as classes or with options, and ``cuts`` names of
    values (reuse/policy.py) or patterns of module paths; without both, what ``StepRehash`` reuses is recorded.

    While it runs, the denoiser computes every step in full, and returns what it computes. Its recorded values lie
    on the device until the end of their step, once. On the host, the values of all steps are compared exactly where
    they fit ``limit_bytes`` (for each branch of guidance); otherwise cosines are of sketches (runtime/series.py), with
    a standard error of ``record.similarity_error`` of their distance from 1.

    Afterwards ``target`` is as it was: plain, or optimized with its options and what was compiled.

    Raises:
        TargetError: ``target`` is no module and no pipeline with one denoiser.
        OptionError: a cut is not there, an option is not understood, the denoiser was not called or for one step only,
            or generations differ in steps, shape or branches; values are not finite.
        CaptureError: the denoiser cannot be captured.
        BudgetInfeasible: it is optimized with a budget, and what is recorded does not fit beside it.
    """
    whole("limit_bytes", limit_bytes, 1)
    module, runs = _denoiser(target), list(_runs(target, inputs))
    book = Book(limit_bytes)
    compiler = RecordingCompiler(_eager(module), _asked(policies, cuts), book)
    with _recorded(module, compiler), torch.no_grad():
        for run in runs:
            run()
            for recorder in compiler.recorders:
                recorder.finish()
            compiler.timeline.end()
    return _calibration(target, module, compiler)


def _denoiser(target: object) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    if not is_pipeline(target):
        raise TargetError(
            f"calibrate takes a diffusion pipeline or a denoiser, not {type(target).__name__}",
            next_step="pass the pipeline",
        )
    found = {path: module for path, module in parts(target).items() if is_denoiser(path)}
    if len(found) != 1:
        raise TargetError(
            f"this {type(target).__name__} has {len(found)} denoisers ({', '.join(found) or 'none'})",
            next_step="calibrate one module: fmecompile.calibrate(pipe.transformer, lambda: pipe(...))",
        )
    return next(iter(found.values()))


def _runs(target: object, inputs: Any) -> Iterator[Callable[[], Any]]:
    """One generation each."""
    several = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    for one in several:
        if isinstance(one, Mapping) and is_pipeline(target):
            yield _call(target, one)
        elif callable(one):
            yield one
        else:
            raise OptionError(
                f"inputs has a {type(one).__name__}, which cannot be run",
                next_step="give the arguments of a pipeline's call as a dict, or a function that runs one generation",
            )
    if not several:
        raise OptionError("inputs are empty", next_step="give the arguments of at least one generation")


def _call(pipeline: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    takes_output = "output_type" in inspect.signature(type(pipeline).__call__).parameters
    arguments = ({"output_type": "latent"} if takes_output else {}) | dict(inputs)
    return lambda: pipeline(**arguments)


def _asked(policies: Any, cuts: Any) -> tuple[Asked, ...]:
    """Each once: first the cuts, then what policies need."""
    if isinstance(cuts, str):
        raise OptionError(f"cuts={cuts!r} is one name", next_step=f"give a list: cuts=[{cuts!r}]")
    listed = [policies] if isinstance(policies, (Policy, type)) else list(policies)
    named = [Asked(tuple(cut) if isinstance(cut, list) else cut) for cut in cuts]
    asked = [*named, *(one for policy in listed for one in _asked_by(policy))]
    return tuple(dict.fromkeys(asked or _asked_by(StepRehash)))


def _asked_by(policy: Any) -> Iterator[Asked]:
    """What a policy with options reuses; of a class, what it does by default."""
    if isinstance(policy, type) and issubclass(policy, SmoothCache):
        yield from (Asked(name, is_optional=True) for name in SmoothCache.COMPONENTS)
    elif policy is TeaCache or isinstance(policy, TeaCache):
        yield Asked(policy.indicator)
    elif isinstance(policy, Policy):
        mode = "residual" if policy.mode == "residual" else "feature"
        yield from (Asked(cut, mode) for cut in policy.cuts.values())
    elif isinstance(policy, type) and issubclass(policy, Policy):
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(policy)}
        yield Asked(defaults["cut"], "residual" if defaults["mode"] == "residual" else "feature")
    else:
        raise OptionError(
            f"{policy!r} is no policy", next_step="give policies=[fmecompile.StepRehash], or one with options"
        )


def _eager(module: nn.Module) -> EagerCompiler:
    """With the budget and the wishes that the module is optimized with, if it is; saved plans are of another graph."""
    before = find(module)
    compiler = None if before is None else before.compiler
    if isinstance(compiler, ReusingCompiler):
        compiler = compiler.eager
    return dataclasses.replace(compiler, saved=()) if isinstance(compiler, EagerCompiler) else EagerCompiler()


@contextmanager
def _recorded(module: nn.Module, compiler: RecordingCompiler) -> Iterator[None]:
    """The module runs through ``compiler`` in here. Afterwards it is as it was."""
    before = find(module)
    dispatcher = Dispatcher(
        module, plain_forward(module), compiler, strict=True, scalars=SCALAR_INPUTS, situation=compiler.situation
    )
    dispatcher.patch()
    try:
        yield
    finally:
        if before is None:
            dispatcher.unpatch()
        else:
            before.patch()
        dispatcher.forget()


def _calibration(target: Any, module: nn.Module, compiler: RecordingCompiler) -> Calibration:
    recording = _the_recording(module, compiler)
    generations = [_whole_branches(generation) for generation in compiler.book.generations]
    steps = {len(branches[0][OUTPUT].moved) for branches in generations}
    if len(steps) > 1 or max(steps) < 2:
        raise OptionError(
            f"generations of {', '.join(map(str, sorted(steps)))} steps were recorded",
            next_step="give runs of equally many steps, at least 2; if a run has more, declare it: "
            "`with fmecompile.generation(steps=25):` around its sampling loop",
        )
    if len({len(branches) for branches in generations}) > 1:
        raise OptionError("generations with and without guidance were recorded", next_step="calibrate one kind alone")
    sampler = getattr(target, "scheduler", None)
    key = CalibrationKey(
        *identity(module),
        "" if sampler is None else type(sampler).__name__,
        steps.pop(),
        recording.shape,
        str(recording.dtype).removeprefix("torch."),
    )
    records = [_record(found, generations, compiler.book) for found in recording.found]
    return Calibration(key, (*records, _output(generations, compiler.book)))


def _the_recording(module: nn.Module, compiler: RecordingCompiler) -> Recording:
    found = compiler.recordings
    if not found:
        raise OptionError(
            f"the {type(module).__name__} was not called", next_step="give a function that runs it at every step"
        )
    if len(found) > 1:
        shapes = ", ".join(f"{tuple(r.shape)} {r.dtype}" for r in found)
        raise OptionError(
            f"the {type(module).__name__} was called with inputs of {len(found)} kinds ({shapes})",
            next_step="calibrate one size, dtype and kind of guidance at a time",
        )
    return found[0]


def _whole_branches(branches: Sequence[Traced]) -> list[Traced]:
    """Those that were called at every step; guidance of an interval is left out."""
    count = max(len(branch[OUTPUT].moved) for branch in branches)
    return [branch for branch in branches if len(branch[OUTPUT].moved) == count]


def _record(found: Found, generations: Sequence[Sequence[Traced]], book: Book) -> CutRecord:
    names = [cut.name for cut in found.cuts]
    return CutRecord(
        cut=found.asked.cut,
        mode=found.asked.mode,
        modules=tuple(value.module for value in found.values),
        nbytes=sum({value.value: value.nbytes for value in found.values}.values()),
        saved=found.saved,
        sketch_entries=_sketched(names, book),
        branches=_means(names, generations),
    )


def _output(generations: Sequence[Sequence[Traced]], book: Book) -> CutRecord:
    return CutRecord(OUTPUT, "feature", (), 0, 0.0, _sketched([OUTPUT], book), _means([OUTPUT], generations))


def _sketched(names: Sequence[str], book: Book) -> int:
    """The entries of the smallest sketch, 0 where there is none."""
    return min((entries for name in names if (entries := book.sketch_entries[name])), default=0)


def _means(names: Sequence[str], generations: Sequence[Sequence[Traced]]) -> tuple[Trace, ...]:
    """By branch, the mean over generations and values."""
    by_branch = zip(*generations, strict=True)
    return tuple(mean([branch[name] for branch in branches for name in names]) for branches in by_branch)
