"""First Block Cache: the first block runs at every step, and how far it moved decides about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fmecompile.reuse.options import number
from fmecompile.reuse.policy import Cut, Mode, ProbePolicy, ProbeRun, Reference
from fmecompile.reuse.steps import ALL, FULL, REUSE, Decision, Steps


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(ProbePolicy):
    """Full where the first block's residual (out minus in) moved by more than ``threshold`` since the last full step.

    A change equal to the threshold reuses, as in diffusers; ParaAttention, where the method is from, computes then.
    diffusers reuses on a change that is not a number; here that is a full step. The head's work is part of both
    variants, so none is wasted.
    """

    threshold: float = 0.05
    cut: Cut = "block_stack"
    mode: Mode = "residual"

    reference: ClassVar[Reference] = "last_full"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("threshold", self.threshold, 0)

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return {ALL: "block_stack:1:0" if self.cut == "block_stack" else self.cut}

    @property
    def probe(self) -> str:
        return "head_residual:1"

    def start(self, steps: Steps) -> ProbeRun:
        self.check(steps)
        return _Test(self, steps)


class _Test(ProbeRun):
    def __init__(self, policy: FirstBlockCache, steps: Steps) -> None:
        super().__init__(policy.guards, steps)
        self._threshold = policy.threshold

    def wants(self, step: int, change: float) -> Decision:
        return FULL if change > self._threshold else REUSE
