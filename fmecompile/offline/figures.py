"""What one call holds: eagerly, or by its plan. Asked once each, and in several processes where there are some."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmecompile.capture.example import Example, eager_measurement
from fmecompile.errors import BudgetInfeasible, OptionError
from fmecompile.graph.specs import TensorSpec
from fmecompile.offline.calls import Call
from fmecompile.partition.tradeoffs import Limits
from fmecompile.pipeline import compile_module
from fmecompile.report import bytes_text
from fmecompile.runtime.exclusion import EXCLUSION


@dataclass(frozen=True)
class Job:
    """A question about one call: what it holds eagerly, or what its plan holds.

    With ``limit_bytes`` the question is whether any plan's activations fit in so many; where it ``may_spill``, with
    values waiting in host memory if no other does.
    """

    call: Call
    is_eager: bool = False
    limit_bytes: int | None = None
    may_spill: bool = False

    def __str__(self) -> str:
        spill = " with spill" if self.may_spill else ""
        return f"{self.call.name}, {self.call.size}: {'eager' if self.is_eager else 'plan'}{spill}"


@dataclass(frozen=True)
class Held:
    """Bytes. Weights are the whole component's; ``peak_bytes`` and ``floor_bytes`` are activations, ``host_bytes`` what
    of them goes to host memory.

    Not ``is_feasible``: nothing meets the job's limit, and both are the least that was found.
    """

    weight_bytes: int
    input_bytes: int
    peak_bytes: int
    floor_bytes: int
    is_feasible: bool = True
    host_bytes: int = 0


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
    weights, inputs = weight_bytes(component), _input_bytes(example)
    if job.is_eager:
        eager_bytes = _eager_bytes(job.call, part, example)
        return Held(weights, inputs, eager_bytes, eager_bytes)
    return Held(weights, inputs, *_planned(job, part, example))


def _eager_bytes(call: Call, part: nn.Module, example: Example) -> int:
    try:
        with torch.no_grad():
            return eager_measurement(part, example).peak_bytes
    except Exception as error:  # whatever the model raises at shapes it is not made for
        raise OptionError(
            f"{call.component.class_name} does not run on {call.size}: {error}",
            place=call.name,
            next_step="give multiples of 64 for height and width, and a configuration that belongs to the class",
        ) from error


def _planned(job: Job, part: nn.Module, example: Example) -> tuple[int, int, bool, int]:
    """(peak, floor, is_feasible, to host) of the default plan, or of the one with the fewest trips under the limit."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = example.materialise(mode)
    try:
        with EXCLUSION.capture(), mode, torch.no_grad():
            plan = compile_module(part, args, kwargs, limits=Limits(job.limit_bytes, job.may_spill))[1]
    except BudgetInfeasible as error:
        return error.floor_bytes, error.floor_bytes, False, 0
    to_host = 0 if plan.transfer is None else plan.transfer.out_bytes
    return plan.projected_peak_bytes, plan.floor_bytes, True, to_host


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
        self._pending: dict[Job, Future[Held]] = {}

    def start(self, jobs: Sequence[Job]) -> None:
        """Let the processes begin, in this order, with what will be asked; nothing happens where there are none."""
        for job in jobs:
            if self._pool is not None and job not in self._known and job not in self._pending:
                self._submit(self._pool, job)

    def _submit(self, pool: ProcessPoolExecutor, job: Job) -> None:
        try:
            self._pending[job] = pool.submit(held, job)
        except BrokenProcessPool:
            self._pool = None

    def ask(self, jobs: Sequence[Job]) -> list[Held]:
        """The answers, in order; new jobs run at the same time where there are processes for them."""
        new = [job for job in dict.fromkeys(jobs) if job not in self._known]
        if len(new) > 1:
            self.start(new)
        for job in new:
            self._known[job] = self._answer(job)
        return [self._known[job] for job in jobs]

    def _answer(self, job: Job) -> Held:
        """From a process; from this one where there is none, or where it was killed, for its memory perhaps."""
        begun = self._pending.pop(job, None)
        if begun is not None:
            try:
                answer = begun.result()
            except BrokenProcessPool:
                self._pool = None
            else:
                self._say(f"{job}: {bytes_text(answer.peak_bytes)}")
                return answer
        self._say(str(job))
        return held(job)


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
