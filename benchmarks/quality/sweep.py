"""The policies that are compared, at the same numbers of full steps.

DeepCache's uniform schedule reaches only some numbers, so those are the ones. Step Rehash has its keys from
similarities (``calibrated``) or evenly spread (``even``), and each mode. In these UNets, as in SVD's own, both methods
reuse the same value by default, and on 25 steps an even spread of 13, 9 or 7 keys is DeepCache's schedule: there,
calibrated schedules and other modes make the difference.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fmecompile
from benchmarks.quality.data import Clips
from benchmarks.quality.sample import sample
from fmecompile.reuse import Decision, StaticPolicy, Steps

MODES: dict[str, dict[str, Any]] = {
    "feature": {},
    "residual": {"mode": "residual"},
    "forecast 1": {"mode": "forecast", "order": 1},
    "forecast 2": {"mode": "forecast", "order": 2},
}
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Entry:
    """A policy under a name, and what it decides for each step."""

    name: str
    policy: StaticPolicy
    plan: tuple[Decision, ...]

    @classmethod
    def of(cls, name: str, policy: StaticPolicy, steps: int) -> Entry:
        return cls(name, policy, policy.plan(Steps(steps)))

    @property
    def full(self) -> list[int]:
        """The steps that reuse nothing."""
        return [step for step, decision in enumerate(self.plan) if not decision]

    @property
    def key(self) -> Hashable:
        """Equal for entries that do the same."""
        policy = self.policy
        how = (policy.mode, *((policy.order, policy.form) if policy.mode == "forecast" else ()))
        return self.plan, how, tuple(policy.cuts.items())


def uniform(steps: int) -> dict[int, int]:
    """The numbers of full steps that DeepCache reaches with less than ``steps``, and the interval of each."""
    found: dict[int, int] = {}
    for interval in range(2, steps):
        found.setdefault(-(-steps // interval), interval)
    return found


def entries(steps: int, counts: Iterable[int], similarity: Matrix | None) -> Iterator[Entry]:
    """What is compared at each of ``counts`` full steps. Without similarities there is no calibrated Step Rehash."""
    reached = uniform(steps)
    for count in counts:
        if count in reached:
            yield Entry.of("DeepCache", fmecompile.DeepCache(interval=reached[count]), steps)
        for mode, options in MODES.items():
            even = fmecompile.StepRehash(full_steps=count, **options)
            yield Entry.of(f"Step Rehash even, {mode}", even, steps)
            if similarity is not None:
                calibrated = fmecompile.StepRehash.from_similarity(similarity, full_steps=count, **options)
                yield Entry.of(f"Step Rehash calibrated, {mode}", calibrated, steps)
        seer = taylor_seer(steps, count)
        if seer is not None:
            yield seer


def others(steps: int) -> Iterator[Entry]:
    """Policies whose number of full steps cannot be chosen. Cross-attention is left alone: SVD's is over one key."""
    yield Entry.of("Pyramid Attention Broadcast", fmecompile.PyramidAttention(scale="progress", cross=None), steps)


def taylor_seer(steps: int, count: int) -> Entry | None:
    """TaylorSeer with the interval that gives ``count`` full steps after the three that are always full."""
    made = (Entry.of("TaylorSeer", fmecompile.TaylorSeer(interval=k, before=3), steps) for k in range(2, steps))
    return next((entry for entry in made if len(entry.full) == count), None)


def module_of_the_cut(model: str, unet: nn.Module, shown: Clips) -> str:
    """The path of the module whose result Step Rehash reuses in this UNet."""
    fmecompile.optimize(unet, reuse=fmecompile.StepRehash(full_steps=2), strict=True)
    try:
        sample(model, unet, shown, steps=2)
        reuse: Any = fmecompile.explain(unet).records[0].reuse
        return reuse.values[0].module
    finally:
        fmecompile.restore(unet)


def similarity(model: str, unet: nn.Module, module: str, shown: Clips, *, steps: int, seed: int) -> Matrix:
    """Cosines between the results of ``module`` at the steps of one run, steps x steps."""
    results: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, result: Any) -> None:
        found = result if isinstance(result, torch.Tensor) else result[0]
        results.append(found.detach().flatten().double())

    handle = unet.get_submodule(module).register_forward_hook(keep)
    try:
        sample(model, unet, shown, steps=steps, seed=seed)
    finally:
        handle.remove()
    return cosines(results)


def cosines(vectors: Sequence[torch.Tensor]) -> Matrix:
    """All pairs of them."""
    directions = torch.stack([vector / vector.norm() for vector in vectors])
    return tuple(tuple(row) for row in (directions @ directions.T).tolist())
