"""Options and paths of the tests."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# The import mode importlib adds no path; conformance.py and chains.py are shared by several test files.
sys.path.insert(0, str(Path(__file__).parent))

# Small models have small chunks: without this the search would find nothing worth a loop in them.
os.environ.setdefault("FMECOMPILE_MIN_TRIP_BYTES", "0")
os.environ.setdefault("FMECOMPILE_RATES", "assumed")

# Workers of one run share the cores.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

# Torch describes every tensor it traces to this logger while that has handlers. Pytest gives some to each logger that
# does not propagate; that makes captures twice as slow.
logging.getLogger("torch.__trace").propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ from what the passes do now")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for one another cost more than tiny operators."""
    with _threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """One leaves temporal convolutions to ATen's own kernel, whatever their size."""
    with _threads(2):
        yield
