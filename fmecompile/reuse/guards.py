"""Guards: the limits on reuse that hold for every policy, kept by one class step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fmecompile.errors import FmeError
from fmecompile.reuse.options import whole
from fmecompile.reuse.steps import FULL, Decision, Steps


@dataclass(frozen=True)
class Guards:
    """Limits on what a policy wants. A guard only ever turns reuse into computing.

    The first ``warm_up`` steps are full (at least one: before step 0 there is nothing to reuse), and so are the last
    ``tail`` (which needs the number of steps). A component is reused at most ``max_consecutive`` steps in a row, so
    no value gets older than that, and at most ``max_total`` times in a generation; None is no limit. Components are
    counted each on its own.
    """

    warm_up: int = 1
    tail: int = 0
    max_consecutive: int | None = None
    max_total: int | None = None

    def __post_init__(self) -> None:
        whole("warm_up", self.warm_up, 1)
        whole("tail", self.tail, 0)
        for name in ("max_consecutive", "max_total"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0)


PLAIN = Guards()
"""Step 0 is full, nothing else is limited."""


class History:
    """The reuses of one generation so far, and what the guards still admit. One for each run and branch.

    Where the number of steps is known, a step past the last one is full: nothing is known about it.
    """

    def __init__(self, guards: Guards, steps: Steps) -> None:
        self._guards, self._count = guards, steps.count
        self._last = steps.known_count("a guarded tail") - guards.tail if guards.tail else self._count
        self._step = 0
        self._in_a_row: Counter[str] = Counter()
        self._total: Counter[str] = Counter()

    def admit(self, step: int, wanted: Decision) -> Decision:
        """What step ``step`` may reuse of ``wanted``, recorded. Steps come in order, each once, from 0 on."""
        if step != self._step:
            raise FmeError(
                f"step {step} was asked for where step {self._step} comes next",
                next_step="start a new run for each generation and each branch, and decide each step once",
            )
        decision = frozenset(filter(self._has_room, wanted)) if self._is_open(step) else FULL
        self._step += 1
        self._in_a_row = Counter({component: self._in_a_row[component] + 1 for component in decision})
        self._total.update(decision)
        return decision

    def _is_open(self, step: int) -> bool:
        return step >= self._guards.warm_up and (self._last is None or step < self._last)

    def _has_room(self, component: str) -> bool:
        in_a_row, total = self._guards.max_consecutive, self._guards.max_total
        return (in_a_row is None or self._in_a_row[component] < in_a_row) and (
            total is None or self._total[component] < total
        )


def guarded(guards: Guards, steps: Steps, wanted: Iterable[Decision]) -> tuple[Decision, ...]:
    """A finished list of what a schedule wants, under the guards."""
    history = History(guards, steps)
    return tuple(history.admit(step, decision) for step, decision in enumerate(wanted))
