"""``fmecompile demo``: the quick run from end to end, its promises, and what happens when one breaks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from click.testing import Result
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from fmecompile import cli
from fmecompile import demo as demo_module
from fmecompile.commands.console import progress
from fmecompile.demo import FULL, QUICK, DemoRow, animatediff_inputs, fastest_threads, float64_output, svd_inputs
from fmecompile.report import Curve, bytes_text


class Run(NamedTuple):
    result: Result
    rows: list[DemoRow]
    machine: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One quick run by the command line."""
    folder = tmp_path_factory.mktemp("demo")
    result = invoke("demo", "--quick", "--html", str(folder / "d.html"), "--json", str(folder / "d.json"))
    data = json.loads((folder / "d.json").read_text(encoding="utf-8"))
    rows = [DemoRow(**row) for row in data["rows"]]
    return Run(result, rows, data["machine"], (folder / "d.html").read_text(encoding="utf-8"))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, args)


# The quick run


def test_the_quick_run_keeps_every_promise(quick: Run) -> None:
    kept = [text for row in quick.rows for text in row.broken_promises() if "wrapper" not in text]
    assert not kept, "the wrapper's share is of calls that take seconds; these take tenths"
    assert quick.result.exit_code in (0, 1)
    assert (quick.result.exit_code == 0) == (not any(row.broken_promises() for row in quick.rows)), quick.result.output


@pytest.mark.parametrize("place", range(len(QUICK)))
def test_rows_say_what_was_measured(quick: Run, place: int) -> None:
    row = quick.rows[place]
    assert row.model == QUICK[place].name
    assert 0.98 * row.projected_bytes <= row.measured_bytes <= row.projected_bytes < row.eager_bytes / 2
    assert row.optimized_error <= 1.5 * row.eager_error < 1e-5
    assert row.groups > 0 and row.trips > row.groups
    assert 0 < row.overhead_s < row.optimized_s and row.compile_s > 0
    assert sum(row.phases_s.values()) < quick.machine["total_s"]


def test_the_table_has_a_row_a_model(quick: Run) -> None:
    for row in quick.rows:
        (line,) = [line for line in quick.result.stdout.splitlines() if row.model in line]
        sizes = (row.eager_bytes, row.projected_bytes, row.measured_bytes)
        for cell in (*(f"{size / 2**20:.1f}" for size in sizes), f"{row.eager_error:.1e}", str(row.trips)):
            assert cell in line


def test_the_page_shows_both_timelines_of_every_model(quick: Run) -> None:
    page = ElementTree.fromstring(quick.page)
    found = {"".join(element.itertext()).strip() for element in page.iter()}
    for row in quick.rows:
        assert {row.model, bytes_text(row.eager_bytes), bytes_text(row.measured_bytes)} <= found
    drawings = list(page.iter("svg"))
    assert len(drawings) == len(quick.rows)
    for drawing in drawings:
        assert {"line eager", "line ours", "mark"} <= {path.get("class") for path in drawing.iter("path")}
    assert "http" not in quick.page


def test_progress_goes_to_stderr_in_plain_lines(quick: Run) -> None:
    lines = quick.result.stderr.splitlines()
    for row in quick.rows:
        assert [line.split("] ", 1)[1] for line in lines if line.startswith("[") and f" {row.model}: " in line] == [
            f"{row.model}: {phase}" for phase in row.phases_s
        ]


# Promises


@pytest.fixture
def good(quick: Run) -> DemoRow:
    return replace(quick.rows[0], overhead_s=0.0)


BROKEN = {
    "is above projected": lambda row: replace(row, measured_bytes=row.projected_bytes + 1),
    "2 % off": lambda row: replace(row, measured_bytes=int(0.97 * row.projected_bytes)),
    "no less than eager": lambda row: replace(row, eager_bytes=row.measured_bytes),
    "more than 1.5 times": lambda row: replace(row, optimized_error=1.6 * row.eager_error),
    "not a number": lambda row: replace(row, optimized_error=float("nan")),
    "1 % or more": lambda row: replace(row, overhead_s=0.011 * row.optimized_s),
    "is constant": lambda row: replace(row, spread=0.0),
    "guidance halves are equal": lambda row: replace(row, guidance_gap=0.0),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_promise_is_named(words: str, good: DemoRow) -> None:
    assert good.broken_promises() == []
    (text,) = BROKEN[words](good).broken_promises()
    assert text.startswith(f"{good.model}: ")
    assert words in text or words == "not a number"


@pytest.mark.parametrize("words", ["is above projected", "more than 1.5 times"])
def test_a_broken_promise_fails_the_command(
    words: str, good: DemoRow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    curves = [Curve("eager", "eager", (2, 1)), Curve("optimized", "ours", (1,))]
    monkeypatch.setattr(demo_module, "measure_subject", lambda *_: (BROKEN[words](good), curves))
    result = invoke("demo", "--quick", "--html", str(tmp_path / "d.html"))
    assert result.exit_code == 1
    assert result.stderr.count("broken promise: ") == len(QUICK) and words in result.stderr
    assert good.model in result.stdout and (tmp_path / "d.html").exists()


def test_kept_promises_end_with_zero(good: DemoRow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_module, "measure_subject", lambda *_: (good, [Curve("eager", "eager", (1,))]))
    result = invoke("demo", "--html", str(tmp_path / "d.html"))
    assert result.exit_code == 0, result.output
    assert "broken promise" not in result.output and not (tmp_path / "demo.json").exists()


# Its subjects


@pytest.mark.parametrize(("place", "parameters"), [(0, 1_524_623_082), (1, 1_276_658_564)])
def test_the_full_run_takes_the_real_architectures(place: int, parameters: int) -> None:
    with FakeTensorMode(), torch.no_grad():
        module = FULL[place].build().eval()
        inputs = FULL[place].inputs()
        assert module(*inputs).sample.shape[0] == 2
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_guidance_halves_differ_in_what_they_are_told_only() -> None:
    latents, _, images, _ = svd_inputs(2, 8, 8)
    assert torch.equal(latents[0, :, :4], latents[1, :, :4]) and not latents[0, :, 4:].any()
    assert not torch.equal(images[0], images[1])
    latents, _, text = animatediff_inputs(3, 8, 8)
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(text[0], text[2]) and not torch.equal(text[0], text[3])


class Answer(NamedTuple):
    sample: torch.Tensor


class Scaled(nn.Module):
    """Parameters in a leaf, in a container and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.rand(4))
        self.again = self.layer
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> Answer:
        return Answer(self.again(self.layer(x)) * self.gain + step)


@torch.no_grad()
def test_the_reference_is_float64_throughout() -> None:
    module, x, step = Scaled(), torch.randn(2, 4), torch.tensor(5)
    expected = copy.deepcopy(module).double()(x.double(), step).sample
    output = float64_output(module, (x, step))
    assert output.dtype == torch.float64 and torch.equal(output, expected)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    assert module.count.dtype == torch.int64


# The command line


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    assert fastest_threads() in (1, before)
    assert torch.get_num_threads() == before


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout.startswith("fmecompile ")


def test_a_terminal_gets_a_live_line_where_the_compiler_shows_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress() as say:
        say("building")
        say("compiling", live=False)
    shown = capsys.readouterr().err
    assert "building" in shown and "compiling" in shown
