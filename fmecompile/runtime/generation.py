"""Which step of which generation a call belongs to, and on which branch: told without waiting for the device.

A sampler calls the denoiser at a row of timesteps, with guidance perhaps twice at each. Calls at the same timestep
belong to one **step**. A timestep that is a view of the sampler's list is told by its place there, and the list tells
the number of steps; so is a copy of one, where the sampler is known. Another one is told by its value, where that can
be read without the device. A **generation** ends where the list is another one or is begun anew, where values turn
back, or where ``generation(steps=...)`` says so. The numbers in the list are read for those alone who ask for them.

Calls of one step are told apart by what they are called with: a **branch** is called with the same tensors at each
step, or where none are the same, in the same order. A branch that is left out at a step begins anew afterwards.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fmecompile.errors import OptionError
from fmecompile.reuse.steps import Steps

Anchor = tuple["weakref.ref[torch.UntypedStorage]", Any, int]

MAX_BRANCHES = 8
"""Branches kept of one generation; the one that was called longest ago goes first."""


@dataclass(eq=False)
class Declared:
    """A generation that was declared, and its number of steps."""

    steps: int | None


_DECLARED: ContextVar[Declared | None] = ContextVar("generation", default=None)


@contextmanager
def generation(steps: int | None = None) -> Iterator[None]:
    """Everything in here is one generation of ``steps`` calls of the denoiser (of each branch of guidance).

    Needed only where a sampler hands the denoiser timesteps of which fmecompile cannot tell which come together. What
    was kept for later steps is let go at the end.

    Raises OptionError when ``steps`` is no positive whole number.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise OptionError(f"steps={steps!r} is no number of steps", next_step="give how often the denoiser is called")
    declared = Declared(steps)
    token = _DECLARED.set(declared)
    try:
        yield
    finally:
        _DECLARED.reset(token)
        for timeline in list(_TIMELINES):
            timeline.end(declared)


@dataclass(eq=False)
class Branch:
    """One stream of calls in a generation. ``state`` is whatever a caller keeps with it."""

    anchors: tuple[Anchor, ...]
    step: int = -1
    state: Any = None
    made: Any = None

    def matches(self, leaves: Sequence[torch.Tensor]) -> int:
        """How many of ``leaves`` are the tensors this branch was called with before, unchanged."""
        return sum(known == anchor for known, anchor in zip(self.anchors, anchored(leaves), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for its later steps."""
        return sum(held.nbytes for held in (self.state, self.made) if held is not None)

    def remember(self, leaves: Sequence[torch.Tensor]) -> None:
        self.anchors = anchored(leaves)


def anchored(leaves: Sequence[torch.Tensor]) -> tuple[Anchor, ...]:
    """What tells whether tensors are the ones of before: where they lie, and how often that was changed in place (-1
    where torch does not count it). The same part of a storage is the same, though it was sliced out again."""
    return tuple(
        (
            weakref.ref(leaf.untyped_storage()),
            (leaf.storage_offset(), leaf.shape, leaf.stride()),
            -1 if leaf.is_inference() else leaf._version,
        )
        for leaf in leaves
    )


@dataclass(eq=False)
class Generation:
    """One run of a sampler. ``count`` is its number of steps, None where that is not known; ``is_told``: its steps come
    from the sampler's list or were declared, so that each call's is certain. ``first`` is the timestep of step 0, and
    ``timed`` what was read of the others, once that was asked for."""

    count: int | None
    is_told: bool = False
    first: _Mark | None = None
    timed: Steps | None = None
    step: int = 0
    branches: weakref.WeakKeyDictionary[object, list[Branch]] = field(default_factory=weakref.WeakKeyDictionary)

    def branch(self, program: object, leaves: Sequence[torch.Tensor]) -> Branch:
        """The branch of a call of ``program`` on the tensors ``leaves`` (those that do not change at every step)."""
        known = self.branches.setdefault(program, [])
        same = next((b for b in known if leaves and b.matches(leaves) == len(leaves)), None)
        waiting = [b for b in known if b.step < self.step]
        found = same or max(waiting, key=lambda b: b.matches(leaves), default=None)
        if found is None:
            found = Branch(anchored(leaves))
            known.append(found)
            del known[:-MAX_BRANCHES]
        found.remember(leaves)
        found.step = self.step
        return found

    def advance(self) -> None:
        """The next step begins. A branch that was left out at this one keeps nothing any longer: it would be stale."""
        for branch in self.every_branch():
            if branch.step < self.step:
                branch.state = None
        self.step += 1

    def every_branch(self) -> list[Branch]:
        return [branch for known in list(self.branches.values()) for branch in known]


@dataclass(frozen=True)
class _Mark:
    """A timestep as far as it can be told: its value; of one in a list, its place and the list's length."""

    item: torch.Tensor
    value: float | None
    storage: Any
    offset: int
    length: int
    is_listed: bool

    @classmethod
    def of(cls, timestep: torch.Tensor) -> _Mark:
        storage = timestep.untyped_storage()
        is_single = all(step == 0 or size == 1 for size, step in zip(timestep.shape, timestep.stride(), strict=True))
        readable = timestep.device.type == "cpu" and not isinstance(timestep, FakeTensor) and timestep.numel() > 0
        value = float(timestep.flatten()[0]) if readable else None
        length = storage.nbytes() // timestep.itemsize if is_single else 1
        is_item = timestep.dim() == 0 and timestep._base is not None and timestep._base.dim() == 1  # of a list of one
        return cls(timestep, value, storage, int(timestep.storage_offset()), length, length > 1 or is_item)

    def is_of(self, listed: torch.Tensor) -> bool:
        """It lies in ``listed``."""
        return self.is_listed and self.storage._cdata == listed.untyped_storage()._cdata

    def rest(self) -> tuple[float, ...] | None:
        """The numbers of its list from here on; waits for the device that they lie on. None where it has no list, and
        where that has no numbers, being fake."""
        if not self.is_listed or isinstance(self.item, FakeTensor):
            return None
        return tuple(self.item.as_strided((self.length - self.offset,), (1,), self.offset).tolist())

    def same_list(self, other: _Mark) -> bool:
        return self.is_listed and other.is_listed and self.storage._cdata == other.storage._cdata

    def same_step(self, other: _Mark) -> bool:
        if self.same_list(other):
            return self.offset == other.offset
        if self.value is not None or other.value is not None:
            return self.value == other.value
        return self.storage._cdata == other.storage._cdata and self.offset == other.offset


def _sampler_mark(pipeline: Any, mark: _Mark) -> _Mark | None:
    """The mark of the item of the sampler's list that ``mark`` is a copy of, as hooks make them that move inputs.

    Told by its value where that can be read, else by how many steps the sampler has made.
    """
    sampler = getattr(pipeline, "scheduler", None)
    listed, count = getattr(sampler, "timesteps", None), getattr(sampler, "num_inference_steps", None)
    if count is None or not isinstance(listed, torch.Tensor) or listed.dim() != 1 or not listed.numel():
        return None
    made = getattr(sampler, "step_index", None)
    if made is None:
        made = getattr(sampler, "begin_index", None) or 0
    if mark.value is not None and listed.device.type == "cpu":
        values = listed.tolist()
        place = made if made < len(values) and values[made] == mark.value else _index(values, mark.value)
    else:
        place = made if hasattr(sampler, "step_index") and made < listed.numel() else None
    if place is None:
        return None
    offset = int(listed.storage_offset())
    return _Mark(listed, mark.value, listed.untyped_storage(), offset + place, offset + listed.numel(), True)


def _sigmas(pipeline: Any, first: _Mark) -> tuple[float, ...] | None:
    """The sampler's sigmas from the timestep ``first`` on, with the one that it ends at; None where it has none."""
    sampler = getattr(pipeline, "scheduler", None)
    listed, sigmas = getattr(sampler, "timesteps", None), getattr(sampler, "sigmas", None)
    if not isinstance(listed, torch.Tensor) or not isinstance(sigmas, torch.Tensor) or not first.is_of(listed):
        return None
    if sigmas.dim() != 1 or sigmas.numel() - listed.numel() not in (0, 1) or isinstance(sigmas, FakeTensor):
        return None
    return tuple(sigmas[first.offset - int(listed.storage_offset()) :].tolist())


def _index(values: list[float], value: float) -> int | None:
    return values.index(value) if value in values else None


class Timeline:
    """The generations of one module; each thread has its own. ``pipeline`` is the diffusion pipeline that calls the
    module, where that is known."""

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._local = threading.local()
        self._all: weakref.WeakSet[_Track] = weakref.WeakSet()  # what a thread kept goes with the thread
        self._lock = threading.Lock()
        _TIMELINES.add(self)

    def at(self, timestep: torch.Tensor | None) -> Generation:
        """The generation that a call at ``timestep`` belongs to, its ``step`` set to that of the call."""
        track = getattr(self._local, "track", None)
        if track is None:
            track = self._local.track = _Track()
            with self._lock:
                self._all.add(track)
        mark = None if timestep is None else _Mark.of(timestep)
        pipeline = None if self._pipeline is None else self._pipeline()
        if mark is not None and pipeline is not None and not mark.is_listed and _DECLARED.get() is None:
            mark = _sampler_mark(pipeline, mark) or mark
        return track.at(mark)

    def steps(self, generation: Generation, *, with_times: bool) -> Steps:
        """What is known of the steps of ``generation``; ``with_times``: timesteps and sigmas too, where the sampler's
        list tells them, which are read once and waited for where they lie on a device."""
        if not with_times or generation.first is None:
            return Steps(generation.count)
        if generation.timed is None:
            times = generation.first.rest()
            is_whole = times is not None and len(times) == generation.count
            pipeline = None if self._pipeline is None else self._pipeline()
            sigmas = _sigmas(pipeline, generation.first) if is_whole else None
            generation.timed = Steps(generation.count, times if is_whole else None, sigmas)
        return generation.timed

    def _tracks(self) -> list[_Track]:
        with self._lock:
            return list(self._all)

    def end(self, declared: Declared | None = None) -> None:
        """Forget generations, and with them what was kept: all of them, or the one that was ``declared``."""
        for track in self._tracks():
            track.end(declared)

    def kept_bytes(self) -> int:
        """Bytes that the generations under way keep for later steps."""
        under_way = [track.generation for track in self._tracks()]
        return sum(branch.nbytes for one in under_way if one is not None for branch in one.every_branch())

    def __deepcopy__(self, memo: dict[int, Any]) -> Timeline:
        """A copied module has generations of its own."""
        pipeline = None if self._pipeline is None else self._pipeline()
        return Timeline(None if pipeline is None else memo.get(id(pipeline)))


class _Track:
    """The timesteps that one thread has called at."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.declared: Declared | None = None
        self.last: _Mark | None = None
        self.direction = 0.0

    def at(self, mark: _Mark | None) -> Generation:
        declared = _DECLARED.get()
        if self.generation is None or declared is not self.declared or self._turns(mark):
            return self._begin(declared, mark)
        if mark is None or self.last is None or not mark.same_step(self.last):
            self.generation.advance()
            self._aim(mark)
            self.last = mark
        return self.generation

    def end(self, declared: Declared | None) -> None:
        if declared is None or declared is self.declared:
            self.generation, self.declared, self.last = None, None, None

    def _begin(self, declared: Declared | None, mark: _Mark | None) -> Generation:
        listed = None
        if mark is not None and mark.is_listed:
            listed = mark.length - mark.offset
        count = declared.steps if declared is not None and declared.steps is not None else listed
        is_told = declared is not None or (mark is not None and mark.is_listed)
        self.generation = Generation(count, is_told, mark)
        self.declared, self.last, self.direction = declared, mark, 0.0
        return self.generation

    def _turns(self, mark: _Mark | None) -> bool:
        """Whether this timestep cannot follow the last one in one generation; what was declared stays one."""
        if mark is None or self.last is None or self.declared is not None:
            return False
        if mark.same_list(self.last):
            return mark.offset < self.last.offset
        if mark.is_listed or self.last.is_listed:
            return True
        if mark.value is None or self.last.value is None:
            return False
        return (mark.value - self.last.value) * self.direction < 0

    def _aim(self, mark: _Mark | None) -> None:
        """Timesteps rise or fall all along; the first difference tells which."""
        now, before = (None if found is None else found.value for found in (mark, self.last))
        if not self.direction and now is not None and before is not None:
            self.direction = now - before


_TIMELINES: weakref.WeakSet[Timeline] = weakref.WeakSet()
