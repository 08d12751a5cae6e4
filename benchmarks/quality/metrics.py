"""How far one clip is from another: PSNR, SSIM, a perceptual distance, flicker.

All take clips (B, T, H, W) of pixels from -1 to 1, cut off beyond, and give one figure a clip, (B,).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

RANGE = 2.0
"""From the darkest to the brightest pixel."""
WINDOW, SPREAD = 11, 1.5
SCALES, FEATURES = 3, 32


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, of the error over the whole clip; infinite where there is none."""
    error = (video.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().mean((1, 2, 3))
    return 10 * torch.log10(RANGE**2 / error)


def ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), 1 where equal: the paper's Gaussian window of 11 and constants, over
    the places where the window lies within the frame, mean over places and frames."""
    x, y = (v.clamp(-1, 1).double().flatten(0, 1)[:, None] for v in (video, reference))
    mean_x, mean_y = _windowed(x), _windowed(y)
    variances = _windowed(x * x) - mean_x**2 + _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return likeness.mean((1, 2, 3)).view(video.shape[:2]).mean(1)


def _windowed(images: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SPREAD**2))
    weights /= weights.sum()
    return F.conv2d(F.conv2d(images, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


def perceptual(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A distance between features, 0 where equal, at most 4.

    As LPIPS compares them: scaled to unit length at each place, squared difference, mean over places, frames and
    scales. But the features are not learned: they are rectified sums of a place's 5x5 pixels with fixed random weights
    of zero sum, at full, half and quarter size. So it sees edges and texture and no brightness, and its values
    are to be compared with one another only, and not with LPIPS.
    """
    x, y = (v.clamp(-1, 1).double().flatten(0, 1)[:, None] for v in (video, reference))
    found = torch.zeros(video.shape[0], dtype=torch.float64)
    for _ in range(SCALES):
        apart = (_features(x) - _features(y)).square().sum(1)
        found += apart.mean((1, 2)).view(video.shape[:2]).mean(1) / SCALES
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return found


def _features(images: torch.Tensor) -> torch.Tensor:
    """(N, FEATURES, h, w), of unit length where there is contrast; a flat place has none."""
    responses = F.conv2d(images, _filters(), padding=2).relu()
    return responses / (responses.square().sum(1, keepdim=True) + 0.1).sqrt()


@cache
def _filters() -> torch.Tensor:
    drawn = torch.randn(FEATURES, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn - drawn.mean((2, 3), keepdim=True)


def flicker(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The mean size of pixels' second differences over frames, relative to the reference's; 1 where equal, above 1
    where frames jump more than the reference's. Infinite (or not a number) where the reference moves evenly."""
    return _unsteadiness(video) / _unsteadiness(reference)


def _unsteadiness(video: torch.Tensor) -> torch.Tensor:
    return video.clamp(-1, 1).double().diff(n=2, dim=1).abs().mean((1, 2, 3))


METRICS = {"PSNR dB": psnr, "SSIM": ssim, "perceptual": perceptual, "flicker": flicker}


def compare(video: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """The mean of each over the clips."""
    return {name: float(metric(video, reference).mean()) for name, metric in METRICS.items()}
