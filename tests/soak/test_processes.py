"""Two processes that share a folder of caches, and files that are cut short while they are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import fmecompile
from fmecompile.graph.plan import Plan
from fmecompile.runtime import rates
from tests.soak.budget import share
from tests.soak.test_calls import net

WRITER = """
import json, sys, threading
from dataclasses import asdict
from fmecompile.runtime import rates
path, name = rates.cache_folder() / "rates.json", sys.argv[1]
one = asdict(rates.Rates(1e9, 1e9, 1e9, 1e-6, 0.0))
def write(thread):
    for k in range(int(sys.argv[2])):
        rates._write(path, rates._read(path) | {f"{name} {thread} {k % 7} " + "x" * 3000: one})
        json.loads(path.read_text(encoding="utf-8"))  # never half a file
threads = [threading.Thread(target=write, args=(t,)) for t in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
"""

PLANNER = """
import sys, torch, fmecompile
from tests.soak.test_calls import net
plan = fmecompile.plan(net(), torch.zeros(2, 4, 8, 8, dtype=torch.float64), 3.0)
for _ in range(int(sys.argv[2])):
    plan.save(sys.argv[1])
    found = fmecompile.Plan.load(sys.argv[1])  # whole; the other's may have other seconds, by rates of its own
    assert found.eager_peak_bytes == plan.eager_peak_bytes
"""


def both(script: str, *arguments: str, folder: Path) -> None:
    """Two processes of ``script`` at once, with one folder of caches."""
    root = str(Path(__file__).parents[2])
    env = os.environ | {"FMECOMPILE_CACHE": str(folder), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    env.pop("FMECOMPILE_RATES", None)
    started = [
        subprocess.Popen([sys.executable, "-c", script, *(a.format(k) for a in arguments)], env=env, cwd=root,
                         stderr=subprocess.PIPE, text=True)
        for k in range(2)
    ]  # fmt: skip
    for process in started:
        said = process.communicate(timeout=800)[1]
        assert process.returncode == 0, said


@pytest.mark.timeout(900)
def test_processes_share_measured_rates(tmp_path: Path) -> None:
    both(WRITER, "{}", str(share(0.3, least=10)), folder=tmp_path)
    assert len(json.loads((tmp_path / "rates.json").read_text())) >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_measure_and_save_plans_at_once(tmp_path: Path) -> None:
    both(PLANNER, str(tmp_path / "plan.json"), str(share(0.3, least=10)), folder=tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.groups or plan.projected_peak_bytes
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "rates.json"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "nonsense", '{"cpu": 3}', '{"cpu": {"products_per_s": 0}}', "{" * 3000,
     *(json.dumps({"KEY": asdict(rates.Rates(1e9, 1e9, 1e9, 1e-6, 0.0)) | {"products_per_s": value}})
       for value in (0, -1.0, "fast", None, [1], float("nan")))],
)  # fmt: skip
def test_damaged_rates_are_measured_again(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates.Rates(1e9, 1e9, 1e9, 1e-6, 0.0, is_measured=True)
    monkeypatch.setenv("FMECOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "_measure", lambda device, dtype: found)
    device, dtype = torch.device("cpu"), torch.float64
    monkeypatch.setattr(rates.platform, "processor", lambda: "K")
    key = f"K x1, {dtype}, torch {torch.__version__}"
    path = tmp_path / "rates.json"
    path.write_text(text.replace("KEY", key))
    assert rates._measured.__wrapped__(device, dtype, 1) == found
    assert json.loads(path.read_text())[key]["products_per_s"] == 1e9


@pytest.mark.parametrize("what", ["plan", "calibration"])
def test_a_file_that_is_cut_short_leaves_the_one_before(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item: Any = fmecompile.plan(net(), torch.zeros(1, 4, 8, 8, dtype=torch.float64), 3.0)
    if what == "calibration":
        from tests.soak.test_resume import calibrated

        item = calibrated(net())
    path = tmp_path / "file.json"
    item.save(path)
    before = path.read_text()
    plain = Path.write_text

    def half(self: Path, text: str, **kwargs: Any) -> int:
        plain(self, text[: len(text) // 2], **kwargs)
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="disk is full"):
        item.save(path)
    assert path.read_text() == before
