"""Many threads in one optimized module, and in several, from the first call on."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
import torch
from torch import fx, nn

import fmecompile
from fmecompile.runtime.dispatch import find
from fmecompile.runtime.exclusion import EXCLUSION
from tests.soak.budget import share
from tests.soak.checks import compare
from tests.soak.failures import Failing
from tests.soak.test_calls import net

THREADS = 8
SHAPES = ((1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 6, 10))


def inputs(k: int) -> torch.Tensor:
    return torch.randn(SHAPES[k % len(SHAPES)], generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def together(work: Any) -> None:
    """``work(number of the thread)`` in all threads, which start at once; the first error of any is raised."""
    gate = threading.Barrier(THREADS)

    def one(number: int) -> None:
        gate.wait()
        with torch.no_grad():
            work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(one, number) for number in range(THREADS)]:
            done.result()


def test_a_call_while_another_thread_captures_is_not_traced() -> None:
    """Also at the moment when torch has begun and the module has not."""
    other, x = nn.Linear(2, 2), torch.ones(1, 2)
    found: list[torch.Tensor] = []

    class Meanwhile(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            caller = threading.Thread(target=lambda: found.append(other(x)))
            caller.start()
            caller.join()
            return y

    with EXCLUSION.capture():
        fx.Tracer().trace(Meanwhile())
    assert torch.equal(found[0], other(x))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [1, 3], ids=["one module", "three modules"])
def test_threads_get_what_one_would(count: int) -> None:
    """Of all signatures at once, with calls that fail between, and one thread that restores and optimizes again."""
    modules, plain = [fmecompile.optimize(net()) for _ in range(count)], net()
    with torch.no_grad():
        wanted = [plain(inputs(k), 3.0) for k in range(6)]

    def work(number: int) -> None:
        rng = Random(number)
        for _ in range(share(0.2, least=3)):
            k, module = rng.randrange(6), rng.choice(modules)
            if rng.random() < 0.1:
                _fail(rng, module, inputs(k))
            if number == 0 and rng.random() < 0.2:
                fmecompile.optimize(module)
            compare(module(inputs(k), 3.0), wanted[k], 1e-10)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together(work)
    for module in modules:
        dispatcher = find(module)
        assert dispatcher is not None and not dispatcher.refused
        fmecompile.restore(module)
        assert not fmecompile.is_optimized(module)


def _fail(rng: Random, module: nn.Module, x: torch.Tensor) -> None:
    try:
        with Failing(rng.randrange(60), torch.OutOfMemoryError):
            module(x, 3.0)
    except torch.OutOfMemoryError:
        pass


@pytest.mark.timeout(900)
def test_a_signature_is_compiled_once() -> None:
    """Whoever comes first compiles, the others wait for it."""
    module, plain = fmecompile.optimize(net()), net()
    x = inputs(0)
    with torch.no_grad():
        wanted = plain(x, 3.0)
    seen: list[Any] = []

    def work(number: int) -> None:
        compare(module(x, 3.0), wanted, 1e-10)
        dispatcher = find(module)
        assert dispatcher is not None
        seen.append(next(iter(dispatcher.records.values())))

    together(work)
    assert len({id(record) for record in seen}) == 1
