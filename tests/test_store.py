"""As which and where values are kept between steps: what is stored, what it takes, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fmecompile
from fmecompile import reuse
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.reuse import FULL, REUSE
from fmecompile.runtime import host
from fmecompile.runtime import store as stores
from fmecompile.runtime.host import is_host
from fmecompile.runtime.measure import ROUNDING_BYTES
from fmecompile.runtime.store import Store
from tests import pipelines
from tests.models import animatediff_call, svd_call
from tests.test_reuse_pipelines import at_rest, kept_bytes, measured, unet_inputs
from tests.test_step_reuse import compiler, normalised, record, sampled, variant

pytestmark = pytest.mark.usefixtures("one_thread", "without_loops")

STEPS = 6


@pytest.fixture
def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMECOMPILE_MIN_TRIP_BYTES", str(2**30))


@pytest.fixture
def svd() -> Iterator[tuple[nn.Module, Any]]:
    model = pipelines.one_level_svd().double()
    yield model, svd_call(2, 3, 4, 4, torch.float64)
    fmecompile.restore(model)


# ----------------------------------------------------------------------------------------------------------- the store


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_differences_are_those_of_the_policy(order: int, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are taken a few rows at a time."""
    monkeypatch.setattr("fmecompile.runtime.store.PART", 12)
    store, want, computed = Store(order, on_host), (0.0,) * (order + 1), []
    for position in (0.0, 1.0, 3.0, 4.5):
        computed.append(position)
        scales = reuse.difference_scales(computed, order, "newton")
        want = reuse.renew(want, position**2, scales)
        store.renew("cut", torch.full((5, 6), position**2, dtype=torch.float64), scales)
        got = store.take("cut")
        assert len(got) == order + 1 and not any(map(is_host, got))
        assert all(torch.equal(d, torch.full_like(d, w)) for d, w in zip(got, want, strict=True))
        assert store.nbytes == (0 if on_host else 5 * 6 * 8 * (order + 1))
    store.halve()
    assert [tuple(d.shape) for d in store.take("cut")] == [(3, 6)] * (order + 1)
    assert store.nbytes == (0 if on_host else 3 * 6 * 8 * (order + 1))
    store.drop("cut")
    assert "cut" not in store and store.nbytes == 0


def test_differences_of_what_is_kept_in_few_bits() -> None:
    """Taken of what is stored, in more bits, and rounded; beyond the range is the largest number."""
    first, second = torch.rand(7, 9) + 1, torch.rand(7, 9) + 2
    store = Store(order=1)
    store.renew("cut", first.to(torch.float8_e4m3fn))
    store.renew("cut", second.to(torch.float8_e4m3fn), (0.3,))
    _, difference = store.take("cut")
    exact = (second.to(torch.float8_e4m3fn).float() - first.to(torch.float8_e4m3fn).float()) * 0.3
    assert difference.dtype == torch.float8_e4m3fn and torch.equal(difference, exact.to(torch.float8_e4m3fn))
    store = Store(order=1)
    store.renew("cut", first.half())
    store.renew("cut", second.half(), (1e6,))
    assert store.take("cut")[1].isfinite().all() and store.take("cut")[1].max() == 65504


@pytest.mark.parametrize("store", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("order", [0, 1])
def test_the_graph_converts(store: torch.dtype, order: int) -> None:
    """Last and first; what is beyond the range is kept as the largest number."""

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x).tanh()

    x = torch.tensor([[0.1, 0.7, 1e3, 1e30]], dtype=torch.float64)
    model = Square()
    compilation = normalised(model, (x,))
    square = next(n.name for n in compilation.program.graph.nodes if "mul" in str(n.target))
    cuts = (Cut("cut", square, "cut", store=store),)
    result, kept = variant(compilation, model, StepReuse(cuts)).run([x])
    most = torch.finfo(store).max
    assert kept["cut"].dtype == store and torch.equal(kept["cut"], (x * x).clamp(-most, most).to(store))
    assert kept["cut"].untyped_storage().nbytes() == x.numel() * store.itemsize
    shallow = variant(compilation, model, StepReuse(cuts, REUSE, order))
    held = {("cut", k): kept["cut"] for k in range(order + 1)}
    again, _ = shallow.run([x], held, {("cut", 1): torch.tensor(-0.5, dtype=torch.float64)})
    value = kept["cut"].double() * (0.5 if order else 1)
    assert torch.equal(again, value.tanh()) and torch.equal(result, (x * x).tanh())


# -------------------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    ("store", "mode"),
    [
        (torch.float16, "feature"),
        ("float8_e4m3fn", "forecast"),
        ("host", "forecast"),
        pytest.param("host", "residual", marks=pytest.mark.slow),
        pytest.param(None, "forecast", marks=pytest.mark.slow),
        pytest.param("float32", "residual", marks=pytest.mark.slow),
        pytest.param("bfloat16", "forecast", marks=pytest.mark.slow),
    ],
)
def test_live_bytes_are_planned_bytes(svd: tuple[nn.Module, Any], store: Any, mode: Any) -> None:
    model, inputs = svd
    sample, _, *rest = inputs
    policy = fmecompile.StepRehash(full_steps=3, mode=mode, order=2, store=store)
    waiting = {0, 1, 3} | ({2} if mode == "forecast" else set())  # steps 0, 3 and 5 are full
    with torch.no_grad():
        exact = sampled(model, inputs, STEPS)
        fmecompile.optimize(model, reuse=policy, strict=True)
        for k, t in enumerate(torch.linspace(900, 20, STEPS)):
            model(sample, t, *rest)
            kept = record(model)
            planned = (kept.kept_bytes if k in waiting else 0) + (kept.shared_bytes if k < STEPS - 1 else 0)
            assert compiler(model).timeline.kept_bytes() == planned
        rounded = sampled(model, inputs, STEPS)
    numel = sample.shape[0] * sample.shape[1] * 32 * 4 * 4  # of the hidden state
    itemsize = 8 if store in (None, "host") else getattr(torch, policy.store).itemsize
    stored = numel * itemsize * (3 if mode == "forecast" else 1)
    assert (kept.kept_bytes, kept.host_bytes) == ((0, stored) if store == "host" else (stored, 0))
    words = {None: "MiB kept,", "host": "MiB kept in host memory,"}.get(store, f"MiB kept as {policy.store},")
    assert words in str(fmecompile.explain(model))
    assert 0 < (rounded - exact).norm() < 0.3 * exact.norm()


POLICIES = {
    "feature": fmecompile.DeepCache(interval=2),
    "residual": fmecompile.StepRehash(full_steps=3, mode="residual"),
    "forecast": fmecompile.DeepCache(interval=2, mode="forecast", order=2),
    "probe": reuse.FirstBlockCache(threshold=0.3),
    "feedback": reuse.AdaCache(codebook=((0.3, 2), (1.0, 1))),
    "guidance": reuse.FasterCache(attention_after=2, guidance_after=2, guidance_every=4, low_until=9, high_from=0),
}


def stored(policy: Any, store: Any) -> Any:
    return dataclasses.replace(policy, store=store)


@pytest.mark.parametrize(
    "kind",
    ["probe", *(pytest.param(k, marks=pytest.mark.slow) for k in ("forecast", "guidance", "residual", "feedback"))],
)
def test_host_memory_changes_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frames; values went out and came back, and nothing stays."""
    model, inputs = pipelines.one_level_animatediff(), animatediff_call(2, 3, 8, 8, torch.float32)
    moved: list[str] = []
    waiting = set(host._host)

    def spied(move: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: (moved.append(move.__name__), move(*args))[1]

    for move in (host.to_host, host.to_device):
        monkeypatch.setattr(stores, move.__name__, spied(move))
    with torch.no_grad():
        fmecompile.optimize(model, reuse=POLICIES[kind], strict=True)
        want = sampled(model, inputs, STEPS)
        assert not moved
        fmecompile.optimize(model, reuse=stored(POLICIES[kind], "host"), strict=True)
        assert torch.equal(sampled(model, inputs, STEPS), want)
    assert set(moved) == {"to_host", "to_device"}
    taken = [told.decision for told in record(model).runs[-1]]
    assert FULL in taken and any(taken)
    assert compiler(model).timeline.kept_bytes() == 0
    assert set(host._host) <= waiting


@pytest.mark.parametrize("kind", [pytest.param("feature", marks=pytest.mark.slow), "forecast"])
@pytest.mark.parametrize("store", [torch.float16, "host"])
def test_what_is_stored_counts_in_a_budget(kind: str, store: Any) -> None:
    """At each step all that is held is within the budget; in host memory a full step holds nothing for later ones."""
    unet, inputs = pipelines.one_level_animatediff(), unet_inputs()
    policy = stored(POLICIES[kind], store)
    measured(fmecompile.optimize(unet, reuse=policy, strict=True), inputs)
    kept = record(unet)
    needed = kept.kept_bytes + kept.host_bytes
    floor = max(plan.floor_bytes for plan in kept.plans.values())
    budget = at_rest(unet, inputs) + floor + needed + kept.shared_bytes + ROUNDING_BYTES
    fmecompile.optimize(unet, reuse=policy, strict=True, memory_budget=budget)
    measured(unet, inputs)
    steps = measured(unet, inputs)
    full, shallow = (record(unet).allowances[decision] for decision in (FULL, REUSE))
    one = needed // 3
    of_full = {("forecast", "host"): one, ("forecast", torch.float16): needed}.get((kind, store), 0)
    assert full.kept_bytes - kept.shared_bytes == of_full
    assert shallow.kept_bytes - kept.shared_bytes == needed
    for bit, peak_bytes, before in steps:
        allowance, plan = (full, record(unet).plans[FULL]) if bit == "1" else (shallow, record(unet).plans[REUSE])
        fetched = allowance.kept_bytes - kept.shared_bytes if store == "host" else 0
        assert peak_bytes - fetched <= plan.projected_peak_bytes <= plan.allowed_bytes == allowance.activation_bytes
        assert allowance.taken_bytes - fetched + peak_bytes <= budget
        assert before <= kept.shared_bytes + (0 if store == "host" else needed)
    fmecompile.restore(unet)


@pytest.mark.parametrize("store", ["host", "float16"])
@pytest.mark.parametrize("kind", [pytest.param("feature", marks=pytest.mark.slow), "forecast"])
def test_stored_values_are_never_looked_at(kind: str, store: str) -> None:
    """On fake tensors, which hold no numbers; also outside of their mode."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unet, inputs, timesteps = pipelines.one_level_animatediff(), unet_inputs(), torch.linspace(900, 20, STEPS)
        fmecompile.optimize(unet, reuse=stored(POLICIES[kind], store), strict=True)
    found = []
    for _ in range(2):
        for t in timesteps:
            found.append(fmecompile.measure(unet, timestep=t, **inputs).peak_bytes)
    kept = record(unet)
    assert {told.decision for told in kept.runs[-1]} == {FULL, REUSE}
    fetched = kept.host_bytes + ROUNDING_BYTES * 3
    assert max(found[1:]) <= max(plan.projected_peak_bytes for plan in kept.plans.values()) + fetched
    assert kept_bytes(unet) == 0


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_no_smaller_is_refused() -> None:
    model, inputs = pipelines.one_level_svd().half(), svd_call(1, 3, 4, 4, torch.float16)
    fmecompile.optimize(model, reuse=fmecompile.DeepCache(store=torch.bfloat16), strict=True)
    told = r"no smaller\n.*one of 'float8_e4m3fn', 'float8_e5m2', 'host', or None"
    with torch.no_grad(), pytest.raises(fmecompile.OptionError, match=told):
        sampled(model, inputs, 3)
