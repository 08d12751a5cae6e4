"""Policies: golden decision vectors, guards, and what is refused before step 0.

The golden vectors were recorded from the released rules (MagCache's equals the diffusers hook's on random inputs).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmecompile import reuse
from fmecompile.errors import FmeError, OptionError
from fmecompile.reuse import (
    ALL,
    ATTENTION,
    FAST_30,
    FULL,
    REUSE,
    UNCOND,
    AdaCache,
    Broadcast,
    DBCache,
    DeepCache,
    FasterCache,
    FeedbackPolicy,
    FirstBlockCache,
    Guards,
    History,
    MagCache,
    Policy,
    ProbePolicy,
    PyramidAttention,
    SmoothCache,
    StaticPolicy,
    StepRehash,
    Steps,
    TaylorSeer,
    TeaCache,
    attention_weight,
    difference_scales,
    frequency_factors,
    gamma_for,
    guarded,
    keys,
    newton_coefficients,
    renew,
    taylor_coefficients,
    to_bits,
    variants,
)
from fmecompile.reuse.mag_cache import resample
from fmecompile.reuse.policy import STORES
from fmecompile.reuse.step_rehash import spread

COUNTS = (1, 2, 8, 25, 50)


def linear(count: int) -> Steps:
    """A run of a sampler with 1000 training steps."""
    return Steps(count, tuple(999.0 - 1000 / count * step for step in range(count)))


def run(policy: Policy, steps: Steps, change: Callable[[int, int], float] = lambda step, reference: 0.04) -> list:
    """All decisions of one generation. ``change(step, reference)`` plays the measurement."""
    if policy.kind == "static":
        assert isinstance(policy, StaticPolicy)
        return list(policy.plan(steps))
    assert steps.count is not None
    decisions: list = []
    if isinstance(policy, ProbePolicy):
        started, last_full = policy.start(steps), 0
        for step in range(steps.count):
            reference = last_full if policy.reference == "last_full" else step - 1
            decisions.append(started.decide(step, change(step, reference) if step else None))
            last_full = step if decisions[-1] == FULL else last_full
        return decisions
    assert isinstance(policy, FeedbackPolicy)
    paced, last_full = policy.start(steps), None
    for step in range(steps.count):
        decisions.append(paced.decide(step))
        if decisions[-1] == FULL:
            paced.observe(step, None if last_full is None else change(step, last_full), 0.3)
            last_full = step
    return decisions


# Golden decision vectors


def test_mag_cache_golden() -> None:
    ratios = pytest.importorskip("diffusers.hooks.mag_cache").FLUX_MAG_RATIOS.tolist()
    policy = MagCache(ratios=ratios, threshold=0.06, max_skip=3, retention=0.2)
    assert to_bits(policy.plan(Steps(28))) == "1111110101000100010001001011"


@pytest.mark.parametrize(
    ("policy", "bits"),
    [
        (TaylorSeer(interval=5, before=3), "1110100001000010000100001"),
        (TaylorSeer(interval=5, before=10), "1111111111010000100001000"),
        (TaylorSeer(interval=5, before=3, after=22), "1110100001000010000100111"),
        (DeepCache(interval=3), "1001001001001001001001001"),
        (DeepCache(interval=1), "1" * 25),
        (StepRehash(full_steps=13), "1010101010101010101010101"),
        (StepRehash(full_steps=1), "1" + "0" * 24),
        (StepRehash(full_steps=99), "1" * 25),
    ],
)
def test_schedules_golden(policy: StaticPolicy, bits: str) -> None:
    assert to_bits(policy.plan(Steps(25))) == bits


def test_faster_cache_golden() -> None:
    alone = FasterCache(guidance=False).plan(Steps(30))
    assert to_bits(alone, ATTENTION) == "111111101010101010101010101010"
    both = FasterCache().plan(Steps(30))
    assert to_bits(both, UNCOND) == "111111111110001000010000100001"
    # where both branches run again (c = 20 and 30) attention is computed
    assert to_bits(both, ATTENTION) == "111111101010101010111010101011"
    assert len(variants(both)) == 4


ROWS = {
    1: [0.3, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.1, 0.2, 0.3, 0.4],
    2: [0.5, 0.3, 0.2, 0.1, 0.08, 0.08, 0.12, 0.2, 0.4, 0.5],
    3: [0.7, 0.5, 0.3, 0.2, 0.14, 0.15, 0.2, 0.4, 0.6],
}


def test_smooth_cache_golden() -> None:
    policy = SmoothCache(
        alpha=0.15, errors={"attn": ROWS, "ff": ROWS, "calm": {lag: [0.0] * (12 - lag) for lag in ROWS}}
    )
    plan = policy.plan(Steps(12))
    assert to_bits(plan, "attn") == to_bits(plan, "ff") == "111010001111"
    assert to_bits(plan, "calm") == "100010001001"
    # two components that never part add no variant
    assert variants(plan) == (FULL, {"calm"}, {"attn", "ff", "calm"})


def test_ada_cache_golden() -> None:
    decisions = run(AdaCache(), Steps(30), lambda step, reference: 0.1)
    assert to_bits(decisions) == "110100100100100100100100100111"
    assert to_bits(run(AdaCache(codebook=FAST_30), Steps(30), lambda *_: 0.1)) == "110000100000100000100000100011"


def test_ada_cache_motion_by_hand() -> None:
    """Motion at the scale weighs 1 plus its slope; half of it hardly anything; outside the range of steps 1."""
    steps, book = Steps(30), ((0.05, 9), (0.11, 5), (0.3, 3), (9.0, 1))
    started = AdaCache(codebook=book, moreg=True, moreg_steps=(2, 26)).start(steps)
    started.decide(0)
    started.observe(0, None)
    started.decide(1)
    started.observe(1, 0.1, 0.385)  # weight 1, slope 0: 0.1 a step
    assert [started.decide(step) for step in range(2, 7)] == [REUSE] * 4 + [FULL]
    started.observe(6, 0.5, 0.385 / 2)  # weight 2**-8, slope 10 * (2**-8 - 1) / 5: 0.1 * 1.996
    assert [started.decide(step) for step in range(7, 10)] == [REUSE] * 2 + [FULL]


def test_step_rehash_golden() -> None:
    matrix = [[1 - 0.012 * abs(i - j) * (3 if i > 8 else 1) for j in range(12)] for i in range(12)]
    plan = StepRehash.from_similarity(matrix, threshold=0.95).plan(Steps(12))
    assert to_bits(plan) == "100001000101"
    assert keys(matrix, 0.95) == (0, 5, 9, 11)


def test_keys_end_with_the_last_step_and_equal_to_gamma_is_similar_enough() -> None:
    alike = [[0.5] * 6] * 6
    assert keys(alike, 0.5) == (0, 5) and keys(alike, 0.51) == (0, 1, 2, 3, 4, 5)
    assert keys([[1.0]], 0.5) == (0,)


def test_first_block_cache_compares_with_the_last_full_step() -> None:
    decisions = run(FirstBlockCache(threshold=0.05), Steps(9), lambda step, reference: 0.02 * (step - reference))
    assert to_bits(decisions) == "100100100"
    assert to_bits(run(FirstBlockCache(threshold=0.05), Steps(3), lambda *_: 0.05)) == "100"


def test_db_cache_gates() -> None:
    def bits(change: float = 0.02, **options: Any) -> str:
        return to_bits(run(DBCache(**{"warm_up_steps": 0, **options}), Steps(10), lambda *_: change))

    assert bits(warm_up_steps=None) == "1111111100"
    assert bits(warm_up_steps=6, warm_up_interval=2) == "1010100000"
    assert bits(0.08) == "1111111111" and bits(0.079) == "1000000000"
    assert bits(math.inf, threshold=1.5) == "1111111111" and bits(7.0, threshold=1) == "1000000000"
    assert bits(0.0, threshold=0) == "1111111111"
    assert bits(max_accumulated=0.05) == "1000111111"
    mask = (1, 0, 0, 1, 0, 0, 1, 0, 0, 1)
    assert bits(mask=mask) == "1001001001" and bits(0.5, mask=mask) == "1111111111"
    assert bits(0.5, mask=mask, mask_mode="static") == "1001001001"
    assert DBCache(mask=mask, mask_mode="static").plan(Steps(10)) == guarded(
        Guards(), Steps(10), [FULL if bit else REUSE for bit in mask]
    )
    started = DBCache(mask=mask, mask_mode="static").start(Steps(10))
    assert to_bits([started.decide(step, 0.5 if step else None) for step in range(10)]) == "1001001001"
    assert to_bits(run(DBCache(mask=mask), Steps(10))) == "1001001001"


def test_tea_cache_sums_changes_and_starts_anew() -> None:
    changes = [9.0, 0.04, 0.04, 0.04, 0.04, 0.2, 0.04, 0.04, 0.04]
    policy = TeaCache(threshold=0.1, indicator_changes=changes)  # pyright: ignore[reportArgumentType]
    assert policy.kind == "static" and to_bits(policy.plan(Steps(9))) == "100101001"
    probe = TeaCache(threshold=0.1)
    assert probe.kind == "probe" and to_bits(run(probe, Steps(9), lambda step, _: changes[step])) == "100101001"
    ret = TeaCache(threshold=0.1, guards=Guards(warm_up=5))
    assert to_bits(run(ret, Steps(9), lambda step, _: changes[step])) == "111111001"


def test_tea_cache_polynomial_has_the_highest_power_first_and_counts_from_zero() -> None:
    steps = Steps(8)
    assert (
        to_bits(run(TeaCache(threshold=0.1, coefficients_of_change=(1.0, 0.0, 0.0)), steps, lambda *_: 0.2))
        == "10010011"
    )
    negative = TeaCache(threshold=0.1, coefficients_of_change=(-1.0, 0.0))
    changes = [0.0, 5.0, -0.04, -0.04, -0.04, 5.0, 5.0, 5.0]
    assert to_bits(run(negative, steps, lambda step, _: changes[step])) == "10001001"


def test_pyramid_attention_window_and_pace() -> None:
    policy = PyramidAttention(spatial=Broadcast(2, (300, 800)), temporal=Broadcast(3, (300, 800)), cross=None)
    plan = policy.plan(Steps(10, tuple(range(1000, 0, -100))))
    # 800 and 300 are outside: the ends of a window do not belong to it
    assert to_bits(plan, "spatial") == "1110101111"
    assert to_bits(plan, "temporal") == "1111001111"
    assert dataclasses.replace(policy, scale="progress").plan(Steps(10)) == plan
    assert policy.cuts == {"spatial": "spatial_attention", "temporal": "temporal_attention"}


# Guards


def shifting(count: int) -> list[list[float]]:
    return [[math.cos(0.2 * abs(i - j) * (1 + i / count)) for j in range(count)] for i in range(count)]


def policies(count: int, guards: Guards) -> Iterator[Policy]:
    """Every policy, several ways, with options that reuse as much as they can."""
    rows = {lag: [0.01] * max(0, count - lag) for lag in (1, 2, 3)}
    varied = {lag: [0.01 * ((step * 7 + lag) % 23) for step in range(max(0, count - lag))] for lag in (1, 2, 3)}
    mask = tuple(int(step % 4 == 0) for step in range(count))
    yield StepRehash(full_steps=3, guards=guards)
    yield StepRehash.from_similarity(shifting(count), threshold=0.5, guards=guards)
    yield StepRehash.from_similarity(shifting(count), full_steps=5, guards=guards)
    yield DeepCache(interval=7, guards=guards)
    yield SmoothCache(alpha=0.1, errors={"attn": rows, "ff": varied}, guards=guards)
    yield FasterCache(guards=guards)
    yield FasterCache(guidance=False, mode="feature", guards=guards)
    yield AdaCache(codebook=FAST_30, guards=guards)
    yield AdaCache(moreg=True, guards=guards)
    yield TeaCache(threshold=0.3, guards=guards)
    yield TeaCache(threshold=0.3, indicator_changes=(0.05,) * count, guards=guards)
    yield FirstBlockCache(threshold=0.3, guards=guards)
    yield DBCache(threshold=0.3, warm_up_steps=2, guards=guards)
    yield DBCache(mask=mask, mask_mode="static", guards=guards)
    yield MagCache(ratios=(1.0, 0.99, 0.98, 1.0), threshold=0.5, max_skip=9, retention=0.0, guards=guards)
    yield TaylorSeer(interval=9, before=1, guards=guards)
    yield PyramidAttention(scale="progress", guards=guards)


def test_every_policy_that_is_exported_is_among_them() -> None:
    concrete = [value for value in vars(reuse).values() if isinstance(value, type) and issubclass(value, Policy)]
    assert {type(policy) for policy in policies(8, Guards())} == {
        policy for policy in concrete if not policy.__abstractmethods__
    }


@pytest.mark.parametrize("count", COUNTS)
def test_plans_have_a_decision_per_step_and_begin_full(count: int) -> None:
    for policy in policies(count, Guards()):
        decisions = run(policy, linear(count))
        assert len(decisions) == count and decisions[0] == FULL, policy
        assert all(decision <= {*policy.cuts, UNCOND} for decision in decisions), policy


def test_these_policies_do_reuse() -> None:
    """So that the guards below have something to hold back."""
    for policy in policies(25, Guards()):
        assert sum(decision != FULL for decision in run(policy, linear(25))) >= 3, policy


def longest(bits: str) -> int:
    return max(len(list(group)) if bit == "0" else 0 for bit, group in itertools.groupby(bits))


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from(COUNTS),
    guards=st.builds(
        Guards,
        warm_up=st.integers(1, 9),
        tail=st.integers(0, 9),
        max_consecutive=st.none() | st.integers(0, 4),
        max_total=st.none() | st.integers(0, 9),
    ),
    seed=st.integers(0, 99),
)
def test_guards_hold_for_every_policy(count: int, guards: Guards, seed: int) -> None:
    changes = random.Random(seed).choices([0.0, 0.02, 0.1, 0.4, math.nan, math.inf], k=count)
    for policy in policies(count, guards):
        decisions = run(policy, linear(count), lambda step, _: changes[step])
        ends = [*decisions[: guards.warm_up], *decisions[max(0, count - guards.tail) :]]
        assert set(ends) <= {FULL} and decisions[0] == FULL, policy
        for component in frozenset().union(*decisions):
            bits = to_bits(decisions, component)
            assert guards.max_consecutive is None or longest(bits) <= guards.max_consecutive, policy
            assert guards.max_total is None or bits.count("0") <= guards.max_total, policy


@given(
    count=st.integers(1, 60),
    guards=st.builds(Guards, max_consecutive=st.none() | st.integers(0, 3), max_total=st.none() | st.integers(0, 9)),
)
def test_kept_attention_of_one_branch_never_serves_two(count: int, guards: Guards) -> None:
    plan = FasterCache(guards=guards).plan(Steps(count))
    skipping = itertools.dropwhile(lambda decision: UNCOND not in decision, plan)
    assert all(UNCOND in decision for decision in skipping if ATTENTION in decision)


def test_a_guard_holds_back_no_more_than_it_must() -> None:
    wanted = [REUSE] * 12
    assert to_bits(guarded(Guards(), Steps(12), wanted)) == "100000000000"
    assert to_bits(guarded(Guards(warm_up=2, tail=3), Steps(12), wanted)) == "110000000111"
    assert to_bits(guarded(Guards(max_consecutive=2), Steps(12), wanted)) == "100100100100"
    assert to_bits(guarded(Guards(max_total=4), Steps(12), wanted)) == "100001111111"
    both = guarded(Guards(max_consecutive=1), Steps(4), [frozenset({"a", "b"}), frozenset("a"), frozenset("ab"), REUSE])
    assert both == (FULL, {"a"}, {"b"}, REUSE)


def test_a_step_past_the_declared_ones_is_full_and_an_unknown_end_is_none() -> None:
    history = History(Guards(), Steps(2))
    assert [history.admit(step, REUSE) for step in range(4)] == [FULL, REUSE, FULL, FULL]
    endless = FirstBlockCache(threshold=0.1).start(Steps())
    assert to_bits([endless.decide(step, 0.0 if step else None) for step in range(5)]) == "10000"


def test_a_forced_full_step_starts_an_error_anew() -> None:
    ratios = (1.0,) + (0.97,) * 24
    plain = MagCache(ratios=ratios, threshold=0.12, max_skip=9, retention=0.0)
    assert to_bits(plain.plan(Steps(9))) == "100100100"
    held = dataclasses.replace(plain, guards=Guards(warm_up=2))
    assert to_bits(held.plan(Steps(9))) == "110010010"


@pytest.mark.parametrize("policy", [TeaCache(threshold=9.0), FirstBlockCache(threshold=9.0), DBCache(warm_up_steps=0)])
@pytest.mark.parametrize("change", [None, math.nan, math.inf])
def test_an_unknown_change_is_a_full_step(policy: ProbePolicy, change: float | None) -> None:
    started = policy.start(Steps(9))
    decisions = [started.decide(step, change if step == 3 else 0.01) for step in range(6)]
    assert to_bits(decisions) == "100100"


@pytest.mark.parametrize(("change", "motion"), [(None, 0.3), (math.nan, 0.3), (0.01, None), (0.01, math.nan)])
def test_an_unknown_change_or_motion_makes_the_next_step_full(change: float | None, motion: float | None) -> None:
    started = AdaCache(moreg=True, moreg_steps=(2, 20)).start(Steps(20))
    started.decide(0)
    started.observe(0, None)
    started.decide(1)
    started.observe(1, 0.01, 0.3)
    assert to_bits([started.decide(step) for step in (2, 3)]) == "01"
    started.observe(3, change, motion)
    assert started.decide(4) == FULL


def test_steps_come_in_order() -> None:
    started = FirstBlockCache().start(Steps(9))
    started.decide(0, None)
    with pytest.raises(FmeError) as caught:
        started.decide(0, None)
    assert "new run" in caught.value.next_step


# Monotony and calibration


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(st.floats(0, 0.5), min_size=25, max_size=25), low=st.floats(0, 0.9), more=st.floats(0, 0.9))
def test_a_higher_threshold_computes_no_more(changes: list[float], low: float, more: float) -> None:
    falling = (1.0, *(1 - change for change in changes[1:]))
    makers: list[Callable[[float], Policy]] = [
        lambda threshold: FirstBlockCache(threshold=threshold),
        lambda threshold: TeaCache(threshold=threshold),
        lambda threshold: DBCache(threshold=threshold, warm_up_steps=0),
        lambda threshold: MagCache(ratios=falling, threshold=threshold),
    ]
    for make in makers:
        strict, loose = (run(make(value), Steps(25), lambda step, _: changes[step]) for value in (low, low + more))
        assert loose.count(FULL) <= strict.count(FULL), make(low)


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(2, 30),
    seed=st.integers(0, 10**6),
    rough=st.booleans(),
    share=st.floats(0, 1),
)
def test_gamma_hits_the_target_when_it_can(count: int, seed: int, rough: bool, share: float) -> None:
    """Also where similarity does not fall with distance, so that bisection alone would miss."""
    rng = random.Random(seed)
    times = list(itertools.accumulate(rng.uniform(0.01, 0.2) for _ in range(count)))
    matrix = [[rng.random() if rough else 1 - abs(s - t) for t in times] for s in times]
    reachable = {len(keys(matrix, gamma)) for gamma in [math.inf, *itertools.chain(*matrix)]}
    target = 2 + round(share * (count - 2))
    found = len(keys(matrix, gamma_for(matrix, target)))
    assert found == max(number for number in reachable if number <= target)
    assert (
        sum(decision == FULL for decision in StepRehash.from_similarity(matrix, full_steps=target).plan(Steps(count)))
        == found
    )
    if not rough:
        strict, loose = sorted(rng.uniform(-1, 1) for _ in range(2))
        assert len(keys(matrix, strict)) <= len(keys(matrix, loose))


@given(count=st.integers(1, 80), full_steps=st.integers(1, 80))
def test_even_spacing(count: int, full_steps: int) -> None:
    steps = spread(count, full_steps)
    assert len(set(steps)) == min(count, full_steps) and steps[0] == 0
    assert spread(8, 3) == (0, 4, 7)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert not gaps or (steps[-1] == count - 1 and max(gaps) - min(gaps) <= 1)


@given(values=st.lists(st.floats(0.1, 2), min_size=1, max_size=40), count=st.integers(1, 60))
def test_ratios_are_taken_from_the_nearest_step(values: list[float], count: int) -> None:
    taken = resample(values, count)
    assert len(taken) == count and taken[-1] == values[-1]
    assert resample(range(5), 9) == (0, 0, 1, 2, 2, 2, 3, 4, 4)  # halves go to even
    assert resample(values, len(values)) == tuple(values)


# Forecasts


@settings(deadline=None)
@given(
    coefficients=st.lists(st.integers(-5, 5), min_size=1, max_size=5),
    gaps=st.lists(st.sampled_from([1.0, 2.0, 0.5, 3.0]), min_size=4, max_size=8),
    distance=st.floats(0.25, 4),
)
def test_newton_is_exact_on_polynomials_of_its_degree(
    coefficients: list[int], gaps: list[float], distance: float
) -> None:
    order = len(coefficients) - 1

    def curve(x: float) -> float:
        return sum(c * x**power for power, c in enumerate(coefficients))

    computed: list[float] = []
    differences: tuple[float, ...] = (0.0,) * (order + 1)
    for position in itertools.accumulate(gaps, initial=0.0):
        computed.append(position)
        differences = renew(differences, curve(position), difference_scales(computed, order, "newton"))
    there = computed[-1] + distance
    forecast = sum(w * d for w, d in zip(newton_coefficients(there, computed, order), differences, strict=True))
    assert forecast == pytest.approx(curve(there), rel=1e-9, abs=1e-6)


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(-5, 5), st.floats(-4, 4))
def test_taylor_coefficients_are_exact_on_derivatives(a: int, b: int, c: int, distance: float) -> None:
    """f = a x^3 + b x^2 + c x at x = 2, from its derivatives there."""
    derivatives = (8 * a + 4 * b + 2 * c, 12 * a + 4 * b + c, 12 * a + 2 * b, 6 * a)
    forecast = sum(w * d for w, d in zip(taylor_coefficients(distance, 3), derivatives, strict=True))
    x = 2 + distance
    assert forecast == pytest.approx(a * x**3 + b * x**2 + c * x, abs=1e-9)


def forecast_by_taylor(points: list[tuple[float, float]], position: float) -> float:
    differences, computed = (0.0, 0.0, 0.0), []
    for at, value in points:
        computed.append(at)
        differences = renew(differences, value, difference_scales(computed, 2, "taylor"))
    weights = taylor_coefficients(position - computed[-1], 2)
    return sum(weight * difference for weight, difference in zip(weights, differences, strict=True))


def test_taylor_form_is_the_released_one() -> None:
    """Exact on a line at any spacing; on x^2 at 5, known to 4 by steps of 2, off by half an interval of slope."""
    assert forecast_by_taylor([(0, 3), (1, 5), (3, 9)], 4.5) == pytest.approx(12)
    assert forecast_by_taylor([(0, 0), (2, 4), (4, 16)], 5) == pytest.approx(23)


def test_early_forecasts_use_what_there_is() -> None:
    policy, steps = TaylorSeer(order=2, form="newton"), Steps(9)
    assert policy.difference_scales(steps, [0]) == (0.0, 0.0) and policy.coefficients(steps, 1, [0]) == (1.0, 0.0, 0.0)
    assert policy.difference_scales(steps, [0, 2]) == (0.5, 0.0)
    assert policy.coefficients(steps, 5, [0, 2, 3]) == (1.0, 2.0, 6.0)
    released = TaylorSeer(order=2)
    assert released.difference_scales(steps, [0, 2, 3]) == (1.0, 1.0)
    assert released.coefficients(steps, 5, [0, 2, 3]) == (1.0, 2.0, 2.0)
    assert DeepCache().coefficients(steps, 5, [0, 3]) == (1.0,) and DeepCache().difference_scales(steps, [0, 3]) == ()


def test_the_clock_measures_in_timesteps_or_sigmas() -> None:
    steps = Steps(4, (900.0, 500.0, 200.0, 100.0), (8.0, 4.0, 2.0, 1.0, 0.0))
    by_time = StepRehash(full_steps=2, mode="forecast", clock="timestep")
    assert by_time.coefficients(steps, 2, [0, 1]) == (1.0, -300.0)
    assert dataclasses.replace(by_time, clock="sigma").coefficients(steps, 2, [0, 1]) == (1.0, -2.0)
    assert by_time.difference_scales(steps, [0, 1]) == (-1 / 400,)


def test_faster_cache_weights() -> None:
    assert [attention_weight(c) for c in (7, 17, 27)] == pytest.approx([0, 0.45, 0.9])
    assert [frequency_factors(c) for c in (12, 20, 25, 26)] == [(1.15, 1.0), (1.15, 1.15), (1.15, 1.15), (1.0, 1.15)]
    policy, steps = FasterCache(), Steps(30)
    # A1 + w * (A1 - A0), where the kept difference is divided by its two steps
    assert policy.coefficients(steps, 17, [14, 16]) == pytest.approx((1.0, 2 * attention_weight(18)))
    assert policy.difference_scales(steps, [14, 16]) == (0.5,)
    assert policy.factors(steps, 24) == (1.15, 1.15) and policy.factors(steps, 25) == (1.0, 1.15)
    assert policy.coefficients(Steps(60), 33, [30, 32]) == pytest.approx((1.0, 2 * 0.9 * 20 / 40))
    assert FasterCache(mode="feature").coefficients(steps, 17, [14, 16]) == (1.0,)


# What a policy says of itself, and what is refused


def test_names_of_what_is_reused() -> None:
    assert StepRehash(full_steps=3).cuts == {ALL: "last_up_temporal"}
    assert DeepCache(branch=2).cuts == {ALL: "deep_feature:2"}
    assert DeepCache(cut="up_blocks.*").cuts == {ALL: "up_blocks.*"}
    assert DBCache(head_blocks=4, tail_blocks=1).cuts == {ALL: "block_stack:4:1"}
    assert SmoothCache(alpha=0.1, errors={"a": ROWS, "b": ROWS}, cut=("x", "y")).cuts == {"a": "x", "b": "y"}
    assert TeaCache.reference == "previous"
    assert FirstBlockCache.reference == DBCache.reference == AdaCache.reference == "last_full"
    assert FirstBlockCache().probe == "head_residual:1" and DBCache().probe == "head_residual:8"
    for policy in policies(25, Guards(warm_up=2)):
        line = policy.describe()
        assert "\n" not in line and line.startswith(type(policy).__name__) and "warm_up=2" in line and len(line) < 200


def test_what_is_needed_before_step_0() -> None:
    assert DeepCache().needs_steps and AdaCache().needs_steps
    assert not FirstBlockCache().needs_steps and FirstBlockCache(guards=Guards(tail=1)).needs_steps
    assert TeaCache(threshold=0.1).needs_steps and not TeaCache(threshold=0.1, guards=Guards()).needs_steps
    assert FasterCache().needs_guidance and not FasterCache(guidance=False).needs_guidance
    for policy in policies(25, Guards()):
        if policy.needs_steps:
            for ask in (lambda policy=policy: policy.check(Steps()), lambda policy=policy: run_unknown(policy)):
                with pytest.raises(OptionError) as caught:
                    ask()
                assert "fmecompile.generation(steps=" in caught.value.next_step
    FasterCache(guidance=False).check(Steps(9), has_guidance=False)
    FasterCache().check(Steps(9), has_guidance=None)


def test_timesteps_are_needed_by_those_alone_who_look_at_them() -> None:
    assert PyramidAttention().needs_times and not PyramidAttention(scale="progress").needs_times
    assert PyramidAttention(scale="progress", mode="forecast", clock="sigma").needs_times
    assert not DeepCache(clock="sigma").needs_times and DeepCache(mode="forecast", clock="sigma").needs_times


def test_a_store_is_told_by_its_name_or_its_dtype() -> None:
    assert DeepCache(store=torch.float16) == DeepCache(store="float16") != DeepCache()
    assert {DeepCache(store=name).store for name in STORES} == set(STORES)


def run_unknown(policy: Policy) -> Any:
    if policy.kind == "static":
        assert isinstance(policy, StaticPolicy)
        return policy.plan(Steps())
    assert isinstance(policy, ProbePolicy | FeedbackPolicy)
    return policy.start(Steps())


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Guards(warm_up=0), "warm_up"),
    (lambda: Guards(tail=-1), "tail"),
    (lambda: Guards(max_consecutive=True), "max_consecutive"),
    (lambda: Guards(max_total=1.5), "max_total"),  # pyright: ignore[reportArgumentType]
    (lambda: Steps(0), "count"),
    (lambda: Steps(3, (1.0, 2.0)), "timesteps"),
    (lambda: Steps(3, None, (1.0,) * 5), "sigmas"),
    (lambda: DeepCache(interval=0), "interval"),
    (lambda: DeepCache(branch=-1), "branch"),
    (lambda: DeepCache(cut=()), "cut"),
    (lambda: DeepCache(mode="fast"), "mode"),  # pyright: ignore[reportArgumentType]
    (lambda: DeepCache(order=0), "order"),
    (lambda: DeepCache(store="disk"), "store"),
    (lambda: DeepCache(store=16), "store"),
    (lambda: DeepCache(guards=3), "guards"),  # pyright: ignore[reportArgumentType]
    (lambda: DeepCache(mode="forecast", clock="sigma").plan(Steps(4)), "sigma"),
    (lambda: DeepCache(mode="forecast", clock="timestep").plan(Steps(3, (9, 9, 4))), "share"),
    (lambda: StepRehash(), "one of the two"),
    (lambda: StepRehash(full_steps=3, threshold=0.9), "one of the two"),
    (lambda: StepRehash(full_steps=0), "full_steps"),
    (lambda: StepRehash(threshold=0.9), "similarities"),
    (lambda: StepRehash.from_similarity([[1.0]], threshold=1.5), "threshold"),
    (lambda: StepRehash.from_similarity([[1.0, 2.0]], full_steps=1), "rows"),
    (lambda: StepRehash.from_similarity([[math.nan]], full_steps=1), "similarity"),
    (lambda: StepRehash.from_similarity(shifting(8), full_steps=1), "full_steps"),
    (lambda: StepRehash.from_similarity(shifting(8), full_steps=3).plan(Steps(9)), "8 steps"),
    (lambda: gamma_for(shifting(8), 9), "full_steps"),
    (lambda: SmoothCache(alpha=-1, errors={"a": ROWS}), "alpha"),
    (lambda: SmoothCache(alpha=0.1, errors={}), "errors"),
    (lambda: SmoothCache(alpha=0.1, errors={"a": {1: [0.1], 2: []}}), "lag 3"),
    (lambda: SmoothCache(alpha=0.1, errors={"a": {1: [0.1], 2: [0.1], 3: []}}), "lengths"),
    (lambda: SmoothCache(alpha=0.1, errors={"a": ROWS}).plan(Steps(11)), "12 steps"),
    (lambda: SmoothCache(alpha=0.1, errors={"a": ROWS}, cut="x"), "cut"),
    (lambda: FasterCache(attention=False, guidance=False), "nothing"),
    (lambda: FasterCache(attention_after=1), "attention_after"),
    (lambda: FasterCache(order=2), "order"),
    (lambda: FasterCache().check(Steps(30), has_guidance=False), "guidance is off"),
    (lambda: AdaCache(codebook=()), "codebook"),
    (lambda: AdaCache(codebook=((0.2, 2), (0.1, 3))), "codebook[1]"),
    (lambda: AdaCache(codebook=((0.2, 0),)), "codebook[0]"),
    (lambda: AdaCache(moreg_steps=(5, 5)), "moreg_steps"),
    (lambda: TeaCache(threshold=-0.1), "threshold"),
    (lambda: TeaCache(threshold=math.nan), "threshold"),
    (lambda: TeaCache(threshold=math.inf), "threshold"),
    (lambda: TeaCache(threshold=0.1, coefficients_of_change=()), "coefficients_of_change"),
    (lambda: TeaCache(threshold=0.1).plan(Steps(5)), "goes"),
    (lambda: TeaCache(threshold=0.1, indicator_changes=(0.1,)).plan(Steps(5)), "indicator_changes"),
    (lambda: FirstBlockCache(threshold=-1), "threshold"),
    (lambda: DBCache(head_blocks=0), "head_blocks"),
    (lambda: DBCache(mask_mode="static"), "mask"),
    (lambda: DBCache(mask=(1, 2)), "mask[1]"),
    (lambda: DBCache(mask=(1, 0)).start(Steps(3)), "mask"),
    (lambda: DBCache().plan(Steps(3)), "goes"),
    (lambda: MagCache(ratios=()), "ratios"),
    (lambda: MagCache(ratios=(1.0, -1.0)), "ratios[1]"),
    (lambda: MagCache(ratios=(1.0,), retention=1.1), "retention"),
    (lambda: TaylorSeer(interval=0), "interval"),
    (lambda: TaylorSeer(before=0), "before"),
    (lambda: Broadcast(0), "every"),
    (lambda: Broadcast(2, (800, 100)), "window"),
    (lambda: PyramidAttention(spatial=None, temporal=None, cross=None), "no attention"),
    (lambda: PyramidAttention(spatial=2), "spatial"),  # pyright: ignore[reportArgumentType]
    (lambda: PyramidAttention().plan(Steps(5)), "timesteps"),
    (lambda: PyramidAttention().plan(Steps(3, (1.6, 0.2, -1.5))), "never enter"),
]


@pytest.mark.parametrize(("make", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_work_is_refused_with_a_next_step(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert said in caught.value.fact and caught.value.next_step
