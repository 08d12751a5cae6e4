"""Random graphs over the rule table: eager's values in float64, no more bytes than projected, or a clear refusal."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.soak.budget import GRAPHS
from tests.soak.checks import check
from tests.soak.graphs import written

BLOCK = 50
"""Random graphs of one test; blocks run beside one another."""
DRAWN = max(GRAPHS // 10, 3)
"""Graphs that hypothesis draws, and makes as small as it can where one fails."""
LOOPS: list[int] = []


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny operators."""


def proven(rng: Random, number: int, checks: Random | None = None) -> None:
    """``rng`` writes the graph; ``checks``, by default the same, says how it is compiled."""
    torch.manual_seed(number)
    module = written(rng, number)
    try:
        outcomes = check(checks or rng, module)
    except Exception as error:
        error.add_note(f"python -m tests.soak {number}\n{module}")
        raise
    LOOPS.append(sum(outcome.loops for outcome in outcomes))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, GRAPHS, BLOCK))
def test_random_graphs(first: int) -> None:
    LOOPS.clear()
    for number in range(first, min(first + BLOCK, GRAPHS)):
        proven(Random(number), number)
    assert sum(LOOPS) >= len(LOOPS), "hardly any loop was taken: this proves nothing"


@pytest.mark.timeout(1800)
@seed(20240607)
@settings(
    max_examples=DRAWN,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_drawn_graphs(rng: Random, checks: int) -> None:
    """What is asked of a graph depends on what the process compiled before, so hypothesis draws it as a number."""
    proven(rng, 0, Random(checks))
