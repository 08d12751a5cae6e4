"""A whole diffusion pipeline: what lies on the device while each call runs, known or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fmecompile.backends.budgeted import ASSUMED_WORKSPACE_BYTES
from fmecompile.offline.calls import Call
from fmecompile.offline.figures import Held, Job, Planner
from fmecompile.offline.ledger import Ledger
from fmecompile.offline.model import Size

RESIDENCES = ("resident", "offload")
"""Where the weights of the components that do not run are: on the device, or on the host (model CPU offload)."""


@dataclass
class Survey:
    """The calls of one model. ``weights`` holds the bytes of every component, by its name; ``may_spill`` says whether
    values may wait in host memory where nothing else meets ``budget_bytes``.
    """

    calls: Sequence[Call]
    weights: dict[str, int]
    planner: Planner
    budget_bytes: int | None = None
    may_spill: bool = False
    ledger: Ledger = field(default_factory=Ledger)

    def measure(self, sizes: Sequence[Size]) -> None:
        """Compute eager and planned figures of every call at every size."""
        calls = dict.fromkeys(call.at(size) for size in sizes for call in self.calls)
        eager = [Job(call, is_eager=True) for call in calls]
        long, *others = [Job(call) for call in sorted(calls, key=lambda call: call.kind != "denoise")]
        self.planner.start([long, *eager, *others])
        self._ask(eager)  # what does not run at all shows there
        for job in (*others, long):
            self._ask([job])
            self.planner.start([spilling for place in RESIDENCES if (spilling := self._spilling(job.call, place))])

    def spilled(self, call: Call, residence: str) -> Held | None:
        """What ``call`` holds with values in host memory; None where it fits the budget without, or may not."""
        job = self._spilling(call, residence)
        if job is None:
            return None
        self._ask([job])
        return self.planner.ask([job])[0]

    def needs_spill(self, residence: str) -> bool:
        """Whether a call was asked with values in host memory."""
        return any(self.spilled(call, residence) is not None for call in self.calls)

    def _spilling(self, call: Call, residence: str) -> Job | None:
        if self.budget_bytes is None or not self.may_spill or call not in self.calls:
            return None
        left_bytes = self.budget_bytes - self.base_bytes(call, residence)
        fits = self.ledger.value(call, "floor") <= left_bytes
        return None if fits or left_bytes <= 0 else Job(call, limit_bytes=left_bytes, may_spill=True)

    def try_limits(self, questions: Sequence[tuple[Call, int, bool]]) -> list[bool]:
        """Whether each call has a plan that holds at most so many bytes of activations, with values in host memory or
        without: made, not estimated.
        """
        return self._ask(
            [Job(call, limit_bytes=max(limit, 1), may_spill=may_spill) for call, limit, may_spill in questions]
        )

    def _ask(self, jobs: Sequence[Job]) -> list[bool]:
        answers = self.planner.ask(jobs)
        for job, held in zip(jobs, answers, strict=True):
            self.ledger.note(job, held)
        return [held.is_feasible for held in answers]

    def is_planned(self, size: Size) -> bool:
        """Whether every call has figures computed for this very size; otherwise some are estimates."""
        return all(self.ledger.is_known(call.at(size), "planned") for call in self.calls)

    def base_bytes(self, call: Call, residence: str) -> int:
        """All but activations on the device while ``call`` runs: weights, inputs, the workspace of CUDA's libraries.

        Its own component may run in a wider type than when it lies idle.
        """
        own = self.ledger.value(call, "weights")
        others = sum(size for name, size in self.weights.items() if name != call.component.name)
        held = own + (others if residence == "resident" else 0)
        return held + self.ledger.value(call, "inputs") + ASSUMED_WORKSPACE_BYTES

    def total_bytes(self, call: Call, column: str, residence: str) -> int:
        """Everything on the device at the peak of ``call``."""
        return self.base_bytes(call, residence) + self.ledger.value(call, column)

    def bottleneck(self, size: Size, column: str, residence: str) -> tuple[Call, int]:
        """The call that needs the most at this size, and how many bytes."""
        totals = [(call.at(size), self.total_bytes(call.at(size), column, residence)) for call in self.calls]
        return max(totals, key=lambda entry: entry[1])
