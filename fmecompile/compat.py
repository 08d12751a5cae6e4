"""A drop-in for the interface of the paper's released code: ``FMEWrapper(...).wrap(pipe)``.

There, ``num_temporal_chunk`` cuts the pixels of temporal layers and ``num_spatial_chunk`` the frames of spatial layers,
class by class; temporal GroupNorms are cut along the width as well, so the output is another one. Here a loop may run
through layers of both kinds, so the larger of the two numbers bounds the chunk trips of every loop, and the output is
the unwrapped one up to rounding. A loop takes fewer trips where more would not lower the peak.
"""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from fmecompile.api import is_optimized, optimize, restore
from fmecompile.capture.families import is_pipeline, parts
from fmecompile.errors import OptionError, TargetError

Target = TypeVar("Target")
_LOGGER = logging.getLogger(__name__)


class FMEWrapper:
    """Takes the arguments of the released wrapper; ``fmecompile.optimize`` has the rest (budgets, saved plans)."""

    def __init__(
        self,
        num_temporal_chunk: int,
        num_spatial_chunk: int | None = None,
        num_frames: int | None = None,
        verbose: bool = False,
    ) -> None:
        """``num_spatial_chunk`` is ``num_temporal_chunk`` unless given. ``num_frames`` is checked and not used: chunks
        need not divide it, and a call with another number of frames gets its own plan. ``verbose`` logs the modules.

        Raises OptionError for what is no whole number from 1 on.
        """
        self.num_temporal_chunk = _count("num_temporal_chunk", num_temporal_chunk)
        spatial = num_temporal_chunk if num_spatial_chunk is None else num_spatial_chunk
        self.num_spatial_chunk = _count("num_spatial_chunk", spatial)
        self.num_frames = None if num_frames is None else _count("num_frames", num_frames)
        self.verbose = verbose

    @property
    def max_chunks(self) -> int:
        """The most chunk trips that any loop takes."""
        return max(self.num_temporal_chunk, self.num_spatial_chunk)

    def wrap(self, pipe: Target) -> Target:
        """Optimize a diffusion pipeline or module in place; returns it. Wrapping again replaces the numbers.

        Raises TargetError for anything else.
        """
        optimize(pipe, max_chunks=self.max_chunks)
        for path, module in parts(pipe).items() if self.verbose else ():
            _LOGGER.info("%s (%s): at most %d chunks", path or "target", type(module).__name__, self.max_chunks)
        return pipe

    def unwrap(self, pipe: Target) -> Target:
        """Put everything back as it was before ``wrap``, whichever wrapper did that; returns ``pipe``.

        Raises TargetError for what is not wrapped.
        """
        is_target = isinstance(pipe, nn.Module) or is_pipeline(pipe)
        if is_target and not any(map(is_optimized, parts(pipe).values())):
            raise TargetError(f"this {type(pipe).__name__} is not wrapped", next_step="call wrap(pipe) first")
        return restore(pipe)


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r} is no whole number from 1 on", next_step="give one, such as 7")
    return value
