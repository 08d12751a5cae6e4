"""The report in a browser: it renders, without complaints, in time, with the numbers of the plan."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fmecompile
from fmecompile.analysis.cuts import CutValue
from fmecompile.backends.offer import NO_OFFER
from fmecompile.backends.reusing import ReuseRecord
from fmecompile.budget import Allowance
from fmecompile.explain import Explanation
from fmecompile.graph.outline import Outline, Row
from fmecompile.graph.plan import Plan
from fmecompile.pipeline import Record
from fmecompile.report import bytes_text
from fmecompile.report.peak import parts_of
from fmecompile.reuse.calibration import Calibration, CalibrationKey, CutRecord, Trace
from fmecompile.reuse.steps import FULL, REUSE
from fmecompile.runtime.reusing import Taken
from tests.browser import visit
from tests.test_report import FeedForward

MIB = 2**20
OPEN_ALL = """
const folded = () => [...document.querySelectorAll(".tree details:not([open])")];
const names = (kind) => [...document.querySelectorAll(`[data-graph=${kind}] .operator`)].map((line) => line.title);
const open = () => { for (const one of folded()) { one.open = true; one.dispatchEvent(new Event("toggle")); } };
for (let depth = 0; depth < 9 && folded().length; depth += 1) open();
const cells = (style) => [...document.querySelectorAll(style)].map((cell) => cell.textContent.trim());
seen.told = {
  before: names("before"), after: names("after"), loops: cells(".tree .loop > summary"), numbers: cells(".numbers dd"),
  parts: cells(".stack + .wide tbody td.number"), steps: cells(".steps .cells i.full").length,
  hollow: cells(".steps .cells i:not(.full)").length, maps: cells(".square rect.cell").length,
}
"""


@pytest.fixture(scope="module")
def module() -> FeedForward:
    torch.manual_seed(0)
    made = fmecompile.optimize(FeedForward().eval().requires_grad_(False), strict=True)
    made(torch.randn(8, 1024, 64))
    return made


@pytest.fixture(scope="module")
def explained(module: FeedForward) -> Explanation:
    found = fmecompile.explain(module)
    assert isinstance(found, Explanation)
    return found


def with_reuse(explained: Explanation) -> Explanation:
    """The same, as a policy would have left it: two steps of three computed everything."""
    plan = explained.records[0].plan
    value = CutValue("gelu", "down", MIB, 0.25, is_temporal=False)
    runs = deque([[Taken(0, FULL), Taken(1, REUSE, 0.5), Taken(2, FULL)]])
    reuse = ReuseRecord("Policy()", (value,), NO_OFFER, {FULL: plan, REUSE: plan}, {FULL: "", REUSE: "less"}, runs=runs)
    record = replace(explained.records[0], reuse=reuse, allowance=Allowance(90 * MIB, MIB, MIB, (("vae", MIB),), MIB))
    return replace(explained, records=(record,), refused=("it <branches>",))


def calibration() -> Calibration:
    rows = ((1.0, 0.9, 0.8), (0.9, 1.0, 0.9), (0.8, 0.9, 1.0))
    trace = Trace(rows, ((0.1, 0.1), (0.2,), ()), (0.0, 0.1, 0.1), (1.0, 1.0, 1.0))
    record = CutRecord("down", "feature", ("down",), MIB, 0.25, 0, (trace,))
    return Calibration(CalibrationKey("M", "0" * 16, "", 3, (1, 2), "float32"), (record,))


def test_the_page_opens_and_its_numbers_are_those_of_the_plan(
    module: FeedForward, explained: Explanation, tmp_path: Path
) -> None:
    page = tmp_path / "explained.html"
    measured = fmecompile.measure(module, torch.randn(8, 1024, 64))
    with_reuse(explained).to_html(page, measured=measured, calibration=calibration())
    seen = visit(page, OPEN_ALL)
    assert seen.errors == []
    plan, told = explained.records[0].plan, seen.told
    eager = fmecompile.measure(FeedForward().eval(), torch.randn(8, 1024, 64))
    for size in (eager.peak_bytes, plan.projected_peak_bytes, plan.allowed_bytes, plan.floor_bytes, plan.weight_bytes):
        assert bytes_text(size) in told["numbers"]
    for count in (len(plan.groups), plan.trips):
        assert str(count) in told["numbers"]
    assert told["before"] == [row.name for row in plan.before.rows]
    assert told["after"] == [row.name for row in plan.after.rows]
    for loop, group in zip(told["loops"], plan.groups, strict=True):
        assert f"{group.trips} trips" in loop and f"{len(group.operators)} operators" in loop
        assert f"{bytes_text(group.whole_bytes)} → {bytes_text(group.peak_bytes)}" in loop
    for part in parts_of(plan):
        assert bytes_text(part.nbytes) in told["parts"]
    assert (told["steps"], told["hollow"], told["maps"]) == (2, 1, 9)
    for text in ("Step cache", "Library workspaces", "Beside it: vae", "left by the budget", "it &lt;branches&gt;"):
        assert text in seen.dom
    assert measured.group_s.keys() == set(range(len(plan.groups))) and "Time, measured" in seen.dom


def test_a_large_plan_opens_in_time_and_on_a_narrow_screen(explained: Explanation, tmp_path: Path) -> None:
    """Within two seconds where nothing else runs: busy cores say little."""
    is_idle, page = os.getloadavg()[0] < 1, tmp_path / "large.html"
    large(explained.records[0].plan).to_html(page)
    assert page.stat().st_size < 1.5 * 10**6
    wide = visit(page)
    assert wide.errors == []
    assert wide.ready_ms < 2000 or not is_idle
    assert overflow(page, 360) <= 0


def overflow(page: Path, width: int) -> int:
    """By how many pixels a page is wider than a telephone. No window of the browser is as narrow, a frame is."""
    root = "document.documentElement"
    told = f"parent.postMessage({root}.scrollWidth - {root}.clientWidth, '*')"
    inner, outer = page.with_name("inner.html"), page.with_name("outer.html")
    script = f"<script>addEventListener('load', () => setTimeout(() => {told}, 200))</script></body>"
    inner.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    frame = f'<iframe src="inner.html" style="border:0;width:{width}px;height:900px"></iframe>'
    outer.write_text(f"<html><head></head><body>{frame}</body></html>", encoding="utf-8")
    found = visit(outer, "addEventListener('message', (event) => { seen.told = event.data; tell(); })").told
    assert isinstance(found, int)
    return found


def large(plan: Plan) -> Plan:
    """As many modules, operators and groups as SVD's UNet has."""
    modules = tuple(f"down_blocks.{k % 4}.attentions.{k % 3}.transformer_blocks.0.layer_{k}" for k in range(1300))
    rows = tuple(Row(f"operator_{k}", k % 40, k // 4 % 1300, k % 200, -1) for k in range(5500))
    results = tuple((f"f16 28x320x{k}x128", 2 * 28 * 320 * k * 128) for k in range(200))
    before = Outline(tuple(f"aten.operator_{k}.default" for k in range(40)), modules, results, rows)
    after = replace(before, rows=tuple(row._replace(group=k // 60) for k, row in enumerate(rows[:2700])))
    groups = tuple(plan.groups[0] for _ in range(45))
    return replace(plan, before=before, after=after, groups=groups, timeline=plan.timeline * 400)


def test_an_explanation_on_a_terminal(explained: Explanation) -> None:
    for width in (60, 160):
        console = Console(width=width, record=True, file=StringIO())
        console.print(with_reuse(explained))
        text = console.export_text()
        plan = explained.records[0].plan
        assert f"{bytes_text(plan.projected_peak_bytes)} projected" in text
        assert (bytes_text(plan.groups[0].whole_bytes) in text) == (width == 160)
        assert "refused: it <branches>" in text
        assert ("what could be done" in text) == (width == 160)
        assert max(map(len, text.splitlines())) <= width


def test_a_page_takes_measurements_and_calibrations_only(explained: Explanation, tmp_path: Path) -> None:
    for options in ({"measured": 1.0}, {"calibration": "calibration.json"}):
        with pytest.raises(fmecompile.OptionError, match="next: pass what fmecompile"):
            explained.to_html(tmp_path / "no.html", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert isinstance(explained.records[0], Record)
