"""A whole diffusion pipeline: what lies on the device while each call runs, known or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fmecompile.backends.budgeted import ASSUMED_WORKSPACE_BYTES
from fmecompile.offline.calls import Call
from fmecompile.offline.figures import Job, Planner
from fmecompile.offline.ledger import Ledger
from fmecompile.offline.model import Size

RESIDENCES = ("resident", "offload")
"""Where the weights of the components that do not run are: on the device, or on the host (model CPU offload)."""


@dataclass
class Survey:
    """The calls of one model. ``weights`` holds the bytes of every component, by its name."""

    calls: Sequence[Call]
    weights: dict[str, int]
    planner: Planner
    ledger: Ledger = field(default_factory=Ledger)

    def measure(self, sizes: Sequence[Size]) -> None:
        """Compute eager and planned figures of every call at every size."""
        calls = dict.fromkeys(call.at(size) for size in sizes for call in self.calls)
        # Eager first: what does not run at all shows there. Then long ones, so that no process is alone at the end.
        planned = sorted(calls, key=lambda call: call.kind != "denoise")
        self._ask([*(Job(call, is_eager=True) for call in calls), *(Job(call) for call in planned)])

    def try_limits(self, questions: Sequence[tuple[Call, int]]) -> list[bool]:
        """Whether each call has a plan that holds at most so many bytes of activations: made, not estimated."""
        return self._ask([Job(call, limit_bytes=max(limit_bytes, 1)) for call, limit_bytes in questions])

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
