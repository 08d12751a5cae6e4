"""Where the values of one branch wait between steps: on their device, or in host memory.

A cut is kept as D_0 .. D_order (reuse/forecast.py), D_0 alone without a forecast, all in the dtype that programs keep
it in. Differences are taken between values as they are stored, in float32 or wider, and rounded to that dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from fmecompile.runtime.guidance import conditional
from fmecompile.runtime.host import is_host, to_device, to_host
from fmecompile.runtime.signature import fake_mode_of

PART = 2**22
"""Numbers that are subtracted at a time."""


@dataclass(eq=False)
class Store:
    """The values of each cut, by name. ``order`` is that of the forecast; ``on_host``: values wait in host memory."""

    order: int = 0
    on_host: bool = False
    _held: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _devices: dict[str, torch.device] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    @property
    def nbytes(self) -> int:
        """Bytes on the device; what waits in host memory has none there."""
        return sum(value.nbytes for held in self._held.values() for value in held if not is_host(value))

    def take(self, name: str) -> list[torch.Tensor]:
        """D_0 .. D_order on their device: the values themselves, or copies of what waits in host memory."""
        return [self._fetched(name, value) for value in self._held[name]]

    def renew(self, name: str, value: torch.Tensor, scales: Sequence[float] = ()) -> None:
        """Keep ``value`` as D_0, and its differences to what was kept before, times ``scales``; 0 where there is none.

        The store owns ``value`` from now on: the next differences take its place, and theirs. Of values that wait in
        host memory one at a time is fetched for that.
        """
        before, renewed = self._held.pop(name, []), []
        self._devices[name] = value.device
        for scale, held in zip(scales, before, strict=False):
            earlier = self._fetched(name, held)
            _difference(earlier, value, scale)
            renewed.append(self._waiting(value))
            value = earlier
        renewed.append(self._waiting(value))
        while len(renewed) <= self.order:
            renewed.append(self._waiting(torch.zeros_like(value)))
        self._held[name] = renewed

    def drop(self, name: str) -> None:
        """Keep nothing of a cut, if anything was kept."""
        self._held.pop(name, None)

    def clear(self) -> None:
        """Keep nothing."""
        self._held.clear()

    def halve(self) -> None:
        """Keep the conditional half of every value alone."""
        for name in self._held:
            halves = (conditional(value).clone() for value in self.take(name))
            self._held[name] = [self._waiting(half) for half in halves]

    def _waiting(self, value: torch.Tensor) -> torch.Tensor:
        if not self.on_host:
            return value
        mode = fake_mode_of([value])
        with mode if mode is not None else nullcontext():
            return to_host(value)

    def _fetched(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return to_device(value, self._devices[name]) if self.on_host else value


def _difference(earlier: torch.Tensor, now: torch.Tensor, scale: float) -> None:
    """Make ``earlier`` scale * (now - earlier), a few rows at a time so that next to nothing else is held."""
    wide = torch.float64 if now.dtype == torch.float64 else torch.float32
    most = torch.finfo(earlier.dtype).max
    rows = max(1, PART * now.shape[0] // max(now.numel(), 1))
    for then, value in zip(earlier.split(rows), now.split(rows), strict=True):
        then.copy_((value.to(wide) - then.to(wide)).mul_(scale).clamp_(-most, most))
