"""Steps of one generation, what is decided for each, and how a whole run of decisions is counted and printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fmecompile.errors import OptionError
from fmecompile.reuse.options import numbers, whole

Decision = frozenset[str]
"""The names of the components that one step reuses. The empty set is a full step."""

ALL = "cut"
"""The one component of a policy that reuses its whole cut or nothing."""

ATTENTION = "attention"
UNCOND = "uncond"
"""Not a cut: in a step that reuses it the unconditional branch does not run, its output is rebuilt from the
conditional one."""

FULL: Decision = frozenset()
REUSE: Decision = frozenset({ALL})

DECLARE = "declare the steps: `with fmecompile.generation(steps=25):` around the sampling loop"


@dataclass(frozen=True)
class Steps:
    """What is known of a generation before its step 0; a step is one call of the denoiser.

    A sampler that calls twice per sigma counts both calls, and image-to-image counts only the calls that are made.
    ``timesteps`` are in the sampler's own unit, one per step. ``sigmas`` may have one more, the final 0. A missing
    ``count`` is read off ``timesteps``; where both are None the number of steps is unknown.

    Raises ``OptionError`` when the lengths contradict one another.
    """

    count: int | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("timesteps", "sigmas"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, numbers(name, given))
        if self.count is None and self.timesteps is not None:
            object.__setattr__(self, "count", len(self.timesteps))
        if self.count is None:
            return
        whole("count", self.count, 1)
        self._fits("timesteps", self.timesteps, 0)
        self._fits("sigmas", self.sigmas, 1)

    def _fits(self, name: str, values: tuple[float, ...] | None, spare: int) -> None:
        assert self.count is not None
        if values is not None and len(values) - self.count not in range(spare + 1):
            raise OptionError(
                f"{len(values)} {name} were given for {self.count} steps",
                next_step=f"give one of the {name} per call of the denoiser, from step 0 on",
            )

    def known_count(self, why: str) -> int:
        """The number of steps; ``OptionError`` when it is unknown. ``why`` names who needs it."""
        if self.count is None:
            raise OptionError(f"{why} needs the number of steps, and it is not known", next_step=DECLARE)
        return self.count


def variants(decisions: Iterable[Decision]) -> tuple[Decision, ...]:
    """The distinct decisions in order of first occurrence: one graph is built for each.

    Two components with the same decisions all along never part, so they add no variant.
    """
    return tuple(dict.fromkeys(decisions))


def to_bits(decisions: Iterable[Decision], component: str | None = None) -> str:
    """``1`` for a full step, ``0`` for one that reuses: ``1001001``. With ``component``, ``1`` where it is computed."""
    if component is None:
        return "".join("0" if decision else "1" for decision in decisions)
    return "".join("0" if component in decision else "1" for decision in decisions)
