"""``fmecompile plan``: small diffusion pipelines from their configurations alone, every option, every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from click.testing import Result
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import fmecompile
from fmecompile import cli
from fmecompile.backends.budgeted import ASSUMED_WORKSPACE_BYTES
from fmecompile.errors import OptionError
from fmecompile.offline.answer import Question, answer
from fmecompile.offline.calls import build, calls_of
from fmecompile.offline.figures import Held, Job, Planner, held
from fmecompile.offline.largest import largest, line
from fmecompile.offline.ledger import Ledger, along
from fmecompile.offline.model import Component, Model, Size, folder_model, named_model
from fmecompile.offline.named import NAMED
from fmecompile.offline.survey import Survey
from fmecompile.offline.sweep import Sweep
from fmecompile.offline.weights import component_bytes
from fmecompile.offline.wording import conclusion, limit_text
from fmecompile.report import bytes_text

MIB = 2**20

VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
}
SVD = {
    "unet": {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "block_out_channels": [32],
        "num_attention_heads": [2],
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal"],
        "up_block_types": ["CrossAttnUpBlockSpatioTemporal"],
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
        "layers_per_block": 1,
    },
    "vae": {"_class_name": "AutoencoderKLTemporalDecoder", **VAE},
}
ANIMATEDIFF = {
    "unet": {
        "_class_name": "UNetMotionModel",
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlockMotion", "DownBlockMotion"],
        "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion"],
        "cross_attention_dim": 32,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 24,
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    "vae": {"_class_name": "AutoencoderKL", **VAE, "up_block_types": ["UpDecoderBlock2D"] * 2},
}
SMALL = ("--frames", "4", "--height", "64", "--width", "128", "--jobs", "1")


@pytest.fixture(scope="module", autouse=True)
def larger_chunks() -> Iterator[None]:
    """Fewer candidates for the search than the other tests have: these make dozens of plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMECOMPILE_MIN_TRIP_BYTES", "65536")
        yield


def save(folder: Path, pipeline: str, components: dict[str, Any], **others: tuple[str, str]) -> Path:
    """A diffusion pipeline as save_pretrained lays it out, without weights; it has a sampler, which is no model."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.40.0", "scheduler": ["diffusers", "X"]}
    for name, config in components.items():
        index[name] = list(others.get(name, ("diffusers", config.get("_class_name"))))
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small") / "svd", "StableVideoDiffusionPipeline", SVD)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What decides in a small pipeline, and is planned in a second."""
    return save(tmp_path_factory.mktemp("small") / "vae", "StableVideoDiffusionPipeline", {"vae": SVD["vae"]})


def at(folder: Path, *size: int) -> Model:
    """The model of a folder, for a clip of ``size``."""
    return replace(folder_model(folder), size=Size(*size))


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *map(str, args)])


class Run(NamedTuple):
    result: Result
    data: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def run(svd: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small pipeline with a budget near its optimized need, a sweep, a page and JSON. Largest clips and spill have
    tests of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmecompile.offline.largest.ROUNDS", 0)
        options = ("--budget", "120MiB", "--no-spill", "--sweep", "frames=4:8:2")
        return ran(tmp_path_factory.mktemp("out"), "--model", svd, *options)


@pytest.fixture(scope="module")
def spilled(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A decoder with less room than any plan holds on the device."""
    return ran(tmp_path_factory.mktemp("out"), "--model", vae, "--budget", "102MiB")


def ran(folder: Path, *options: object) -> Run:
    result = invoke(*options, *SMALL, "--html", folder / "p.html", "--json", folder / "p.json")
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "p.json").read_text(encoding="utf-8"))
    return Run(result, data, (folder / "p.html").read_text(encoding="utf-8"))


def call(run: Run, name: str) -> dict[str, Any]:
    (found,) = (row for row in run.data["calls"] if row["name"] == name)
    return found


# Figures


def test_calls_are_in_the_order_they_run(run: Run) -> None:
    assert [row["name"] for row in run.data["calls"]] == ["VAE encode", "denoiser", "VAE decode"]
    assert [row["dtype"] for row in run.data["calls"]] == ["float32", "float16", "float16"]
    assert call(run, "VAE encode")["size"]["frames"] == 1


def test_figures_are_those_of_the_door(run: Run) -> None:
    """The same as ``fmecompile.plan`` on the same call, built by hand."""
    component = Component("unet", "UNetSpatioTemporalConditionModel", json.dumps(SVD["unet"]))
    module = build(component, torch.float16)
    with FakeTensorMode():
        latents = torch.empty(2, 4, 8, 32, 64, dtype=torch.float16)
        others = [torch.empty(shape, dtype=torch.float16) for shape in ((), (2, 1, 32), (2, 3))]
    with torch.no_grad():
        plan = fmecompile.plan(module, latents, *others)
    row = call(run, "denoiser")
    assert row["activation_bytes"] == {
        "eager": plan.eager_peak_bytes,
        "planned": plan.projected_peak_bytes,
        "floor": plan.floor_bytes,
    }
    assert row["input_bytes"] == plan.input_bytes
    assert row["activation_bytes"]["planned"] < row["activation_bytes"]["eager"]


def test_totals_add_up(run: Run) -> None:
    weights = {row["name"]: row["weight_bytes"] for row in run.data["components"]}
    for row in run.data["calls"]:
        own = row["weight_bytes"] + row["input_bytes"] + ASSUMED_WORKSPACE_BYTES
        others = sum(size for name, size in weights.items() if name != row["component"])
        for column, held_bytes in row["activation_bytes"].items():
            assert row["total_bytes"]["offload"][column] == own + held_bytes
            assert row["total_bytes"]["resident"][column] == own + others + held_bytes
    assert call(run, "VAE encode")["weight_bytes"] == 2 * weights["vae"], "upcast to float32"


def test_verdicts_follow_the_totals(run: Run) -> None:
    for row in run.data["calls"]:
        for residence, totals in row["total_bytes"].items():
            fitting = [column for column in ("eager", "planned", "floor") if totals[column] <= 120 * MIB]
            assert row["verdict"][residence] == (fitting[0] if fitting else "none")


def test_no_guidance_halves_the_batch_of_the_denoiser_alone(svd: Path) -> None:
    model = folder_model(svd)
    guided, alone = (calls_of(model, torch.float16, guidance) for guidance in (True, False))
    assert [c.batch for c in guided] == [1, 2, 1] and [c.batch for c in alone] == [1, 1, 1]


def test_no_data_is_made(vae: Path) -> None:
    """A clip of a terabyte."""
    _, decode = calls_of(folder_model(vae), torch.float16, True)
    assert held(Job(decode.at(Size(2**14, 4096, 4096)), is_eager=True)).peak_bytes > 2**40


@pytest.mark.slow
def test_processes_give_the_same(vae: Path) -> None:
    alone, spread = (answer(Question(at(vae, 4, 64, 128), torch.float16, processes=count)) for count in (1, 2))
    assert alone == spread


def test_a_killed_process_is_replaced_by_this_one(vae: Path) -> None:
    class Dead:
        def submit(self, *_: Any) -> None:
            raise BrokenProcessPool

    said: list[str] = []
    found = Planner(Dead(), said.append)  # type: ignore[arg-type]
    jobs = [Job(call, is_eager=True) for call in calls_of(at(vae, 1, 64, 64), torch.float16, True)]
    assert all(answer.peak_bytes for answer in found.ask(jobs)) and len(said) == len(jobs)


# Largest clips


def test_the_largest_clip_fits_and_the_next_does_not(vae: Path) -> None:
    model, budget_bytes = at(vae, 4, 64, 128), 120 * MIB
    for found in answer(Question(model, torch.float16, budget_bytes=budget_bytes)).largest:
        assert found.size is not None and found.is_tried and not found.is_end and found.bottleneck == "VAE decode"
        sizes = line(model, found.axis)
        following = sizes[sizes.index(found.size) + 1]
        assert least_total(model, following) > 0.98 * budget_bytes
        assert found.eager_size is not None and found.eager_size.volume <= found.size.volume


def least_total(model: Model, size: Size) -> int:
    """What the device must hold at least while the VAE decodes, from a fresh plan; all weights are the VAE's."""
    _, decode = calls_of(model, torch.float16, True)
    found = held(Job(decode.at(size)))
    return found.weight_bytes + found.input_bytes + ASSUMED_WORKSPACE_BYTES + found.floor_bytes


def test_nothing_fits_a_budget_below_the_weights(vae: Path) -> None:
    result = invoke("--model", vae, *SMALL, "--budget", "1MiB")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("none") >= 4 and "does not fit in 1.0 MiB" in result.stdout


class Straight:
    """A planner of a call that holds ``slope`` bytes a pixel and ``offset`` bytes; counts what it is asked."""

    def __init__(self, slope: int, offset: int) -> None:
        self.slope, self.offset, self.asked = slope, offset, 0

    def ask(self, jobs: list[Job]) -> list[Held]:
        self.asked += len(jobs)
        return [self._held(job) for job in jobs]

    def start(self, jobs: list[Job]) -> None:
        pass

    def _held(self, job: Job) -> Held:
        floor = self.offset + self.slope * job.call.size.volume
        fits = job.limit_bytes is None or floor <= job.limit_bytes
        return Held(0, 0, 4 * floor if job.is_eager else floor, floor, fits)


@pytest.mark.parametrize(("slope", "offset", "frames"), [(10, 0, 50), (10, 10 * MIB, 62), (1, 1000 * MIB, None)])
def test_few_tries_find_the_end_of_a_line(slope: int, offset: int, frames: int | None) -> None:
    component = Component("unet", "UNetSpatioTemporalConditionModel")
    model = Model("x", "", (component,), Size(10, 256, 256))
    planner: Any = Straight(slope, offset)
    survey = Survey(calls_of(model, torch.float16, False), {}, planner)
    survey.measure([model.size])
    budget = ASSUMED_WORKSPACE_BYTES + (offset + 10 * 256 * 256 * frames + 7 if frames else MIB)
    found = largest(model, survey, budget)
    (most,) = (f for f in found if f.axis == "frames" and f.residence == "resident")
    assert most.size == (Size(frames, 256, 256) if frames else None)
    assert most.is_tried == (frames is not None) and planner.asked <= 2 + 4 * 3


def test_motion_modules_end_the_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "ad", "AnimateDiffPipeline", ANIMATEDIFF)
    model = folder_model(folder)
    planner: Any = Straight(1, 0)
    survey = Survey(calls_of(model, torch.float16, True), {}, planner)
    survey.measure([model.size])
    most = largest(model, survey, 2**50)[0]
    assert most.size is not None and most.size.frames == 24 and most.is_end and most.is_tried
    assert limit_text(most) == "24 frames (the most there can be)"
    refused = invoke("--model", folder, "--frames", 25)
    assert refused.exit_code == 2 and "24 positions" in refused.stderr and "at most 24" in refused.stderr


# Values in host memory


def test_values_wait_in_host_memory_where_nothing_else_fits(spilled: Run) -> None:
    row = call(spilled, "VAE decode")
    for residence in ("resident", "offload"):
        spill, totals = row["spill"][residence], row["total_bytes"][residence]
        assert spill["total_bytes"] <= 102 * MIB < totals["floor"] and spill["is_feasible"]
        assert spill["total_bytes"] - spill["activation_bytes"] == totals["floor"] - row["activation_bytes"]["floor"]
        assert spill["host_bytes"] > 0
        assert row["verdict"][residence] == spilled.data["verdict"][residence] == "spill"
        text = bytes_text(max(c["spill"][residence]["host_bytes"] for c in spilled.data["calls"] if c["spill"]))
        said = f"fits in 102.0 MiB with {text} of values waiting in host memory"
        assert said in " ".join(spilled.result.stdout.split()) and said in spilled.page
    (line,) = [line for line in spilled.result.stdout.splitlines() if line.startswith(" VAE decode ")][:1]
    assert f"{row['spill']['resident']['total_bytes'] / MIB:.1f}" in line and "with spill" in spilled.result.stdout


def test_more_frames_fit_with_values_in_host_memory(spilled: Run) -> None:
    for residence in ("resident", "offload"):
        found = {f["may_spill"]: f for f in spilled.data["largest"] if f["residence"] == residence}
        assert found[True]["axis"] == "frames" and found[True]["is_tried"]
        assert found[True]["size"]["frames"] >= 4
    assert re.search(r"with spill +frames +at least \d+ frames", spilled.result.stdout)


def test_no_spill_keeps_values_on_the_device(vae: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmecompile.offline.largest.ROUNDS", 0)
        result = invoke("--model", vae, *SMALL, "--budget", "102MiB", "--no-spill")
    assert result.exit_code == 0 and "spill" not in result.stdout
    assert result.stdout.count("does not fit in 102.0 MiB") == 2


def test_what_spilling_does_not_help_is_told(vae: Path) -> None:
    model = at(vae, 4, 64, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmecompile.offline.largest.ROUNDS", 0)
        found = answer(Question(model, torch.float16, budget_bytes=ASSUMED_WORKSPACE_BYTES + 4 * MIB))
    assert found.verdict("resident") == "none"
    needed, _ = found.spilled_bytes("resident") or (0, 0)
    assert found.budget_bytes < needed < found.needed_bytes("resident", "floor")  # type: ignore[operator]
    assert any(f"{bytes_text(needed)} with spill" in line for line in conclusion(found))


@pytest.mark.parametrize(("budget_bytes", "may_spill", "asked"), [(150, True, 1), (150, False, 0), (200, True, 0)])
def test_spill_is_asked_for_where_the_floor_does_not_fit(budget_bytes: int, may_spill: bool, asked: int) -> None:
    model = Model("x", "", (Component("unet", "UNetSpatioTemporalConditionModel"),), Size(1, 8, 8))
    planner: Any = Straight(1, 100)  # 164 bytes
    budget = ASSUMED_WORKSPACE_BYTES + budget_bytes
    survey = Survey(calls_of(model, torch.float16, False), {}, planner, budget, may_spill)
    survey.measure([model.size])
    before = planner.asked
    assert (survey.spilled(survey.calls[0], "resident") is not None) == bool(asked)
    assert (planner.asked > before) == bool(asked)


# Estimates


def test_a_line_through_known_points() -> None:
    assert along([(10, 100)], 5) == 50, "through zero with one point"
    assert along([(10, 100), (20, 120)], 15) == 110
    assert along([(10, 100), (20, 120)], 40) == 160, "beyond the end"
    assert along([(10, 100), (20, 120), (40, 200)], 5) == 90, "before the start"
    assert along([(10, 100), (20, 120), (40, 200)], 30) == 160, "the two around it"


def test_only_sizes_in_line_tell_another(svd: Path) -> None:
    (call,) = (c for c in calls_of(folder_model(svd), torch.float16, True) if c.kind == "decode")
    ledger = Ledger()
    for size, peak in {Size(4, 64, 64): 100, Size(8, 64, 64): 200, Size(4, 128, 128): 1000}.items():
        ledger.note(Job(call.at(size)), Held(7, 1, peak, peak))
    assert ledger.value(call.at(Size(6, 64, 64)), "planned") == 150
    assert ledger.value(call.at(Size(4, 64, 192)), "planned") == 700
    assert ledger.value(call.at(Size(6, 64, 64)), "weights") == 7
    assert not ledger.is_known(call.at(Size(6, 64, 64)), "planned")


# Sweeps


@pytest.mark.parametrize(
    ("text", "axis", "values"),
    [
        ("frames=8:64", "frames", tuple(range(8, 65, 8))),
        ("frames=8:20:5", "frames", (8, 13, 18, 20)),
        (" size = 256 : 512 : 128 ", "size", (256, 384, 512)),
        ("height=64:128", "height", (64, 128)),
        ("width=64:64", "width", (64,)),
    ],
)
def test_sweeps(text: str, axis: str, values: tuple[int, ...]) -> None:
    assert Sweep.parse(text) == Sweep(axis, values)


def test_a_sweep_of_sizes_keeps_the_aspect_ratio() -> None:
    sizes = Sweep.parse("size=256:576:320").sizes(Size(25, 576, 1024))
    assert sizes == [Size(25, 256, 448), Size(25, 576, 1024)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "frames",
        "frames=8",
        "frames=64:8",
        "frames=0:8",
        "frames=8:64:0",
        "depth=1:2",
        "frames=1:1000:1",
        "frames=a:b",
    ],
)
def test_bad_sweeps_are_refused(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Sweep.parse(text)
    assert caught.value.next_step


def test_a_sweep_plans_the_ends_and_says_what_is_estimated(run: Run) -> None:
    rows = run.data["sweep"]
    assert [row["value"] for row in rows] == [4, 6, 8]
    assert [row["is_planned"] for row in rows] == [True, False, True]
    eager = [row["total_bytes"]["resident"]["eager"] for row in rows]
    assert eager == sorted(eager)
    assert any(line.startswith(" ~6 ") for line in run.result.stdout.splitlines())


@pytest.mark.slow
def test_estimates_are_near_what_exact_sweeps_plan(vae: Path) -> None:
    question = Question(at(vae, 5, 64, 128), torch.float16, sweep=Sweep.parse("frames=5:7:1"))
    estimated, exact = (answer(replace(question, exact=exact)).sweep for exact in (False, True))
    assert [row.is_planned for row in estimated] == [True, False, True] and all(row.is_planned for row in exact)
    near = exact[1].planned_bytes["VAE decode"]
    # chunks are whole rows, so plans of such small clips go up in steps of a twentieth
    assert estimated[1].planned_bytes["VAE decode"] == pytest.approx(near, rel=0.06)


# The page and the tables


def test_the_page_shows_the_numbers_of_the_json(run: Run) -> None:
    page = ElementTree.fromstring(run.page)
    found = {"".join(element.itertext()).strip() for element in page.iter()}
    for row in run.data["calls"]:
        assert row["name"] in found and bytes_text(row["input_bytes"]) in found
        for size in (*row["activation_bytes"].values(), *(v for t in row["total_bytes"].values() for v in t.values())):
            assert bytes_text(size) in found
    for row in run.data["components"]:
        assert {row["name"], row["class_name"], bytes_text(row["weight_bytes"])} <= found
    for row in run.data["sweep"]:
        for size in (*row["planned_bytes"].values(), *(v for t in row["total_bytes"].values() for v in t.values())):
            assert bytes_text(size) in found
    assert set(run.data["notes"]) <= found


def test_the_page_stands_alone(run: Run) -> None:
    assert not re.search(r"http|//|url\(|@import|<script|<link|<img|src=", run.page)
    assert "prefers-color-scheme: dark" in run.page and 'name="viewport"' in run.page


def test_the_sweep_is_drawn(run: Run) -> None:
    (drawing,) = ElementTree.fromstring(run.page).iter("svg")
    assert {"line eager", "line ours", "mark"} <= {path.get("class") for path in drawing.iter("path")}
    assert run.page.count('class="dot ours"') == 2, "sizes that were planned"


def test_bars_share_one_axis(run: Run) -> None:
    widths = [float(width) for width in re.findall(r'class="eager(?: base)?" style="width:([\d.]+)%', run.page)]
    ours = [float(width) for width in re.findall(r'class="ours(?: base)?" style="width:([\d.]+)%', run.page)]
    assert len(widths) == len(ours) == 2 * 2 * len(run.data["calls"])
    assert all(sum(pair) <= 100.02 for pair in zip(widths[::2], widths[1::2], strict=True))
    assert sum(ours) < sum(widths)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = save(tmp_path / "<b>&x", "AnimateDiffPipeline", {"vae": ANIMATEDIFF["vae"]})
    result = invoke("--model", folder, *SMALL, "--html", tmp_path / "p.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<b>&x" not in page and "&lt;b&gt;&amp;x" in page
    ElementTree.fromstring(page)


def test_the_table_has_a_row_a_call(run: Run) -> None:
    for row in run.data["calls"]:
        (line,) = [line for line in run.result.stdout.splitlines() if line.startswith(f" {row['name']} ")][:1]
        for size in row["total_bytes"]["resident"].values():
            assert f"{size / MIB:.1f}" in line


def test_progress_goes_to_stderr(run: Run) -> None:
    lines = run.result.stderr.splitlines()
    assert any(line.endswith("] denoiser, 4 frames of 64x128: plan") for line in lines)
    assert not any("] denoiser" in line for line in run.result.stdout.splitlines())


# Where models come from


def test_a_component_folder_and_a_class_with_a_file_are_the_same(vae: Path, tmp_path: Path) -> None:
    by_folder = invoke("--model", vae / "vae", *SMALL)
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(VAE), encoding="utf-8")
    by_class = invoke("--class", "AutoencoderKLTemporalDecoder", "--config", bare, *SMALL)
    assert by_folder.exit_code == by_class.exit_code == 0, by_folder.output + by_class.output
    assert by_folder.stdout == by_class.stdout
    assert "VAE encode" in by_folder.stdout and " denoiser " not in by_folder.stdout


def test_a_component_no_library_knows_is_named(tmp_path: Path) -> None:
    parts = {"vae": SVD["vae"], "image_encoder": {"architectures": ["X"]}}
    folder = save(
        tmp_path / "svd", "StableVideoDiffusionPipeline", parts, image_encoder=("transformers", "NoSuchModel")
    )
    found = answer(Question(at(folder, 2, 64, 64), torch.float16))
    assert found.components[-1].weight_bytes is None
    assert any("image_encoder (NoSuchModel)" in note and "not counted" in note for note in found.notes)


@pytest.mark.parametrize("name", NAMED)
def test_named_models_have_calls_and_weights(name: str) -> None:
    model = named_model(name)
    assert {"denoise", "decode"} <= {call.kind for call in calls_of(model, torch.float16, True)}
    assert all(component_bytes(component, torch.float16) for component in model.components)


@pytest.mark.parametrize(
    ("name", "component", "parameters"),
    [
        ("svd-xt", "unet", 1_524_623_082),
        ("svd-xt", "vae", 97_742_847),
        ("animatediff", "unet", 1_276_658_564),
        ("animatediff", "vae", 83_653_863),
    ],
)
def test_named_models_are_the_published_ones(name: str, component: str, parameters: int) -> None:
    (part,) = (part for part in named_model(name).components if part.name == component)
    assert sum(p.numel() for p in build(part, torch.float16).parameters()) == parameters


@pytest.mark.parametrize(
    ("kind", "config", "component"),
    [
        ("CLIPVisionModelWithProjection", (1280, 5120, 32, 16, 1024), ("svd", "image_encoder")),
        ("CLIPTextModel", (768, 3072, 12, 12, 512), ("animatediff", "text_encoder")),
        ("CLIPTextModelWithProjection", (1280, 5120, 32, 20, 1280), ("animatediff-sdxl", "text_encoder_2")),
    ],
)
def test_stored_counts_are_those_of_transformers(
    kind: str, config: tuple[int, ...], component: tuple[str, str]
) -> None:
    transformers = pytest.importorskip("transformers")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
    settings = dict(zip(names, config, strict=True)) | ({"patch_size": 14} if "Vision" in kind else {})
    with torch.device("meta"):
        cls = getattr(transformers, kind)
        module = cls(cls.config_class(**settings))
    (part,) = (part for part in named_model(component[0]).components if part.name == component[1])
    assert part.class_name == kind and part.parameters == sum(p.numel() for p in module.parameters())


# Refusals


def broken(folder: Path) -> dict[str, tuple[object, ...]]:
    """Options that are refused, by the words of the refusal."""
    svd = save(folder / "svd", "StableVideoDiffusionPipeline", SVD)
    files = {
        "no.json": "{",
        "list.json": "[]",
        "bare.json": "{}",
        "odd.json": json.dumps(SVD["unet"] | {"projection_class_embeddings_input_dim": 100}),
        "bad.json": json.dumps(VAE | {"block_out_channels": [30, 60]}),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "empty").mkdir()
    small = ("--model", svd, *SMALL)
    return {
        "neither a known model nor a folder": ("--model", "sdv"),
        "there is no folder": ("--model", "./no/such"),
        "neither model_index.json nor config.json": ("--model", folder / "empty"),
        "give either --model": (),
        "either --model, or": ("--model", "svd", "--config", folder / "bare.json"),
        "or --config with --class": ("--class", "UNetMotionModel"),
        "is not JSON": ("--class", "UNetMotionModel", "--config", folder / "no.json"),
        "holds no JSON object": ("--class", "UNetMotionModel", "--config", folder / "list.json"),
        "cannot read": ("--class", "UNetMotionModel", "--config", folder / "none.json"),
        "names no class": ("--config", folder / "bare.json"),
        "no model class 'UNetMotion'": ("--class", "UNetMotion", "--config", folder / "bare.json"),
        "no model class 'DDIMScheduler'": ("--class", "DDIMScheduler", "--config", folder / "bare.json"),
        "no inputs are known for": ("--class", "MotionAdapter", "--config", folder / "bare.json"),
        "cannot be built": ("--class", "AutoencoderKLTemporalDecoder", "--config", folder / "bad.json"),
        "no clip of 4 frames of 65x128": (*small, "--height", 65),
        "no clip of 0 frames": (*small, "--frames", 0),
        "no clip of 4 frames of 64x-8": (*small, "--width", -8),
        "does not run on": ("--config", folder / "odd.json", *SMALL),
        "not an amount of memory": (*small, "--budget", "-8GiB"),
        "unknown unit 'apples'": (*small, "--budget", "8 apples"),
        "less than one byte": (*small, "--budget", "0"),
        "there is no type 'fp12'": (*small, "--dtype", "fp12"),
        "is no sweep over": (*small, "--sweep", "depth=1:2"),
        "has no values": (*small, "--sweep", "frames=9:3"),
        "no clip of 4 frames of 33x128": (*small, "--sweep", "height=33:64"),
        "cannot be written": (*small, "--html", folder / "none" / "p.html"),
        "be written": (*small, "--json", folder),
    }


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    return broken(tmp_path_factory.mktemp("broken"))


def test_what_is_refused_ends_with_two_and_a_next_step(refusals: dict[str, tuple[object, ...]]) -> None:
    for words, options in refusals.items():
        result = invoke(*options)
        assert result.exit_code == 2, (options, result.output)
        assert words in result.stderr and "next: " in result.stderr, result.output
        assert "Traceback" not in result.output and not result.stdout


# The real one


@pytest.mark.slow
def test_svd_xt_within_a_minute(tmp_path: Path) -> None:
    """UNet and VAE, with the largest clips in 8 GiB, on two idle cores: busy ones say little."""
    is_idle, start = os.getloadavg()[0] < 1, time.perf_counter()
    command = [sys.executable, "-c", "from fmecompile.cli import main; main()", "plan", "--model", "svd-xt"]
    subprocess.run([*command, "--budget", "8GiB", "--json", str(tmp_path / "p.json")], check=True, capture_output=True)
    assert time.perf_counter() - start < 60 or not is_idle
    data = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    peaks = {row["name"]: row["activation_bytes"] for row in data["calls"]}
    assert peaks["denoiser"]["planned"] < 0.25 * peaks["denoiser"]["eager"]
    assert peaks["VAE decode"]["planned"] < 0.5 * peaks["VAE decode"]["eager"]
    assert all(found["is_tried"] for found in data["largest"])
    (decode,) = (row for row in data["calls"] if row["name"] == "VAE decode")
    assert decode["spill"]["resident"]["total_bytes"] < 0.8 * decode["total_bytes"]["resident"]["floor"]
