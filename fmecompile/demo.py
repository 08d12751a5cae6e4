"""``fmecompile demo``: real architectures with seeded weights, eager beside optimized, in one table and one page."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import fmecompile
from fmecompile.report import Curve, Exhibit, Mark, bytes_text, write_demo
from fmecompile.runtime.dispatch import Dispatcher

Inputs = tuple[torch.Tensor, ...]

PAIRS_LIMIT_S = 60
"""No pair of calls is begun after this much timing of a model, so that the demo ends in minutes on a slow machine."""


class Say(Protocol):
    """Shows what happens now. ``live`` is False where the compiler shows a progress line of its own."""

    def __call__(self, text: str, *, live: bool = True) -> None: ...


@dataclass(frozen=True)
class Subject:
    """A model of the demo, and the call it is measured with."""

    name: str
    about: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


@dataclass(frozen=True)
class DemoRow:
    """What was measured of one model. Bytes are activations; errors are relative L2 norms against float64.

    ``eager_s`` and ``optimized_s`` are medians of ``pairs`` interleaved calls, ``time_ratio`` the median of the pairs'
    ratios. ``compile_s`` is what the first optimized call took beyond a later one. ``overhead_s`` is a call whose
    program does nothing: signature, fingerprint and dispatch. ``spread`` is the standard deviation of the eager output,
    ``guidance_gap`` the relative difference of its two guidance halves: both zero if the weights hid what is computed.
    """

    model: str
    about: str
    parameters: int
    eager_bytes: int
    projected_bytes: int
    measured_bytes: int
    pairs: int
    eager_s: float
    optimized_s: float
    time_ratio: float
    eager_error: float
    optimized_error: float
    groups: int
    trips: int
    compile_s: float
    overhead_s: float
    spread: float
    guidance_gap: float
    phases_s: dict[str, float]

    @property
    def memory_ratio(self) -> float:
        """Eager's measured peak over the optimized one."""
        return self.eager_bytes / self.measured_bytes

    @property
    def overhead_share(self) -> float:
        """The wrapper's part of an optimized call."""
        return self.overhead_s / self.optimized_s

    def broken_promises(self) -> list[str]:
        """What this row shows to be false, in words."""
        measured, projected = bytes_text(self.measured_bytes), bytes_text(self.projected_bytes)
        errors = f"{self.optimized_error:.2e} optimized, {self.eager_error:.2e} eager"
        promises = [
            (self.measured_bytes <= self.projected_bytes, f"measured {measured} is above projected {projected}"),
            (
                self.projected_bytes <= 1.02 * self.measured_bytes,
                f"projected {projected}, measured {measured}: 2 % off",
            ),
            (self.measured_bytes < self.eager_bytes, f"measured {measured} is no less than eager"),
            (self.optimized_error <= 1.5 * self.eager_error, f"error against float64: {errors}: more than 1.5 times"),
            (self.overhead_share < 0.01, f"the wrapper takes {self.overhead_share:.2%} of a call: 1 % or more"),
            (self.spread > 1e-3, f"the output is constant (spread {self.spread:.1e}): errors would say nothing"),
            (self.guidance_gap > 1e-3, f"both guidance halves are equal ({self.guidance_gap:.1e}): no context is seen"),
        ]
        return [f"{self.model}: {text}" for holds, text in promises if not holds]


def svd(**config: Any) -> nn.Module:
    """Stable Video Diffusion's UNet; its real configuration is the default one."""
    from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(**config)


def animatediff(**config: Any) -> nn.Module:
    """AnimateDiff's UNet at Stable Diffusion 1.5's size, without a motion module in the middle."""
    from diffusers.models.unets.unet_motion_model import UNetMotionModel

    return UNetMotionModel(**{"cross_attention_dim": 768, "use_motion_mid_block": False} | config)


def svd_inputs(frames: int, height: int, width: int, context: int = 1024) -> Inputs:
    """Latents (2, T, 8, h, w), a timestep, image embeddings (2, 1, C), added time ids (2, 3).

    As in guidance: the halves share the noise; the unconditional one has neither an image nor its embedding.
    """
    noise, image = torch.randn(2, 1, frames, 4, height, width).unbind()
    latents = torch.cat([torch.cat([noise, torch.zeros_like(image)], 2), torch.cat([noise, image], 2)])
    embedding = torch.cat([torch.zeros(1, 1, context), torch.randn(1, 1, context)])
    return latents, torch.tensor(1.6377), embedding, torch.tensor([[6.0, 127.0, 0.02]] * 2)


def animatediff_inputs(frames: int, height: int, width: int, context: int = 768) -> Inputs:
    """Latents (2, 4, T, h, w) that both guidance halves share, a timestep, and two texts, one a frame (2 T, 77, C)."""
    latents = torch.randn(1, 4, frames, height, width).repeat(2, 1, 1, 1, 1)
    return latents, torch.tensor(500), torch.randn(2, 77, context).repeat_interleave(frames, 0)


FULL = (
    Subject("SVD", "4 frames of 128x192, guidance batch 2", svd, lambda: svd_inputs(4, 16, 24)),
    Subject("AnimateDiff", "4 frames of 128x192, guidance batch 2", animatediff, lambda: animatediff_inputs(4, 16, 24)),
)

_SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
QUICK = (
    Subject(
        "small SVD",
        "3 frames of 256x384, guidance batch 2",
        lambda: svd(
            **_SMALL,
            num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        lambda: svd_inputs(3, 32, 48, 32),
    ),
    Subject(
        "small AnimateDiff",
        "3 frames of 256x384, guidance batch 2",
        lambda: animatediff(
            **_SMALL,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
            norm_num_groups=8,
        ),
        lambda: animatediff_inputs(3, 32, 48, 32),
    ),
)


class Phases:
    """Tells what happens now and keeps how long each phase took, in seconds."""

    def __init__(self, subject: str, say: Say) -> None:
        self._subject, self._say = subject, say
        self._starts: list[tuple[str, float]] = []

    def begin(self, phase: str, *, live: bool = True) -> None:
        self._starts.append((phase, time.perf_counter()))
        self._say(f"{self._subject}: {phase}", live=live)

    def seconds(self) -> dict[str, float]:
        """Every phase begun so far; the latest ends now."""
        ends = [*self._starts, ("", time.perf_counter())]
        return {phase: round(end - start, 3) for (phase, start), (_, end) in pairwise(ends)}


@torch.no_grad()
def measure_subject(subject: Subject, pairs: int, say: Say) -> tuple[DemoRow, list[Curve]]:
    """Build one model, measure it eager and optimized, interleaved, and compare both with float64.

    The row, and both memory timelines.
    """
    phases = Phases(subject.name, say)
    phases.begin("building with seeded weights")
    torch.manual_seed(0)
    module, inputs = subject.build().eval().requires_grad_(False), subject.inputs()
    eager_forward = module.forward
    phases.begin("measuring eager")
    eager = fmecompile.measure(module, *inputs)
    phases.begin("capturing, planning, rewriting, first call", live=False)
    fmecompile.optimize(module, strict=True)
    first_call_s = seconds(module, inputs)
    phases.begin("measuring optimized")
    measured = fmecompile.measure(module, *inputs)
    phases.begin(f"timing {pairs} interleaved pairs")
    times = interleaved(eager_forward, module, inputs, pairs)
    plan = fmecompile.explain(module).records[-1].plan
    fmecompile.restore(module)
    overhead_s = wrapper_seconds(module, inputs)
    phases.begin("computing the float64 reference")
    exact = float64_output(module, inputs)
    optimized_s = statistics.median(ours for _, ours in times)
    row = DemoRow(
        model=subject.name,
        about=subject.about,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        eager_bytes=eager.peak_bytes,
        projected_bytes=plan.projected_peak_bytes,
        measured_bytes=measured.peak_bytes,
        pairs=len(times),
        eager_s=statistics.median(reference for reference, _ in times),
        optimized_s=optimized_s,
        time_ratio=statistics.median(ours / reference for reference, ours in times),
        eager_error=relative_error(eager.output.sample, exact),
        optimized_error=relative_error(measured.output.sample, exact),
        groups=len(plan.groups),
        trips=plan.trips,
        compile_s=max(first_call_s - optimized_s, 0.0),
        overhead_s=overhead_s,
        spread=eager.output.sample.std().item(),
        guidance_gap=relative_error(*eager.output.sample.double().unbind()),
        phases_s=phases.seconds(),
    )
    return row, [Curve("eager", "eager", eager.timeline), Curve("optimized", "ours", measured.timeline)]


def interleaved(
    eager: Callable[..., Any], ours: Callable[..., Any], inputs: Inputs, pairs: int
) -> list[tuple[float, float]]:
    """Seconds of ``pairs`` pairs of calls; on a slow machine of fewer, but 3 where so many were asked for."""
    times: list[tuple[float, float]] = []
    while len(times) < pairs and (len(times) < 3 or sum(map(sum, times)) < PAIRS_LIMIT_S):
        times.append((seconds(eager, inputs), seconds(ours, inputs)))
    return times


def seconds(function: Callable[..., Any], inputs: Inputs) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - start


def wrapper_seconds(module: nn.Module, inputs: Inputs) -> float:
    """What signature, fingerprint and look-up take: calls of a dispatcher whose program does nothing."""
    nothing: Any = lambda leaves: None  # noqa: E731
    dispatcher = Dispatcher(module, module.forward, lambda *_: (nothing, None))
    dispatcher(*inputs)
    return statistics.median(seconds(dispatcher, inputs) for _ in range(9))


def float64_output(module: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The output of ``module``, which is float64 afterwards. Layer by layer, so that no second copy is ever whole."""
    leaves = [layer for layer in module.modules() if not list(layer.children())]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(nn.Module.double, leaves))
    wide = (tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    return module.double()(*wide).sample


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 norm of the difference."""
    return ((output.double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def fastest_threads() -> int:
    """The thread count of torch, or 1 where other work keeps the cores busy.

    Threads that wait for one another then take several times as long. Takes two seconds; the sign must be clear, as one
    thread is slow on idle cores.
    """
    before = torch.get_num_threads()
    layer, rows = nn.Linear(640, 2560), torch.randn(192, 640)

    def burst(threads: int) -> float:
        torch.set_num_threads(threads)
        return seconds(lambda: [nn.functional.gelu(layer(rows)) for _ in range(20)], ())

    try:
        ratio = statistics.median(burst(before) / burst(1) for _ in range(9))
    finally:
        torch.set_num_threads(before)
    return before if ratio < 1.3 else 1


@dataclass(frozen=True)
class Demo:
    """What a demo found, and on what ``machine``."""

    rows: list[DemoRow]
    machine: dict[str, Any]

    @property
    def broken(self) -> list[str]:
        """Promises that broke, in words."""
        return [text for row in self.rows for text in row.broken_promises()]

    def to_json(self) -> str:
        return json.dumps({"machine": self.machine, "rows": [asdict(row) for row in self.rows]}, indent=1)


def run_demo(quick: bool, html: Path | None, say: Say) -> Demo:
    """Measure every subject, and write the page."""
    start, before = time.perf_counter(), torch.get_num_threads()
    try:
        torch.set_num_threads(fastest_threads())
        found = [measure_subject(subject, 2 if quick else 5, say) for subject in (QUICK if quick else FULL)]
        where = machine() | {"total_s": round(time.perf_counter() - start, 1)}
    finally:
        torch.set_num_threads(before)
    rows = [row for row, _ in found]
    if html is not None:
        write_demo("The same output in a fraction of the activation memory", in_words(where), exhibits(found), html)
    return Demo(rows, where)


def machine() -> dict[str, Any]:
    """What the figures were measured on. ``peak_rss`` is the most this process ever held, weights included."""
    import resource  # not there on Windows

    import diffusers

    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "peak_rss": bytes_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit),
    }


def in_words(where: dict[str, Any]) -> str:
    """The conditions of all figures, in a line."""
    return (
        "Activation bytes of one denoising call, float32, seeded weights; weights and inputs are apart. Errors are "
        "relative L2 norms against float64. "
        f"{where['cores']} {where['cpu']} cores, {where['threads']} threads, torch {where['torch']}, diffusers "
        f"{where['diffusers']}, Python {where['python']}. The demo took {where['total_s']:.0f} s and held "
        f"{where['peak_rss']} at most."
    )


def exhibits(found: Sequence[tuple[DemoRow, list[Curve]]]) -> list[Exhibit]:
    """The models as the page shows them."""
    return [
        Exhibit(row.model, row.about, facts(row), curves, [Mark("projected peak", row.projected_bytes)])
        for row, curves in found
    ]


def facts(row: DemoRow) -> list[tuple[str, str]]:
    """A row in words, for the page."""
    return [
        ("parameters", f"{row.parameters / 1e6:,.1f} million"),
        ("peak, eager", bytes_text(row.eager_bytes)),
        ("peak, projected", bytes_text(row.projected_bytes)),
        ("peak, measured", bytes_text(row.measured_bytes)),
        ("eager / measured", f"{row.memory_ratio:.2f}"),
        ("time of a call, eager", f"{row.eager_s:.2f} s"),
        ("time of a call, optimized", f"{row.optimized_s:.2f} s"),
        (f"time ratio, median of {row.pairs} pairs", f"{row.time_ratio:.2f}"),
        ("error, eager", f"{row.eager_error:.2e}"),
        ("error, optimized", f"{row.optimized_error:.2e}"),
        ("groups", str(row.groups)),
        ("chunk trips", str(row.trips)),
        ("compile time", f"{row.compile_s:.1f} s"),
        ("wrapper, of a call", f"{100 * row.overhead_share:.3f} %"),
    ]
