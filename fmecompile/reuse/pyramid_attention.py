"""Pyramid Attention Broadcast: spatial, temporal and cross attention, each reused at its own pace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmecompile.errors import OptionError
from fmecompile.reuse.options import one_of, whole, window
from fmecompile.reuse.policy import Cut, SchedulePolicy
from fmecompile.reuse.steps import Decision, Steps

COMPONENTS = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class Broadcast:
    """Computed at every ``every``-th step counted from step 0, reused otherwise while low < timestep < high."""

    every: int
    window: tuple[float, float] = (450.0, 930.0)

    def __post_init__(self) -> None:
        whole("every", self.every, 1)
        window("window", self.window)


@dataclass(frozen=True, kw_only=True)
class PyramidAttention(SchedulePolicy):
    """The closer to the text, the longer an attention output lasts. None leaves a component alone.

    The defaults are the released ones for Open-Sora (2, 4, 6 within 450 .. 930); diffusers takes 100 .. 800 and only
    spatial attention unless told more. Both count from step 0, not from the start of the window, and so does this.

    Windows are on a scale from 1000 to 0. With ``scale="timestep"`` the sampler's own timesteps are compared, as the
    releases do; a sampler with another unit (SVD's timesteps are logarithms of sigma) needs ``scale="progress"``,
    where step i of N stands for 1000 * (N - i) / N. Raises ``OptionError`` when timesteps are needed and unknown, and
    when the run never comes near a window.
    """

    spatial: Broadcast | None = Broadcast(2)
    temporal: Broadcast | None = Broadcast(4)
    cross: Broadcast | None = Broadcast(6)
    scale: str = "timestep"
    cut: Cut = ("spatial_attention", "temporal_attention", "cross_attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scale", self.scale, ("timestep", "progress"))
        for name in COMPONENTS:
            given = getattr(self, name)
            if given is not None and not isinstance(given, Broadcast):
                raise OptionError(f"{name}={given!r} is no Broadcast", next_step=f"give {name}=Broadcast(2) or None")
        if not self._broadcasts():
            raise OptionError("no attention is reused", next_step="give spatial=Broadcast(2), or temporal, or cross")
        if isinstance(self.cut, str) or len(self.cut) != len(COMPONENTS):
            raise OptionError(f"cut={self.cut!r} is not three cuts", next_step="give (spatial, temporal, cross)")

    @property
    def needs_times(self) -> bool:
        return super().needs_times or self.scale == "timestep"

    def _broadcasts(self) -> dict[str, Broadcast]:
        return {name: given for name in COMPONENTS if (given := getattr(self, name)) is not None}

    @property
    def cuts(self) -> Mapping[str, Cut]:
        return {name: cut for name, cut in zip(COMPONENTS, self.cut, strict=True) if getattr(self, name) is not None}

    def wanted(self, steps: Steps) -> Sequence[Decision]:
        times = self._times(steps)
        return [
            frozenset(
                name
                for name, broadcast in self._broadcasts().items()
                if step % broadcast.every and broadcast.window[0] < time < broadcast.window[1]
            )
            for step, time in enumerate(times)
        ]

    def _times(self, steps: Steps) -> tuple[float, ...]:
        count = steps.known_count("PyramidAttention")
        if self.scale == "progress":
            return tuple(1000.0 * (count - step) / count for step in range(count))
        if steps.timesteps is None:
            raise OptionError(
                "PyramidAttention compares timesteps, and those of this run are not known",
                next_step='give Steps the sampler\'s timesteps, or use scale="progress"',
            )
        low, high = min(steps.timesteps), max(steps.timesteps)
        windows = [broadcast.window for broadcast in self._broadcasts().values()]
        if count > 1 and not any(start < high and low < end for start, end in windows):
            raise OptionError(
                f"timesteps from {high:g} to {low:g} never enter the windows {windows}",
                next_step='set the windows in this sampler\'s unit, or use scale="progress"',
            )
        return steps.timesteps
