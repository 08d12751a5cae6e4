"""A program that computes every step and hands on the values it would keep: the run-time half of a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fmecompile.reuse.calibration import OUTPUT, Trace
from fmecompile.runtime.executable import Executable
from fmecompile.runtime.generation import Branch, Generation, Timeline
from fmecompile.runtime.series import Series

ASSUMED_STEPS = 50
"""Where a sampler does not tell its number of steps, this many share the memory for what is kept."""

Traced = Mapping[str, Trace]
"""The trace of each value, by name."""


@dataclass(eq=False)
class Book:
    """What the recorders of one calibration write down. ``limit_bytes`` of host memory are for the values of one
    branch of a generation. ``generations`` holds, for each that ended, the traces of each branch."""

    limit_bytes: int
    generations: list[list[Traced]] = field(default_factory=list)
    sketch_entries: dict[str, int] = field(default_factory=dict)

    def write(self, branches: list[dict[str, Series]]) -> None:
        """A generation has ended."""
        traced: list[Traced] = [{name: series.trace() for name, series in branch.items()} for branch in branches]
        for branch in branches:
            for name, series in branch.items():
                self.sketch_entries[name] = series.sketch_entries
        self.generations.append(traced)


class Recorder:
    """Callable like an :class:`Executable`. ``names`` are the values that ``program`` keeps; the timestep and the
    conditioning are at leaves ``timestep`` and ``places``, as in a :class:`fmecompile.runtime.reusing.Reusing`."""

    def __init__(
        self, program: Executable, book: Book, timeline: Timeline, timestep: int | None, places: Sequence[int]
    ) -> None:
        self._program, self._book, self._timeline = program, book, timeline
        self._timestep, self._places = timestep, tuple(places)
        self._generation: Generation | None = None
        self._branches: dict[Branch, dict[str, Series]] = {}

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run the step that these leaves are of, and write down what it kept and what it returned."""
        generation = self._timeline.at(None if self._timestep is None else leaves[self._timestep])
        if generation is not self._generation:
            self.finish()
            self._generation = generation
        branch = generation.branch(self, [leaves[i] for i in self._places])
        result, values = self._program.run(leaves)
        values[OUTPUT] = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)).clone()
        if branch not in self._branches:
            limit = self._book.limit_bytes // ((generation.count or ASSUMED_STEPS) * len(values))
            self._branches[branch] = {name: Series(name, limit) for name in values}
        for name, value in values.items():
            self._branches[branch][name].add(branch.step, value)
        return result

    def finish(self) -> None:
        """The generation under way has ended."""
        if self._branches:
            self._book.write(list(self._branches.values()))
        self._branches, self._generation = {}, None
