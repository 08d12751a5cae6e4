"""DBCache: First Block Cache with more blocks at the head, some at the tail, and gates before the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fmecompile.errors import OptionError
from fmecompile.reuse.guards import guarded
from fmecompile.reuse.options import number, one_of, whole
from fmecompile.reuse.policy import Cut, Kind, Mode, ProbePolicy, ProbeRun, Reference, StaticPolicy
from fmecompile.reuse.steps import ALL, FULL, REUSE, Decision, Steps


@dataclass(frozen=True, kw_only=True)
class DBCache(StaticPolicy, ProbePolicy):
    """The first ``head_blocks`` run at every step and are the probe, the last ``tail_blocks`` run at every step too.

    Gates in order: during the first ``warm_up_steps`` every ``warm_up_interval``-th step is full; ``mask`` 1 is a full
    step, and 0 reuses untested with ``mask_mode`` ``static`` (then the policy is static) or goes on with ``dynamic``;
    changes measured in this generation that add up to ``max_accumulated`` end all reuse; then a step reuses when the
    change since the last full step is below ``threshold``. A threshold of 0 never reuses, one from 1 on always.
    ``token_threshold``: only tokens that changed by more than this, relatively, enter the mean that the runtime takes.

    The caps that cache-dit calls max_cached_steps and max_continuous_cached_steps are ``guards``, which here hold over
    a static mask too. ``warm_up_steps`` None is cache-dit's 8, and 0 where a mask is given, which there replaces the
    warm-up. Its count of consecutive steps starts at two; ours at one.
    """

    threshold: float = 0.08
    head_blocks: int = 8
    tail_blocks: int = 0
    warm_up_steps: int | None = None
    warm_up_interval: int = 1
    mask: tuple[int, ...] | None = None
    mask_mode: str = "dynamic"
    max_accumulated: float | None = None
    token_threshold: float = 0.0
    cut: Cut = "block_stack"
    mode: Mode = "residual"

    reference: ClassVar[Reference] = "last_full"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("threshold", self.threshold, 0)
        number("token_threshold", self.token_threshold, 0)
        whole("head_blocks", self.head_blocks, 1)
        whole("tail_blocks", self.tail_blocks, 0)
        whole("warm_up_interval", self.warm_up_interval, 1)
        one_of("mask_mode", self.mask_mode, ("dynamic", "static"))
        if self.warm_up_steps is not None:
            whole("warm_up_steps", self.warm_up_steps, 0)
        if self.max_accumulated is not None:
            number("max_accumulated", self.max_accumulated, 0)
        if self.mask is not None:
            object.__setattr__(self, "mask", tuple(self.mask))
            for at, bit in enumerate(self.mask):
                whole(f"mask[{at}]", bit, 0, 1)
        elif self.mask_mode == "static":
            raise OptionError('mask_mode="static" without a mask', next_step="give mask=(1, 1, 0, ...), one per step")

    @property
    def kind(self) -> Kind:
        return "static" if self.mask_mode == "static" else "probe"

    @property
    def needs_steps(self) -> bool:
        return super().needs_steps or self.mask is not None

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return {ALL: f"block_stack:{self.head_blocks}:{self.tail_blocks}" if self.cut == "block_stack" else self.cut}

    @property
    def least_change(self) -> float:
        return self.token_threshold

    @property
    def probe(self) -> str:
        return f"head_residual:{self.head_blocks}"

    def check(self, steps: Steps, has_guidance: bool | None = None) -> None:
        super().check(steps, has_guidance)
        if self.mask is not None and len(self.mask) != steps.known_count("DBCache with a mask"):
            raise OptionError(
                f"the mask is of {len(self.mask)} steps, the run has {steps.count}",
                next_step=f"give a mask of {steps.count} bits, one per step",
            )

    def start(self, steps: Steps) -> ProbeRun:
        self.check(steps)
        return _Gates(self, steps)

    def plan(self, steps: Steps) -> tuple[Decision, ...]:
        """The static mask and the warm-up under the guards. ``OptionError`` without such a mask."""
        self.check(steps)
        if self.mask is None or self.kind != "static":
            raise OptionError(
                "DBCache decides as it goes where no static mask is given",
                next_step='use start(steps), or give mask and mask_mode="static"',
            )
        wanted = [FULL if bit or self.is_warming_up(step) else REUSE for step, bit in enumerate(self.mask)]
        return guarded(self.guards, steps, wanted)

    def is_warming_up(self, step: int) -> bool:
        """The step is one of those that the warm-up makes full."""
        default = 8 if self.mask is None else 0
        first = default if self.warm_up_steps is None else self.warm_up_steps
        return step < first and step % self.warm_up_interval == 0


class _Gates(ProbeRun):
    def __init__(self, policy: DBCache, steps: Steps) -> None:
        super().__init__(policy.guards, steps)
        self._policy, self._accumulated = policy, 0.0

    def wants(self, step: int, change: float) -> Decision:
        policy = self._policy
        bit = None if policy.mask is None or step >= len(policy.mask) else policy.mask[step]
        if policy.is_warming_up(step) or bit == 1:
            return FULL
        if bit == 0 and policy.kind == "static":
            return REUSE
        if policy.max_accumulated is not None and self._accumulated >= policy.max_accumulated:
            return FULL
        if policy.threshold == 0 or policy.threshold >= 1:
            return REUSE if policy.threshold else FULL
        self._accumulated += change
        return REUSE if change < policy.threshold else FULL
