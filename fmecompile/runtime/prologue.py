"""What all steps share, made at the first step of a generation and taken by the others while nothing of it can differ.

It is made anew unless that is proven: a later step of the same generation, told by the sampler's list or declared; the
same tensors as inputs, not changed in place since; the same weights, likewise. Weights that are changed behind torch's
back (through ``.data``) in the middle of a generation count from the next one on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmecompile.runtime.executable import Executable, Keep
from fmecompile.runtime.generation import Anchor, Branch, Generation, anchored

UNCOUNTED = -1
"""The version of a tensor whose changes torch does not count."""


@dataclass(eq=False)
class Made:
    """Values made at ``step`` or proven the same up to it, and what they were made of."""

    step: int
    sources: tuple[Anchor, ...]
    values: Keep

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    def holds(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the values would come out the same again."""
        now = anchored(sources)
        return self.sources == now and all(version != UNCOUNTED for _, _, version in now)


class Prologue:
    """Runs ``program`` where it must; ``places`` are the leaves that it reads."""

    def __init__(self, program: Executable, places: Sequence[int]) -> None:
        self._program, self._places = program, tuple(places)

    def values(self, generation: Generation, branch: Branch, leaves: Sequence[Any]) -> Keep:
        """What a step on ``leaves`` takes; kept with the branch until its last step."""
        sources = [*(leaves[i] for i in self._places), *self._program.weights()]
        made = branch.made
        is_later = made is not None and generation.is_told and branch.step > made.step
        if made is None or not is_later or not made.holds(sources):
            branch.made = made = None  # old values go before new ones come
            _, values = self._program.run(leaves)
            made = Made(branch.step, anchored(sources), {(name, 0): value for name, value in values.items()})
        made.step = branch.step
        is_last = generation.count is not None and branch.step + 1 >= generation.count
        branch.made = None if is_last else made
        return made.values
