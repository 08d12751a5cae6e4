"""Sets of values that are reused together: minimum cuts against all subsets, real graphs, the list and its page."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import fmecompile
from fmecompile.analysis.cut_sets import LEAST, CutSet
from fmecompile.analysis.cuts import Cuts, CutValue
from fmecompile.analysis.separation import Flow, separations, ways
from fmecompile.backends.choice import Choice
from fmecompile.backends.offer import LINES, Offer
from fmecompile.backends.reusing import ReuseRecord
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.pipeline import Compilation
from tests.models import small_svd, svd_call
from tests.test_calibrated_policies import falling
from tests.test_step_reuse import MODELS, normalised, variant

INPUT = "input"


# ------------------------------------------------------------------------------------------------- against all subsets


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """At most nine values; the last one is the result, and any value may read the input."""
    count = draw(st.integers(2, 9))
    operands: dict[Any, list[Any]] = {}
    for value in range(count):
        choices = [*range(value), INPUT]
        operands[value] = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=3, unique=True))
    work = {value: draw(st.integers(0, 6)) for value in range(count)}
    able = draw(st.sets(st.sampled_from(range(count - 1)), max_size=7)) if count > 1 else set()
    return Flow(operands, work, {value: draw(st.integers(1, 6)) for value in able}, [count - 1])


def running(flow: Flow, kept: Collection[Any]) -> set[Any]:
    """What runs, told one value at a time from the last to the first."""
    runs: set[Any] = set(flow.results)
    for value in reversed(list(flow.operands)):
        if value not in kept and any(value in flow.operands[user] for user in runs):
            runs.add(value)
    return runs


def points(flow: Flow, way: Collection[Any]) -> Iterator[tuple[int, int]]:
    """Bytes and work of every set of values that leaves ``way`` running."""
    able = list(flow.nbytes)
    for kept in chain.from_iterable(combinations(able, size) for size in range(len(able) + 1)):
        runs = running(flow, kept)
        if runs.issuperset(way):
            yield sum(flow.nbytes[v] for v in kept), sum(flow.work[v] for v in runs)


@settings(max_examples=300, deadline=None)
@given(flows())
def test_no_set_is_below_the_hull(flow: Flow) -> None:
    """For every weight of work and bytes, over every set; and each corner is a set that leaves the way running."""
    entries = [value for value, operands in flow.operands.items() if INPUT in operands]
    for way in ways(flow, entries, most=9):
        corners = separations(flow, way)
        for corner in corners:
            runs = running(flow, corner.kept)
            assert runs.issuperset(way)
            assert corner.work == sum(flow.work[value] for value in runs)
            assert corner.nbytes == sum(flow.nbytes[value] for value in corner.kept)
        found = list(points(flow, way))
        assert corners[-1].work == min(work for _, work in found)
        assert corners[-1].nbytes == min(nbytes for nbytes, work in found if work == corners[-1].work)
        for left, right in pairwise(corners):
            gain, more = left.work - right.work, right.nbytes - left.nbytes
            assert gain > 0 and more > 0
            assert all(more * work + gain * nbytes >= more * left.work + gain * left.nbytes for nbytes, work in found)


@settings(max_examples=200, deadline=None)
@given(flows())
def test_a_way_is_a_path_from_the_input_to_the_result(flow: Flow) -> None:
    entries = {value for value, operands in flow.operands.items() if INPUT in operands}
    found = ways(flow, entries, most=9)
    assert bool(found) == bool(entries & running(flow, ()))
    least: dict[Any, float] = {INPUT: 0}
    for value, operands in flow.operands.items():
        least[value] = min((least[o] for o in operands if o in least), default=math.inf) + flow.work[value]
    assert not found or sum(flow.work[value] for value in found[0]) == least[max(flow.operands)]
    for way in found:
        first, *rest = sorted(way)
        assert first in entries and max(way) in flow.results
        assert all(before in flow.operands[after] for before, after in pairwise([first, *rest]))


def test_corners_that_gain_little_are_left_out() -> None:
    """A chain in which each value saves one more, and one that saves much."""
    operands: dict[Any, list[Any]] = {0: [INPUT], 1: [0], 2: [1], 3: [2, INPUT]}
    flow = Flow(operands, {0: 100, 1: 10, 2: 1, 3: 0}, {0: 1, 1: 3, 2: 9}, [3])
    assert [corner.kept for corner in separations(flow, [3])] == [frozenset(k) for k in [(), (0,), (1,), (2,)]]
    assert [corner.kept for corner in separations(flow, [3], 20)] == [frozenset(k) for k in [(), (0,), (2,)]]


# ------------------------------------------------------------------------------------------------------ in real graphs


@pytest.fixture(scope="module", params=[pytest.param(model.values, id=model.id) for model in MODELS])
def denoiser(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Compilation, Cuts]:
    build, call = request.param
    model, inputs = build(), call(1, 3, 8, 8, torch.float32)
    compilation = normalised(model, inputs)
    return model, inputs, compilation, Cuts(compilation.program)


def test_a_shallow_step_on_true_values_of_a_set_is_the_full_one(
    denoiser: tuple[nn.Module, Any, Compilation, Cuts],
) -> None:
    """Bitwise, for every set on the list; it keeps and saves what the list says."""
    model, inputs, compilation, cuts = denoiser
    for one in cuts.sets.listed:
        reuse = tuple(Cut(str(k), value.value, "cut") for k, value in enumerate(one.values))
        result, kept = variant(compilation, model, StepReuse(reuse)).run(tree_leaves(inputs))
        taken = {(name, 0): value for name, value in kept.items()}
        again, _ = variant(compilation, model, StepReuse(reuse, frozenset({"cut"}))).run(tree_leaves(inputs), taken)
        assert torch.equal(again[0], result[0]), one
        assert sum(value.untyped_storage().nbytes() for value in kept.values()) == one.nbytes
        program = compilation.program.copy()
        StepReuse(reuse, frozenset({"cut"})).apply(program, compilation.facts)
        assert Cuts(program).work == pytest.approx(cuts.work * (1 - one.saved), rel=1e-9)


def test_the_list_is_a_pareto_line(denoiser: tuple[nn.Module, Any, Compilation, Cuts]) -> None:
    """Rising in bytes and savings, not below any single value, and no step repeats the last one."""
    cuts = denoiser[3]
    listed = cuts.sets.listed
    assert len(listed) > 4 and any(len(one.values) > 1 for one in listed)
    for before, after in pairwise(listed):
        assert after.nbytes > before.nbytes and after.saved > before.saved + LEAST
    for one in listed:
        taken: dict[str, str | None] = {value.value: None for value in one.values}
        assert cuts.alive(taken).issuperset(taken_nodes := {n for n in cuts.nodes if n.name in taken})
        assert len(taken_nodes) == len(taken) and set(cuts.clips) & cuts.alive(taken)
        assert one.saved == cuts.saved_by(one.values) and one.running
    for value in cuts.sets.singles:
        assert any(one.nbytes <= value.nbytes and one.saved >= value.saved - LEAST for one in listed)


def test_the_best_within_a_limit_is_small_and_fits(denoiser: tuple[nn.Module, Any, Compilation, Cuts]) -> None:
    cuts = denoiser[3]
    for one in cuts.sets.listed:
        for limit in (one.nbytes, one.nbytes + 1):
            found = cuts.sets.within(limit)
            assert found.nbytes <= one.nbytes and one.saved - 0.01 <= found.saved <= one.saved
            assert cuts.named(f"auto:{limit}") == list(found.values)
    assert cuts.named("auto:1TiB", copies=2) == cuts.named("auto: 1 tib")
    middle = cuts.sets.listed[len(cuts.sets.listed) // 2].nbytes
    assert sum(value.nbytes for value in cuts.named(f"auto:{middle}", copies=2)) <= middle / 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("auto:", "names no limit.*next: give cut="),
        ("auto:200Mib:3", "names no limit"),
        ("auto:some", "'some' is not an amount of memory"),
        ("auto:2XiB", "unknown unit"),
        ("auto:1KiB", r"fits in .*next: allow \d+ bytes \(.* MiB\) for \w+"),
    ],
)
def test_limits_that_mean_nothing_are_refused(
    denoiser: tuple[nn.Module, Any, Compilation, Cuts], name: str, words: str
) -> None:
    with pytest.raises(fmecompile.OptionError, match=f"(?s){words}"):
        denoiser[3].named(name)


class Fork(nn.Module):
    """Two narrow branches that together save more, and take less, than the wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one, self.other = nn.Conv3d(4, 6, 3, padding=1), self._narrow(), self._narrow()

    @staticmethod
    def _narrow() -> nn.Module:
        return nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 1, 3, padding=1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """(N, 4, F, H, W) and a number -> (N, 4, F, H, W)."""
        x = sample * (1 + timestep)
        return x + self.wide(x).sum(1, keepdim=True) + self.one(x).sin() * self.other(x)


def test_auto_is_a_set_where_that_saves_clearly_more() -> None:
    model = Fork().requires_grad_(False).eval()
    cuts = Cuts(normalised(model, (torch.rand(1, 4, 3, 8, 8), torch.tensor(5.0))).program)
    assert cuts.best().module == "wide"
    assert [value.module for value in cuts.named("auto")] == ["one", "other"]


def test_auto_is_one_value_otherwise(denoiser: tuple[nn.Module, Any, Compilation, Cuts]) -> None:
    cuts = denoiser[3]
    (single,) = cuts.named("auto")
    assert single == cuts.best()


# -------------------------------------------------------------------------------------------- what explain shows of it


@pytest.mark.parametrize(
    ("options", "copies"), [({}, 1), ({"mode": "forecast"}, 2), ({"mode": "forecast", "order": 2}, 3)]
)
def test_a_limit_counts_all_that_is_kept(
    denoiser: tuple[nn.Module, Any, Compilation, Cuts], options: Any, copies: int
) -> None:
    _, _, compilation, cuts = denoiser
    limit = cuts.sets.listed[-1].nbytes
    policy = fmecompile.DeepCache(interval=2, cut=f"auto:{limit}", **options)
    found = Choice.of(policy, compilation.program, compilation.facts)
    assert list(found.values) == cuts.named(f"auto:{limit // copies}")
    assert found.offer.chosen.nbytes * copies <= limit and found.offer.sets == cuts.sets.listed


def test_a_limit_is_refused_where_a_branch_is_left_out(denoiser: tuple[nn.Module, Any, Compilation, Cuts]) -> None:
    compilation = denoiser[2]
    policy = fmecompile.FasterCache(cut="auto:1MiB")
    assert policy.needs_guidance
    with pytest.raises(fmecompile.OptionError, match=r"(?s)left out.*next: name the values"):
        Choice.of(policy, compilation.program, compilation.facts)


def test_a_set_is_reused_and_explained() -> None:
    model = Fork().requires_grad_(False).eval()
    sample = torch.rand(1, 4, 3, 8, 8)
    fmecompile.optimize(model, reuse=fmecompile.DeepCache(interval=2, cut="auto:2KiB"), strict=True)
    with torch.no_grad():
        for timestep in torch.linspace(0.9, 0.1, 4):
            model(sample, timestep)
    found = fmecompile.explain(model).records[0].reuse
    assert isinstance(found, ReuseRecord) and len(found.plans) == 2
    assert [value.module for value in found.values] == ["one", "other"]
    assert found.kept_bytes == found.offer.chosen.nbytes == 2 * 3 * 8 * 8 * 4
    lines = str(found.offer).splitlines()
    (chosen,) = (line for line in lines if line.startswith("* "))
    assert chosen == "* 0.001 MiB, 62.5% of the work saved: one, other; runs wide"
    assert all(f"  {line}" in str(fmecompile.explain(model)) for line in lines)


@pytest.mark.parametrize("place", [0, 3, 11, 12, 29])
def test_what_was_chosen_is_among_the_printed(place: int) -> None:
    sets = tuple(CutSet((value(f"m{k}", k + 1),), k + 1, k / 50, ("rest",)) for k in range(30))
    for chosen in (sets[place], CutSet((value("other", place + 1),), place + 1, 0.0, ())):
        lines = str(Offer(sets, (), chosen)).splitlines()[1:]
        assert len(lines) == LINES and sum(line.startswith("*") for line in lines) == 1
        assert chosen.modules[0] in next(line for line in lines if line.startswith("*"))
        assert "m0;" in "".join(lines[:2]) and "m29;" in lines[-1]
    assert "*" not in "".join(str(Offer(sets, (), CutSet((), 0, 0.0, ()))).splitlines()[1:])


def value(module: str, nbytes: int, saved: float = 0.5) -> CutValue:
    return CutValue(module, module, nbytes, saved, False)


HOSTILE = "</td></svg><script>alert('x')</script>&\"<b>"


def page(offer: Offer, path: Path, calibration: Any = None) -> ElementTree.Element:
    offer.to_html(path, calibration)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"http|//|url\(|@import|<script|<link|<img|src=", text)
    return ElementTree.fromstring(text)


def dots(found: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [e for e in found.iter() if e.get("class") == f"dot {style}"]


def test_the_page_has_a_dot_for_every_set(tmp_path: Path) -> None:
    sets = tuple(CutSet((value(f"m{k}", 2**k),), 2**k, k / 10, ("rest",)) for k in range(1, 9))
    chosen = CutSet((value(HOSTILE, 100), value("b", 20)), 120, 0.55, (HOSTILE,))
    found = page(Offer(sets, (value("m1", 2), value("alone", 77)), chosen), tmp_path / "offer.html")
    assert [len(dots(found, style)) for style in ("set", "single", "chosen")] == [8, 1, 1]
    assert dots(found, "chosen")[0].get("title") == f"0.1 KiB, 55.0% of the work saved: {HOSTILE}, b"
    for dot in (d for style in ("set", "single", "chosen") for d in dots(found, style)):
        left, top = re.findall(r"([\d.]+)%", dot.get("style", ""))
        assert 0 <= float(left) <= 100 and 0 <= float(top) <= 100
    (line,) = (e for e in found.iter() if e.get("class") == "line ours")
    assert line.get("d", "").count("V") == len(sets)
    rows = list(found.iter("tr"))
    assert len(rows) == 1 + len(sets) + 1 and [r.get("class") for r in rows].count("chosen") == 1
    page(Offer((), (), CutSet((), 0, 0.0, ())), tmp_path / "nothing.html")


def test_the_page_shows_what_was_calibrated(tmp_path: Path) -> None:
    calibration = falling(5)
    recorded = dataclasses.replace(calibration.records[0], mode="feature", modules=("m1",))
    calibration = dataclasses.replace(calibration, records=(recorded,))
    sets = tuple(CutSet((value(f"m{k}", 2**k),), 2**k, k / 10, ("rest",)) for k in range(1, 4))
    found = page(Offer(sets, (), sets[1]), tmp_path / "offer.html", calibration)
    similarity = recorded.trace.similarity
    cosines = [similarity[k][k + 1] for k in range(4)]
    said = f"{min(cosines):.4f} to {max(cosines):.4f}"
    assert said in dots(found, "set")[0].get("title", "") and said not in dots(found, "set")[1].get("title", "")
    assert [said in "".join(row.itertext()) for row in found.iter("tr")] == [False, True, False, False]
    found = page(Offer(sets, (), sets[1], (0.25, 0.5)), tmp_path / "offer.html")
    assert ["0.2500 to 0.5000" in dot.get("title", "") for dot in dots(found, "set")] == [False, True, False]
    policy = fmecompile.StepRehash.from_calibration(calibration, full_steps=2)
    assert policy.alike == (min(cosines), max(cosines)) and fmecompile.StepRehash(full_steps=2).alike is None
    with pytest.raises(fmecompile.OptionError, match="is no calibration"):
        Offer(sets, (), sets[1]).to_html(tmp_path / "no.html", "calibration.json")  # type: ignore[arg-type]


def test_modules_are_named_by_their_class() -> None:
    cuts = Cuts(normalised(small_svd(), svd_call(1, 3, 8, 8, torch.float32)).program)
    by_class = cuts.results_of("class:TransformerSpatioTemporal*")
    assert by_class and by_class == cuts.results_of("*.attentions.?")
    with pytest.raises(fmecompile.OptionError, match="near it are TransformerSpatioTemporalModel"):
        cuts.results_of("class:TransformerSpatoTemporalModel")
