"""The command line: what each command prints, its JSON, its refusals and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import fmecompile
from fmecompile import cli
from fmecompile.bisect import StageCheck, Verdict
from fmecompile.commands import benching, examining
from fmecompile.report import bytes_text
from tests.pipelines import animatediff
from tests.test_offline import SVD, save

SMALL = ("--frames", "2", "--height", "64", "--width", "64")


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, args)])


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("cli") / "vae", "StableVideoDiffusionPipeline", {"vae": SVD["vae"]})


def test_every_command_is_listed_with_its_codes() -> None:
    said = invoke("--help").output
    for name in ("demo", "plan", "explain", "bench", "calibrate", "bisect", "doctor", "--install-completion"):
        assert name in said
    assert "with 2 where it refuses" in said


def test_every_command_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert f"| `fmecompile {command.callback.__name__}" in page  # type: ignore[union-attr]


# Explain


def test_explain_tells_what_the_saved_plan_tells(vae: Path, tmp_path: Path) -> None:
    written, page = tmp_path / "plan.json", tmp_path / "plan.html"
    asked = ("--model", vae, "--call", "decode", *SMALL, "--json", written, "--html", page)
    result = invoke("explain", *asked)
    assert result.exit_code == 0, result.output
    plan = fmecompile.Plan.load(written)
    assert plan.groups and f"{bytes_text(plan.projected_peak_bytes)} projected" in result.stdout
    assert plan.groups[0].modules[0].split(",")[0] in result.stdout and "What the peak is made of" in result.stdout
    assert "<svg" in page.read_text(encoding="utf-8")
    again = invoke("explain", written)
    assert again.exit_code == 0 and again.stdout == result.stdout


def test_json_goes_to_the_output_alone(vae: Path) -> None:
    result = invoke("explain", "--model", vae, "--call", "decode", *SMALL, "--json", "-")
    assert fmecompile.Plan.from_json(result.stdout).projected_peak_bytes > 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("explain",), "give either --model"),
        (("explain", "nothing.json"), "cannot be read"),
        (("explain", "--model", "svd", "--call", "denoised"), "there are encode, denoise, decode"),
        (("explain", "--model", "svd", "--json", "no/such/folder/plan.json"), "cannot be written"),
        (("bisect", "--model", "svd", "--dtype", "int8"), "there is no type 'int8'"),
        (("bench", "peer"), "there is no benchmark 'peer'"),
        (("calibrate", "nowhere"), "is no diffusion pipeline"),
        (("calibrate", "nowhere", "--policy", "StepRehas"), "near it are StepRehash"),
    ],
)
def test_refusals_have_a_next_step_and_no_traceback(args: tuple[str, ...], told: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and result.exception.__class__ is SystemExit
    assert told in result.stderr and "next:" in result.stderr and "Traceback" not in result.output


def test_a_budget_that_nothing_meets_is_refused(vae: Path) -> None:
    result = invoke("explain", "--model", vae, "--call", "decode", *SMALL, "--budget", "1KiB")
    assert result.exit_code == 2 and "MiB at least" in result.stderr and "next: allow" in result.stderr


# Bisect


def test_bisect_runs_every_stage_of_a_saved_component(tmp_path: Path) -> None:
    kind = {"_class_name": "AutoencoderKLTemporalDecoder", **SVD["vae"]}
    folder = save(tmp_path / "pipe", "StableVideoDiffusionPipeline", {"vae": kind})
    asked = ("--model", folder, "--call", "decode", "--frames", 1, "--height", 32, "--width", 32, "--json", "-")
    result = invoke("bisect", *asked)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["is_clean"] and found["stages"][0]["name"] == "capture" and "every stage is right" in result.stderr


def test_bisect_exits_with_1_when_a_stage_is_wrong(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verdict((StageCheck("chunk-loops", 0.5, 1, 2, culprit="add_3"),), 1e-3)
    monkeypatch.setattr(fmecompile, "bisect", lambda *args, **kwargs: wrong)
    result = invoke("bisect", "--model", vae, "--call", "decode", "--frames", 1, "--height", 32, "--width", 32)
    assert result.exit_code == 1 and "wrong from chunk-loops on" in result.stdout


# Bench


def test_bench_lists_and_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = invoke("bench").stdout
    assert (
        "memory " in listed and "quality.evaluate" in listed and "peers " in listed and "report" not in listed.split()
    )
    ran: list[Any] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(benching.subprocess, "run", lambda command, **_: ran.append(command) or Done())
    record = tmp_path / "copies.json"
    result = invoke("bench", "copies", "--json", record, "--only", "SVD")
    assert result.exit_code == 0 and ran[0][1:] == ["-m", "benchmarks.copies", "--only", "SVD"]
    assert json.loads(record.read_text(encoding="utf-8"))["rows"]


def test_bench_away_from_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fmecompile, "__file__", str(tmp_path / "site" / "fmecompile" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", "memory")
    assert result.exit_code == 2 and "in a clone of the project" in result.stderr


# Calibrate


def test_calibrate_writes_what_a_policy_reads(tmp_path: Path) -> None:
    animatediff().save_pretrained(tmp_path / "pipe")
    out = tmp_path / "calibration.json"
    result = invoke(
        "calibrate", tmp_path / "pipe", "--out", out, "--prompt", "a b", "--prompt", "b", "--steps", 4, "--frames", 2,
        "--height", 16, "--width", 16, "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = fmecompile.Calibration.load(out)
    assert found.key.steps == 4 and str(found).splitlines()[0] in result.stdout
    fmecompile.StepRehash(full_steps=2, calibration=found)
    assert (tmp_path / "page.html").is_file()
    missing = invoke("calibrate", tmp_path / "pipe", "--out", out)
    assert missing.exit_code == 2 and "needs a prompt" in missing.stderr
    unknown = invoke("calibrate", tmp_path / "pipe", "--prompt", "a", "--argument", "promt_2=1")
    assert unknown.exit_code == 2 and "takes no 'promt_2'" in unknown.stderr


# Doctor


def test_doctor_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("doctor", "--json", "-")
    assert result.exit_code == 0, result.output
    found = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert found["torch"]["fact"] == torch.__version__ and found["program"]["status"] == "ok"
    assert "error" in found["program"]["fact"] and "projected" in result.stderr


def test_doctor_finds_a_compiler_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Wrong.calls += 1
            return super().forward(x) + Wrong.calls

    monkeypatch.setattr(examining.nn, "Sequential", Wrong)
    result = invoke("doctor")
    assert result.exit_code == 1 and "broken" in result.stdout
