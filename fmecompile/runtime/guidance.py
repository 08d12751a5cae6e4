"""Both halves of classifier-free guidance in one batch, [unconditional, conditional]; the first rebuilt of the second.

What the halves differ by is kept in two parts by spatial frequency, as FasterCache does: dLow within a disc of radius
min(H, W) // 5 around the zero of ``fftshift(fft2(.))``, dHigh outside. A step that skips the unconditional half takes

    uncond = real(ifft2(ifftshift((dLow + low) + (dHigh + high))))    where low + high is the conditional output's

and dLow and dHigh times a factor each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def halved(leaves: Sequence[Any], batch: int) -> list[Any]:
    """The conditional half of the leaves of a call whose clips are a ``batch``: of every tensor whose first dimension
    is a multiple of it."""
    return [conditional(leaf) if is_batched(leaf, batch) else leaf for leaf in leaves]


def is_batched(leaf: Any, batch: int) -> bool:
    """Whether the first dimension of a tensor goes over the batch, perhaps with frames in it."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] % batch == 0


def conditional(value: torch.Tensor) -> torch.Tensor:
    """The second half of the batch: a view."""
    return value[value.shape[0] // 2 :]


@dataclass(frozen=True)
class Gap:
    """Unconditional minus conditional output, complex, of the shape of one half."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, output: torch.Tensor) -> Gap:
        """``output`` is of both halves: (2 B, ..., H, W)."""
        count = output.shape[0] // 2
        spectrum = _spectrum(output[:count]) - _spectrum(output[count:])
        low = spectrum * _disc(output)
        return cls(low, spectrum - low)

    def scaled(self, low: float, high: float) -> Gap:
        """Both parts times a factor."""
        return Gap(self.low * low, self.high * high)

    def completed(self, output: torch.Tensor) -> torch.Tensor:
        """Both halves, from the conditional ``output`` (B, ..., H, W)."""
        spectrum = _spectrum(output) + self.low + self.high
        rebuilt = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
        return torch.cat([rebuilt.to(output.dtype), output])

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.high.nbytes


def gap_bytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes of the gap between the halves of an output of ``numel`` numbers, both halves together."""
    return numel * (16 if dtype == torch.float64 else 8)


def _spectrum(output: torch.Tensor) -> torch.Tensor:
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    return torch.fft.fftshift(torch.fft.fft2(wide), dim=(-2, -1))


def _disc(output: torch.Tensor) -> torch.Tensor:
    height, width = output.shape[-2:]
    rows = torch.arange(height, device=output.device) - height // 2
    columns = torch.arange(width, device=output.device) - width // 2
    return rows[:, None] ** 2 + columns**2 <= (min(height, width) // 5) ** 2
