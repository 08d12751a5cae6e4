"""What one call holds: eagerly, or by its plan. Asked once each, and in several processes where there are some."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.capture.example import Example, eager_measurement
from fmecompile.errors import BudgetInfeasible, FmeError, OptionError
from fmecompile.graph.specs import TensorSpec
from fmecompile.offline.calls import Call
from fmecompile.pipeline import compile_module
from fmecompile.runtime.exclusion import EXCLUSION


@dataclass(frozen=True)
class Job:
    """A question about one call: what it holds eagerly, or what its plan holds.

    With ``limit_bytes`` the question is whether any plan's activations fit in so many.
    """

    call: Call
    is_eager: bool = False
    limit_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.call.name}, {self.call.size}: {'measuring eager' if self.is_eager else 'planning'}"


@dataclass(frozen=True)
class Held:
    """Bytes. Weights are the whole component's; ``peak_bytes`` and ``floor_bytes`` are activations.

    Not ``is_feasible``: nothing meets the job's limit, and both are the least that was found.
    """

    weight_bytes: int
    input_bytes: int
    peak_bytes: int
    floor_bytes: int
    is_feasible: bool = True


def held(job: Job) -> Held:
    """Answer one job on fake tensors: no data, no weights.

    Raises:
        TargetError: the configuration builds no module.
        OptionError: the module does not run at this size.
        CaptureError: it runs, and cannot be captured.
    """
    component = job.call.build()
    part = job.call.part(component)
    with FakeTensorMode():
        example = Example.of(*job.call.inputs(component))
    peak_bytes, floor_bytes, is_feasible = (_eager if job.is_eager else _planned)(job, part, example)
    return Held(weight_bytes(component), _input_bytes(example), peak_bytes, floor_bytes, is_feasible)


def _eager(job: Job, part: nn.Module, example: Example) -> tuple[int, int, bool]:
    """(peak, floor, feasible); eager has no choice, so both are one."""
    try:
        with torch.no_grad():
            peak_bytes = eager_measurement(part, example).peak_bytes
    except FmeError:
        raise
    except Exception as error:  # whatever the model raises at shapes it is not made for
        raise OptionError(
            f"{job.call.component.class_name} does not run on {job.call.size}: {error}",
            place=job.call.name,
            next_step="give multiples of 64 for height and width, and a configuration that belongs to the class",
        ) from error
    return peak_bytes, peak_bytes, job.limit_bytes is None or peak_bytes <= job.limit_bytes


def _planned(job: Job, part: nn.Module, example: Example) -> tuple[int, int, bool]:
    """(peak, floor, feasible) of the default plan, or of the one with the fewest trips under the limit."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = example.materialise(mode)
    try:
        with EXCLUSION.capture(), mode, torch.no_grad():
            plan = compile_module(part, args, kwargs, limit_bytes=job.limit_bytes)[1]
    except BudgetInfeasible as error:
        return error.floor_bytes, error.floor_bytes, False
    return plan.projected_peak_bytes, plan.floor_bytes, True


def weight_bytes(module: nn.Module) -> int:
    """Parameters and buffers, shared ones once."""
    return sum(t.numel() * t.itemsize for t in (*module.parameters(), *module.buffers()))


def _input_bytes(example: Example) -> int:
    specs = [leaf for leaf in example.leaves if isinstance(leaf, TensorSpec)]
    return sum(spec.numel * spec.dtype.itemsize for spec in specs)


class Planner:
    """Answers jobs, each once. ``say`` is told what is asked."""

    def __init__(self, pool: ProcessPoolExecutor | None, say: Callable[[str], None]) -> None:
        self._pool, self._say = pool, say
        self._known: dict[Job, Held] = {}

    def ask(self, jobs: Sequence[Job]) -> list[Held]:
        """The answers, in order; new jobs run at the same time where there are processes for them."""
        new = [job for job in dict.fromkeys(jobs) if job not in self._known]
        for job in new:
            self._say(str(job))
        self._known |= dict(zip(new, self._run(new), strict=True))
        return [self._known[job] for job in jobs]

    def _run(self, jobs: list[Job]) -> list[Held]:
        if self._pool is not None:
            try:
                return list(self._pool.map(held, jobs))
            except BrokenProcessPool:  # a process was killed, for its memory perhaps: one at a time, here
                self._pool = None
        return [held(job) for job in jobs]


@contextmanager
def planner(processes: int, say: Callable[[str], None]) -> Iterator[Planner]:
    """A planner with ``processes`` processes of its own; with one it works in this process."""
    if processes == 1:
        yield Planner(None, say)
        return
    # Forking after torch has started its threads may hang.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield Planner(pool, say)
    finally:
        pool.shutdown(cancel_futures=True)
