"""Compile a denoiser so that every step computes everything, and what could be reused is handed to a calibration."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fmecompile.analysis.cuts import Cuts, CutValue
from fmecompile.analysis.mixing import CLIP_DIMS
from fmecompile.analysis.probes import Probes
from fmecompile.backends.budgeted import within_budget
from fmecompile.backends.eager import EagerCompiler
from fmecompile.backends.reusing import conditioning, place_of_timestep, split
from fmecompile.capture.example import Example
from fmecompile.capture.export import capture
from fmecompile.capture.shell import Shell
from fmecompile.errors import OptionError
from fmecompile.graph.plan import Plan
from fmecompile.graph.program import compute_nodes
from fmecompile.operators.contraction import all_products
from fmecompile.partition.tradeoffs import Limits
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.pipeline import Compilation, Observe, Record, lower_within, normalise
from fmecompile.reuse.calibration import Cut as CutName
from fmecompile.reuse.calibration import Mode
from fmecompile.runtime.executable import Compiled, Executable
from fmecompile.runtime.generation import Timeline
from fmecompile.runtime.recording import Book, Recorder

COMPONENT = "recorded"


@dataclass(frozen=True)
class Asked:
    """A cut to record, its values or its residuals, or a probe. ``is_optional``: left out where there is none."""

    cut: CutName
    mode: Mode = "feature"
    is_optional: bool = False


@dataclass(frozen=True)
class Found:
    """What was found of a cut: its values, as which they are kept, and the share of all work a step saves that takes
    them."""

    asked: Asked
    values: tuple[CutValue, ...]
    cuts: tuple[Cut, ...]
    saved: float


@dataclass(frozen=True)
class Recording:
    """One signature that was recorded: its cuts, and the shape and dtype of the clip."""

    found: tuple[Found, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class RecordingCompiler:
    """The compiler callback of a dispatcher whose module is recorded. ``recordings`` and ``recorders`` are what it
    made, one each for a signature. Raises OptionError where a cut is not there."""

    eager: EagerCompiler
    asked: tuple[Asked, ...]
    book: Book
    timeline: Timeline
    recordings: list[Recording] = field(default_factory=list)
    recorders: list[Recorder] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Recorder, Record]:
        with self.eager.observed(module) as (observe, notes):
            shell = Shell(module, forward)
            compilation = Compilation(capture(shell, args, kwargs), fuse=self.eager.fuse)
            normalise(compilation, observe)
            timestep = place_of_timestep(forward, args, kwargs)
            places = conditioning(compilation.program, timestep)
            per_step = replace(compilation, program=compilation.program.copy(), notes=[])
            split(per_step, places)
            found = _found(self.asked, per_step)
            keep = StepReuse(tuple(dict.fromkeys(cut for one in found for cut in one.cuts)))
            compilation.done("step-reuse", keep.apply(compilation.program, compilation.facts), observe)
            example = Example.of(args, kwargs)
            executable, plan = self._lowered(shell, example, compilation, observe)
        recorder = Recorder(executable, self.book, self.timeline, timestep, places)
        self.recordings.append(Recording(found, *_clip(tree_leaves((args, kwargs)))))
        self.recorders.append(recorder)
        return recorder, Record(plan, example, tuple(notes))

    def _lowered(
        self, shell: Shell, example: Example, compilation: Compilation, observe: Observe
    ) -> tuple[Executable, Plan]:
        def make(limits: Limits) -> tuple[Compiled, Plan]:
            return lower_within(compilation, self.eager.saved, limits, observe)

        inputs = example.materialise(FakeTensorMode(allow_non_fake_inputs=True))
        compiled, plan, _ = within_budget(shell, inputs, self.eager.budget, self.eager.wishes, make)
        return Executable(compiled, shell.module), plan

    def situation(self) -> Hashable:
        """What a program depends on apart from the call and the module."""
        return self.eager.situation()


def _found(asked: Iterable[Asked], compilation: Compilation) -> tuple[Found, ...]:
    """What is there of what was asked for, in a program without what all steps share, as policies find it; a value that
    several cuts have is kept once."""
    cuts = Cuts(compilation.program)
    known: dict[tuple[str, str | None], Cut] = {}
    found = []
    for one in asked:
        values = tuple(_named(one, cuts))
        kept = []
        for value in values:
            cut = Cut(f"{value.module or value.value}:{len(known)}", value.value, COMPONENT, value.source)
            kept.append(known.setdefault((cut.value, cut.source), cut))
        if values:
            unique = tuple(dict.fromkeys(kept))
            saved = 0.0 if one.mode == "probe" else _saved(unique, cuts.work, compilation)
            found.append(Found(one, values, unique, saved))
    if not found:
        raise OptionError("this model has none of what is to be recorded", next_step='record cuts=["auto"]')
    return tuple(found)


def _named(asked: Asked, cuts: Cuts) -> list[CutValue]:
    if asked.mode == "probe":
        names = [asked.cut] if isinstance(asked.cut, str) else asked.cut
        return [value for name in names for value in Probes(cuts).named(name)]
    try:
        return cuts.named(asked.cut, asked.mode, or_unreached=True)  # beside others they would dilute the means
    except OptionError:
        if asked.is_optional:
            return []
        raise


def _saved(cuts: tuple[Cut, ...], work: int, compilation: Compilation) -> float:
    program = compilation.program.copy()
    StepReuse(cuts, frozenset({COMPONENT})).apply(program, compilation.facts)
    return 1 - sum(map(all_products, compute_nodes(program.graph))) / max(work, 1)


def _clip(leaves: Iterable[Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the first input with the dimensions of a clip, or of the first tensor."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    clip = next((tensor for tensor in tensors if tensor.ndim == CLIP_DIMS), tensors[0])
    return tuple(clip.shape), clip.dtype
