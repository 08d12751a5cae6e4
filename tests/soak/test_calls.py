"""Hundreds of calls with changing signatures, adapters on and off, and errors in the middle of everything."""

from __future__ import annotations

import gc
from collections.abc import Callable
from random import Random
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fmecompile
from fmecompile.runtime.dispatch import MAX_PROGRAMS, find
from tests.soak.budget import share
from tests.soak.checks import compare, quiet
from tests.soak.failures import ERRORS, Failing, failing_compiler, live_bytes

CALLS = share(0.5, least=12)


class Net(nn.Module):
    """A skip connection around a wide feed-forward, a norm over rows, and numbers made at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)
        self.wide, self.narrow = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, sample: torch.Tensor, timestep: Any = 0, scale: float | None = None) -> torch.Tensor:
        x = self.first(sample) + torch.arange(8, dtype=sample.dtype)[:, None, None] * timestep
        h = F.silu(self.norm(self.mixed(x)))
        rows = self.narrow(F.gelu(self.wide(h.flatten(2).transpose(1, 2))))
        x = x + rows.transpose(1, 2).reshape(x.shape) * (1.0 if scale is None else scale)
        return self.last(x)


def net() -> Any:
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


class Pair:
    """An optimized module, and its twin that nobody touched; adapters go into both."""

    def __init__(self, rng: Random, **options: Any) -> None:
        self.rng, self.fast, self.plain = rng, net(), net()
        self.adapters = 0
        fmecompile.optimize(self.fast, **options)

    def call(self, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (self.rng.choice((1, 2, 2, 3)), 4, *self.rng.choice(((8, 8), (8, 8), (6, 10), (5, 7), (1, 3))))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = x.to(memory_format=torch.channels_last) if self.rng.random() < 0.2 else x
        kwargs = {} if self.rng.random() < 0.6 else {"scale": self.rng.choice((None, 0.5, 2.0))}
        return (x, self.rng.choice((0, 1, 7.5, torch.tensor(3.0)))), kwargs

    def compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compare(self.fast(*args, **kwargs), self.plain(*args, **kwargs), 1e-10)

    def adapt(self) -> None:
        """A LoRA put in, scaled, switched, merged into the weights and taken out again."""
        way = self.rng.choice(("add", "scale", "off", "on", "merge", "unmerge", "unload", "weights"))
        rank, seed = self.rng.choice((1, 2, 4)), self.rng.randrange(1000)
        for module in (self.fast, self.plain):
            getattr(self, f"_{way}")(module, rank, seed)
        self.adapters += way == "add"

    def _add(self, module: nn.Module, rank: int, seed: int) -> None:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, target_modules=["wide", "mixed"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, module, f"a{self.adapters}")
        module.double().eval().requires_grad_(False)
        for layer in _layers(module):
            layer.set_adapter(f"a{self.adapters}")
        module.requires_grad_(False)

    def _scale(self, module: nn.Module, rank: int, seed: int) -> None:
        for layer in _layers(module):
            layer.scale_layer(1 + rank / 4)

    def _off(self, module: nn.Module, rank: int, seed: int) -> None:
        for layer in _layers(module):
            layer.enable_adapters(False)

    def _on(self, module: nn.Module, rank: int, seed: int) -> None:
        for layer in _layers(module):
            layer.enable_adapters(True)
        module.requires_grad_(False)

    def _merge(self, module: nn.Module, rank: int, seed: int) -> None:
        for layer in _layers(module):
            if not layer.merged:
                layer.merge()

    def _unmerge(self, module: nn.Module, rank: int, seed: int) -> None:
        for layer in _layers(module):
            if layer.merged:
                layer.unmerge()

    def _unload(self, module: Any, rank: int, seed: int) -> None:
        for name in ("wide", "mixed"):
            layer = getattr(module, name)
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                self._unmerge(module, rank, seed)
                setattr(module, name, layer.get_base_layer())

    def _weights(self, module: Any, rank: int, seed: int) -> None:
        module.last.weight.mul_(1.01)

    def fail(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call that is cut short, in its compilation or in the middle of what it computes; then all is as before."""
        is_known = self._is_known(args, kwargs)
        before = live_bytes()
        try:
            if is_known or self.rng.random() < 0.5:
                with Failing(self.rng.randrange(160), self.rng.choice(ERRORS)):
                    self.fast(*args, **kwargs)
            else:
                with failing_compiler(self.rng):
                    self.fast(*args, **kwargs)
        except BaseException as error:
            assert "injected" in str(error), error
        if is_known:
            assert live_bytes() == before, "a call that failed left something alive"

    def _is_known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Called before, so that it is compiled, and its constants are made; twice, as the first call may change the
        module: one that is off takes a merged adapter out."""
        if self.rng.random() < 0.3:
            return False
        self.compare(args, kwargs)
        self.compare(args, kwargs)
        return True


def _layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("calls", "options"),
    [(CALLS, {}), (max(CALLS // 5, 6), {"max_chunks": 3})],
    ids=["default", "few chunks"],
)
def test_calls_that_change_and_fail(calls: int, options: dict[str, Any]) -> None:
    start = live_bytes()
    pair = Pair(Random(7), **options)
    fails: list[Callable[..., None]] = [pair.fail, pair.compare, pair.compare]
    with quiet():
        for step in range(calls):
            try:
                if step % 9 == 5:
                    pair.adapt()
                args, kwargs = pair.call(step)
                pair.rng.choice(fails)(args, kwargs)
                pair.compare(args, kwargs)
            except BaseException as error:
                raise AssertionError(f"call {step}") from error
            dispatcher = find(pair.fast)
            assert dispatcher is not None and len(dispatcher.records) <= MAX_PROGRAMS
    fmecompile.restore(pair.fast)
    del pair, fails, dispatcher, args
    gc.collect()
    assert live_bytes() == start


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("store", [None, "host"])
def test_steps_that_reuse_and_fail(store: str | None) -> None:
    """Every step is called with the same, so that what is reused is what would be computed; also behind a step that
    failed while it was written. Nothing that was kept is left when a generation ends."""
    start, rng, module, plain = live_bytes(), Random(11), net(), net()
    fmecompile.optimize(module, reuse=fmecompile.DeepCache(interval=3, cut="auto", store=store))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with quiet():
        with fmecompile.generation(steps=6):
            wanted = [plain(x, 3.0), *(module(x, 3.0) for _ in range(6))][0]
        base = live_bytes()
        for _ in range(share(0.05, least=2)):
            with fmecompile.generation(steps=6):
                for _ in range(6):
                    _one_step(rng, module, x, wanted)
            assert live_bytes() == base
    fmecompile.restore(module)
    del module, plain, x, wanted
    assert live_bytes() == start


def _one_step(rng: Random, module: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> None:
    if rng.random() < 0.4:
        try:
            with Failing(rng.randrange(120), rng.choice(ERRORS)):
                module(x, 3.0)
        except BaseException as error:
            assert "injected" in str(error), error
    compare(module(x, 3.0), wanted, 1e-10)
