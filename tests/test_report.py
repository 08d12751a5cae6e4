"""The pages: their numbers, their markup, and what they do with hostile names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fmecompile
from fmecompile.graph.outline import EMPTY
from fmecompile.graph.plan import Barrier, Owner
from fmecompile.report import Curve, Exhibit, Mark, bytes_text, timeline, write_demo
from fmecompile.report.peak import parts_of

MIB = 2**20
HOSTILE = "</code></svg><script>alert('x')</script>&\"<b>"


class FeedForward(nn.Module):
    """Large enough between its layers to be worth a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 1024), nn.Linear(1024, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(scope="module")
def plan() -> fmecompile.Plan:
    with torch.no_grad():
        made = fmecompile.plan(FeedForward().eval(), torch.randn(8, 1024, 64))
    assert made.groups
    return made


def page_of(plan: fmecompile.Plan, folder: Path) -> str:
    plan.to_html(folder / "plan.html")
    return (folder / "plan.html").read_text(encoding="utf-8")


def parsed(page: str) -> ElementTree.Element:
    """Pages are written so that they are XML too: every element closed, every attribute quoted."""
    return ElementTree.fromstring(page)


def texts(page: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in parsed(page).iter()]


# A plan's page


def test_the_page_holds_the_numbers_of_the_plan(plan: fmecompile.Plan, tmp_path: Path) -> None:
    found = texts(page_of(plan, tmp_path))
    sizes = (plan.eager_peak_bytes, plan.allowed_bytes, plan.projected_peak_bytes, plan.floor_bytes, plan.weight_bytes)
    for value in (*map(bytes_text, sizes), bytes_text(plan.input_bytes), str(len(plan.groups)), str(plan.trips)):
        assert value in found
    for group in plan.groups:
        assert f"{bytes_text(group.whole_bytes)} → {bytes_text(group.peak_bytes)}" in found
        assert group.because in found
    for owner in plan.owners:
        assert owner.name in found
    for part in parts_of(plan):
        assert {part.name, bytes_text(part.nbytes), part.about, part.advice} <= set(found)


def test_the_page_draws_both_timelines(plan: fmecompile.Plan, tmp_path: Path) -> None:
    (drawing,) = parsed(page_of(plan, tmp_path)).iter("svg")
    lines = [path.get("class") for path in drawing.iter("path")]
    assert lines.count("line eager") == lines.count("line ours") == 1
    assert lines.count("mark") == 1


def test_the_page_needs_no_network(plan: fmecompile.Plan, tmp_path: Path) -> None:
    page = page_of(plan, tmp_path)
    assert not re.search(r"http|//|url\(|@import|<link|<img|src=|fetch|XMLHttp|import\(", page)


def test_the_page_carries_the_plan(plan: fmecompile.Plan, tmp_path: Path) -> None:
    (held,) = (e for e in parsed(page_of(plan, tmp_path)).iter("script") if e.get("type") == "application/json")
    assert fmecompile.Plan.from_json(str(held.text)) == plan


def test_the_parts_of_a_peak_add_up(plan: fmecompile.Plan) -> None:
    given = ("Weights", "Inputs")
    for shown in (plan, plan.beside(MIB), replace(plan, projected_peak_bytes=plan.projected_peak_bytes + 512)):
        parts = [part for part in parts_of(shown) if part.name not in given]
        assert sum(part.nbytes for part in parts) == shown.projected_peak_bytes
        assert all(part.nbytes > 0 and part.advice for part in parts)


def test_the_page_is_light_and_dark_and_fits_a_narrow_screen(plan: fmecompile.Plan, tmp_path: Path) -> None:
    page = page_of(plan, tmp_path)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    tables = list(parsed(page).iter("table"))
    scrolled = [table for box in parsed(page).iter("div") if box.get("class") == "wide" for table in box.iter("table")]
    assert tables and len(tables) == len(scrolled), "a wide table scrolls in its box, not the page"


def test_hostile_names_are_text(plan: fmecompile.Plan, tmp_path: Path) -> None:
    group = replace(plan.groups[0], modules=(HOSTILE,), because=HOSTILE)
    bad = replace(
        plan,
        key=replace(plan.key, signature=HOSTILE, graph=HOSTILE),
        groups=(group,),
        owners=(Owner(HOSTILE, MIB, "waiting", HOSTILE, HOSTILE),),
        barriers=(Barrier(HOSTILE, HOSTILE, 1, HOSTILE),),
    )
    page = page_of(bad, tmp_path)
    assert "<script>alert" not in page and "<b>" not in re.sub(r"<b>[\d.]+ .iB</b>", "", page)
    assert texts(page).count(HOSTILE) >= 6
    (held,) = (e for e in parsed(page).iter("script") if e.get("type") == "application/json")
    assert fmecompile.Plan.from_json(str(held.text)) == bad


def test_a_plan_with_nothing_in_it(plan: fmecompile.Plan, tmp_path: Path) -> None:
    bare = replace(
        plan,
        eager_peak_bytes=0,
        eager_timeline=(),
        timeline=(),
        groups=(),
        owners=(),
        barriers=(),
        projected_peak_bytes=0,
        before=EMPTY,
        after=EMPTY,
    )
    found = texts(page_of(bare, tmp_path))
    assert found.count("not measured") == 2
    assert any("no eager timeline" in text for text in found)
    assert "None: the module runs without chunk loops." in found


# Timelines


def figure(curves: list[Curve], marks: list[Mark] | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(timeline("memory", curves, marks or []))


def heights(drawing: ElementTree.Element, style: str) -> list[float]:
    """What a curve holds, as a share of the axis."""
    (line,) = (path for path in drawing.iter("path") if path.get("class") == f"line {style}")
    return [1 - float(y) / 400 for y in re.findall(r"V([\d.]+)", str(line.get("d")))]


def labels(drawing: ElementTree.Element) -> list[str]:
    (axis,) = (box for box in drawing.iter("div") if box.get("class") == "y-axis")
    return [str(label.text) for label in axis.iter("span")]


def test_curves_share_one_axis() -> None:
    drawing = figure([Curve("a", "eager", (0, 100 * MIB)), Curve("b", "ours", (25 * MIB, 50 * MIB))])
    assert heights(drawing, "eager") == [0.0, 1.0]
    assert heights(drawing, "ours") == [0.25, 0.5]
    assert labels(drawing) == ["0 MiB", "20 MiB", "40 MiB", "60 MiB", "80 MiB", "100 MiB"]


def test_a_mark_above_the_curves_raises_the_axis() -> None:
    drawing = figure([Curve("a", "eager", (MIB,))], [Mark("allowed", 10 * MIB)])
    assert labels(drawing)[-1] == "10 MiB"
    assert heights(drawing, "eager") == [pytest.approx(0.1)]


def test_no_peak_is_lost_when_a_timeline_is_thinned() -> None:
    values = [MIB] * 100_003
    values[77_777] = 7 * MIB
    drawn = heights(figure([Curve("a", "eager", values)]), "eager")
    assert 400 <= len(drawn) <= 800
    assert max(drawn) == pytest.approx(7 / 8, abs=1e-3) and drawn.count(max(drawn)) == 1


@pytest.mark.parametrize(
    ("most", "last"),
    [(1, "1 KiB"), (700, "1 KiB"), (1010 * MIB, "1500 MiB"), (2**30, "1 GiB"), (int(4.34 * 2**30), "5 GiB")],
)
def test_the_axis_ends_at_a_round_number(most: int, last: str) -> None:
    assert labels(figure([Curve("a", "eager", (most,))]))[-1] == last


def test_curves_without_values_are_left_out() -> None:
    drawing = figure([Curve("a", "eager", ()), Curve("b", "ours", ())])
    assert not [path for path in drawing.iter("path") if path.get("class") != "grid"]


def test_bytes_in_words() -> None:
    assert [bytes_text(value) for value in (0, 512, MIB, 1536 * MIB)] == ["0.0 KiB", "0.5 KiB", "1.0 MiB", "1.50 GiB"]


# The demo's page


def test_the_demo_page_has_a_column_a_model(tmp_path: Path) -> None:
    curves = [Curve("eager", "eager", (MIB, 2 * MIB)), Curve("optimized", "ours", (MIB,))]
    shown = [Exhibit(name, HOSTILE, [("peak", f"{name} peak")], curves) for name in ("first", HOSTILE)]
    write_demo("title", "machine", shown, tmp_path / "demo.html")
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert len(list(parsed(page).iter("svg"))) == 2
    assert {"first peak", f"{HOSTILE} peak", HOSTILE} <= set(texts(page))
    assert "<script" not in page
