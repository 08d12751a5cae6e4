"""What stands in for a diffusion pipeline's ``decode_latents``: the whole clip in one call of the decoder.

Pipelines decode ``decode_chunk_size`` frames at a time to save memory. A decoder that mixes frames then sees less of
the clip and gives other pictures; an optimized one needs less memory for the whole clip.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from fmecompile.errors import BudgetInfeasible, CaptureError, GradientError
from fmecompile.runtime.dispatch import compiled_only, find

METHOD, CHUNK_SIZE, CLIP_LENGTH = "decode_latents", "decode_chunk_size", "num_frames"
"""The method of pipelines, its argument that is overridden, and the one that tells the frames of a clip. Where that is
missing, latents are (batch, channels, frames, height, width)."""


class WholeClip:
    """Callable in the place of ``pipeline.decode_latents``; ``path`` is where the pipeline has its decoder.

    ``overridden`` is the last chunk size that was not used; ``refused`` says why the pipeline's chunk size was used
    after all; both None until then.
    """

    __slots__ = ("__wrapped__", "_path", "_pipeline", "_was_absent", "overridden", "refused")

    def __init__(self, pipeline: Any, path: str) -> None:
        self.__wrapped__: Callable[..., Any] = pipeline.decode_latents
        self._was_absent = METHOD not in vars(pipeline)
        self._pipeline = pipeline
        self._path = path
        self.overridden: int | None = None
        self.refused: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
        call.apply_defaults()
        asked, frames = call.arguments[CHUNK_SIZE], self._frames(call.arguments)
        if not self._is_compiled or (asked is not None and asked >= frames):
            return self.__wrapped__(*args, **kwargs)
        call.arguments[CHUNK_SIZE] = frames
        try:
            with compiled_only():
                decoded = self.__wrapped__(*call.args, **call.kwargs)
        except (BudgetInfeasible, CaptureError, GradientError) as error:
            self.refused = error.fact
            return self.__wrapped__(*args, **kwargs)
        self._tell(asked, frames)
        return decoded

    @property
    def _is_compiled(self) -> bool:
        """Whether the decoder that the pipeline has now is optimized; VAEs are exchanged."""
        decoder = self._pipeline
        for name in self._path.split("."):
            decoder = getattr(decoder, name, None)
        return isinstance(decoder, nn.Module) and find(decoder) is not None

    def _frames(self, arguments: dict[str, Any]) -> int:
        """Frames of one clip: two clips in one call of the decoder would be taken for one."""
        if CLIP_LENGTH in arguments:
            return arguments[CLIP_LENGTH]
        latents = next(iter(arguments.values()))
        return latents.shape[2]

    def _tell(self, asked: int | None, frames: int) -> None:
        if asked is not None and self.overridden is None:
            warnings.warn(
                f"fmecompile decodes all {frames} frames at once and does not use {CHUNK_SIZE}={asked}: "
                "the optimized decoder fits, and sees the whole clip",
                UserWarning,
                stacklevel=3,
            )
        self.overridden = asked

    def patch(self) -> None:
        vars(self._pipeline)[METHOD] = self

    def unpatch(self) -> None:
        if vars(self._pipeline).get(METHOD) is not self:
            return
        if self._was_absent:
            del vars(self._pipeline)[METHOD]
        else:
            vars(self._pipeline)[METHOD] = self.__wrapped__

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeClip:
        """The copied pipeline's own."""
        twin = object.__new__(WholeClip)
        twin.__wrapped__ = copy.deepcopy(self.__wrapped__, memo)
        twin._pipeline = memo.get(id(self._pipeline), self._pipeline)
        twin._was_absent = self._was_absent
        twin._path = self._path
        twin.overridden = twin.refused = None
        return twin


def can_decode_whole(pipeline: Any) -> bool:
    """Whether ``pipeline`` decodes by a method that takes a chunk size."""
    method = getattr(pipeline, METHOD, None)
    return callable(method) and CHUNK_SIZE in inspect.signature(method).parameters


def find_whole_clip(pipeline: Any) -> WholeClip | None:
    held = getattr(pipeline, "__dict__", {}).get(METHOD)
    return held if isinstance(held, WholeClip) else None
