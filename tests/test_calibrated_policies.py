"""What is made of a calibration: policies, files and the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import fmecompile
from fmecompile.reuse import REUSE, Steps, to_bits
from fmecompile.reuse.calibration import Calibration, CalibrationKey, CutRecord, Trace
from fmecompile.reuse.step_rehash import full_steps_for

# ------------------------------------------------------------------------------------------------- policies made of it


def falling(count: int = 25, saved: float = 0.75, rate: float = 0.012) -> Calibration:
    """Similarities that fall with distance, faster late."""
    way = [step + 0.03 * step**2 for step in range(count)]
    matrix = tuple(tuple(1 - rate * abs(one - other) for other in way) for one in way)
    errors = tuple(tuple(0.05 * lag * (1 + (i > 15)) for i in range(count - lag)) for lag in (1, 2, 3))
    moved = (0.0, *(0.04 for _ in range(count - 1)))
    trace = Trace(matrix, errors, moved, (1.0, *(0.99 for _ in range(count - 1))))
    records = [
        CutRecord("last_up_temporal", "feature", ("up",), 2**20, saved, 0, (trace,)),
        CutRecord("block_stack", "residual", ("up",), 2**20, saved, 0, (trace, trace)),
        CutRecord("temporal_attention", "feature", ("a", "b"), 2**20, 0.1, 0, (trace,)),
        CutRecord("time_embedding", "feature", ("t",), 2**10, 0.0, 0, (trace,)),
    ]
    return Calibration(CalibrationKey("Model", "0" * 16, "Sampler", count, (1, 4, 3, 8, 8), "float32"), tuple(records))


@pytest.mark.parametrize("full_steps", [2, 7, 13, 25])
def test_step_rehash_has_the_full_steps_asked_for(full_steps: int) -> None:
    policy = fmecompile.StepRehash.from_calibration(falling(), full_steps=full_steps)
    assert to_bits(policy.plan(Steps(25))).count("1") == full_steps


@pytest.mark.parametrize("speedup", [1.0, 1.2, 1.8, 2.5, 3.0])
def test_step_rehash_meets_a_speedup_with_the_most_full_steps(speedup: float) -> None:
    def reached(full: int) -> float:
        return 25 / (full + (25 - full) * 0.25)

    full = full_steps_for(speedup, 25, 0.75)
    assert reached(full) >= speedup - 1e-9 and (full == 25 or reached(full + 1) < speedup)
    plan = fmecompile.StepRehash.from_calibration(falling(), speedup=speedup).plan(Steps(25))
    assert reached(to_bits(plan).count("1")) >= speedup - 1e-9


@pytest.mark.parametrize("max_error", [0.0, 0.03, 0.1, 2.0])
def test_step_rehash_stays_within_an_error(max_error: float) -> None:
    calibration = falling()
    plan = fmecompile.StepRehash.from_calibration(calibration, max_error=max_error).plan(Steps(25))
    matrix, anchor, errors = calibration.similarity("last_up_temporal"), 0, [0.0]
    for step, decision in enumerate(plan):
        anchor = anchor if decision == REUSE else step
        errors.append(1 - matrix[step][anchor])
    assert max(errors) <= max_error + 1e-9
    assert (to_bits(plan).count("1") == 25) == (max_error == 0)


def test_a_speedup_out_of_reach_is_refused_with_the_best() -> None:
    with pytest.raises(fmecompile.OptionError, match=r"speedup=4 is out of reach.* it is 3\.23"):
        fmecompile.StepRehash.from_calibration(falling(), speedup=4)


def test_exactly_one_option_decides() -> None:
    for options in ({}, {"full_steps": 3, "speedup": 2.0}):
        with pytest.raises(fmecompile.OptionError, match="decides"):
            fmecompile.StepRehash.from_calibration(falling(), **options)


def test_other_policies_take_their_rows() -> None:
    calibration = falling()
    smooth = fmecompile.SmoothCache.from_calibration(calibration, alpha=0.1)
    assert set(smooth.errors) == {"temporal_attention"}
    assert to_bits(smooth.plan(Steps(25)), "temporal_attention") == "1001001001001001001010101"
    mag = fmecompile.MagCache.from_calibration(calibration, threshold=0.05)
    assert mag.ratios == calibration.record("block_stack", "residual").trace.ratios
    assert to_bits(mag.plan(Steps(25))) == "1111100100100100100100100"
    tea = fmecompile.TeaCache.from_calibration(calibration, threshold=0.1)
    assert tea.kind == "static" and to_bits(tea.plan(Steps(25))) == "1" + "001" * 7 + "001"


@pytest.mark.parametrize(
    "made",
    [
        lambda c: fmecompile.StepRehash.from_calibration(c, full_steps=3, cut="mid_block"),
        lambda c: fmecompile.SmoothCache.from_calibration(c, alpha=0.1, components=["mid_block"]),
        lambda c: fmecompile.MagCache.from_calibration(c, cut="mid_block"),
        lambda c: fmecompile.TeaCache.from_calibration(c, threshold=0.1, indicator="mid_block"),
    ],
)
def test_a_cut_that_was_not_calibrated_is_refused(made: Callable[[Calibration], Any]) -> None:
    with pytest.raises(fmecompile.OptionError, match=r"mid_block was recorded\n  next: name one of last_up_temporal"):
        made(falling())


@pytest.mark.parametrize(
    "policy",
    [
        fmecompile.StepRehash.from_calibration(falling(), full_steps=13),
        fmecompile.SmoothCache.from_calibration(falling(), alpha=0.1),
        fmecompile.MagCache.from_calibration(falling()),
        fmecompile.TeaCache.from_calibration(falling(), threshold=0.1),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_another_number_of_steps_is_refused(policy: Any) -> None:
    assert len(policy.plan(Steps(25))) == 25
    with pytest.raises(fmecompile.CalibrationMismatch, match="is of 25 steps, the run has 30"):
        policy.plan(Steps(30))


# ------------------------------------------------------------------------------------------------------- files and page


def test_a_file_brings_back_the_same(tmp_path: Path) -> None:
    calibration = falling(5)
    calibration.save(tmp_path / "found.json")
    again = Calibration.load(tmp_path / "found.json")
    assert again == calibration
    assert again.key.differences(calibration.key) == ()
    other = dataclasses.replace(calibration.key, steps=9, sampler="DDIMScheduler")
    assert calibration.key.differences(other) == ("steps: 5, not 9",)
    assert again.similarity("time_embedding", branch=0) == calibration.similarity("time_embedding")


def damaged(path: tuple[Any, ...], value: Any) -> str:
    data = json.loads(falling(5).to_json())
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(data)


TRACE = ("records", 0, "branches", 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\x00",
        damaged(("format",), 99),
        damaged(("key",), ...),
        damaged(("key", "steps"), "5"),
        damaged(("key", "steps"), 6),
        damaged(("key", "model"), None),
        damaged(("key", "shape"), 3),
        damaged(("more",), 1),
        damaged(("records",), None),
        damaged(("records", 0, "mode"), "forecast"),
        damaged(("records", 0, "branches"), []),
        damaged(("records", 0, "saved"), 1.5),
        damaged((*TRACE, "similarity"), [[1.0]]),
        damaged((*TRACE, "similarity", 2, 3), 1.5),
        damaged((*TRACE, "similarity", 2, 3), "x"),
        damaged((*TRACE, "errors", 1), [0.1]),
        damaged((*TRACE, "moved"), None),
        damaged((*TRACE, "ratios", 1), float("nan")),
    ],
)
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(fmecompile.CalibrationMismatch, match=r"(?s)calibration.*bad\.json.*next: make it again"):
        Calibration.load(tmp_path / "bad.json")


def test_the_page_has_a_cell_for_every_pair(tmp_path: Path) -> None:
    calibration = falling(5)
    hostile = dataclasses.replace(calibration.records[0], cut="</svg><script>alert(1)</script>")
    shown = dataclasses.replace(calibration, records=(*calibration.records, hostile))
    shown.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    cells = [e for e in ElementTree.fromstring(page).iter() if e.get("class") == "cell"]
    assert len(cells) == len(shown.records) * 5**2
    assert all(0.04 <= float(cell.get("fill-opacity", "0")) <= 1 for cell in cells)
    assert f"steps 0 and 1: {calibration.records[0].trace.similarity[0][1]:.4f}" in page
    assert "<script" not in page and "http" not in page
