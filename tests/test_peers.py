"""The benchmark of peers: its record and tables, and what it claims of this project in every row."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.peers import command, main
from benchmarks.peers.command import Job, merged
from benchmarks.peers.measuring import allocated, answer, held, interleaved, reduced
from benchmarks.peers.methods import EXACT, METHODS, REUSE, Method, Refused, of_family
from benchmarks.peers.page import BEGIN, END, tables, write_docs
from benchmarks.peers.subjects import TINY, Case, Subject

SVD, ANIMATEDIFF, VIDEO_VAE, IMAGE_VAE = TINY
MIB = 2**20
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "peers.json"
COMPILED = ("torch.compile", "fmecompile, backend inductor")


def rows_of(case: Case, names: tuple[str, ...], scratch: Path) -> dict[str, dict[str, Any]]:
    return {name: answer(reduced, case, METHODS[name], scratch=scratch) for name in names}


@pytest.mark.parametrize(
    ("case", "peers"),
    [
        pytest.param(SVD, ("forward chunking",), id="svd"),
        pytest.param(
            ANIMATEDIFF,
            ("FreeNoise split inference, outer blocks, 64 and 1",),
            id="animatediff",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_exact_methods_are_exact_and_this_one_takes_least(case: Case, peers: tuple[str, ...], tmp_path: Path) -> None:
    rows = rows_of(case, ("diffusers eager", *peers, "fmecompile"), tmp_path)
    for row in rows.values():
        assert row["error"] <= 1.5 * row["eager error"] <= 1e-4
    ours = rows.pop("fmecompile")
    assert ours["measured MiB"] < min(row["measured MiB"] for row in rows.values())
    assert ours["measured MiB"] <= ours["projected MiB"]
    assert ours["graphs"] == 1 and "graphs" not in rows["diffusers eager"]


def test_times_are_interleaved() -> None:
    order: list[str] = []
    row = interleaved(lambda: order.append("eager"), lambda: order.append("own"), 3)
    assert order == ["own", "eager"] + ["eager", "own"] * 3
    assert row["least"] <= row["time"] <= row["most"] and row["pairs"] == 3


def test_a_chunked_decode_of_video_is_not_exact(tmp_path: Path) -> None:
    rows = rows_of(VIDEO_VAE, ("diffusers eager", "decode_chunk_size=2", "VAE slicing"), tmp_path)
    assert rows["decode_chunk_size=2"]["error"] > 1e-2 > rows["diffusers eager"]["error"]
    assert rows["VAE slicing"]["refused"].startswith("NotImplementedError: Slicing")


def test_peers_that_cannot_run_are_cells(tmp_path: Path) -> None:
    def failing(subject: Subject) -> None:
        raise ValueError("\n\n first | line \n second")

    def silent(subject: Subject) -> None:
        raise Refused("nothing to do")

    row = answer(reduced, SVD, Method("one", failing), scratch=tmp_path)
    assert row == {"refused": "ValueError: first | line"}
    assert answer(reduced, SVD, Method("two", silent), scratch=tmp_path) == {"refused": "nothing to do"}
    missing = Method("three", failing, package="no_such_package")
    assert answer(reduced, SVD, missing)["refused"] == "not installed; next: pip install -e '.[peers]'"
    text = tables([{"measurement": "reduced", "case": "c", "method": "m", "time": 0.5} | {}, _row("n") | row])
    assert "| m | 0.50 |" in text and "| n | ValueError: first \\| line |" in text


def _row(method: str) -> dict[str, Any]:
    return {"measurement": "reduced", "case": "c", "method": method}


def test_each_method_is_listed_once_and_hooks_that_match_nothing_say_so(tmp_path: Path) -> None:
    assert len(METHODS) == len(EXACT) + len(REUSE)
    assert all(method.exact for method in EXACT if method.name.startswith("fmecompile"))
    assert not any(method.exact or not method.reuses for method in REUSE)
    assert METHODS["VAE slicing"] not in of_family(EXACT, "SVD")
    seer = METHODS["diffusers TaylorSeer"]
    assert answer(reduced, SVD, seer, scratch=tmp_path)["refused"].startswith("hooks nothing")


def test_what_a_peer_keeps_between_steps_is_counted() -> None:
    subject = SVD.subject(torch.float32)
    subject.shorten(3)
    assert held(subject)[1] == 0
    METHODS["diffusers PyramidAttentionBroadcast"].enter(subject)
    peak, kept = held(subject)
    assert peak > kept > 0.1 * MIB


def test_the_allocator_sees_what_is_asked_for() -> None:
    def function() -> None:
        first = torch.empty(MIB, dtype=torch.uint8)
        del first
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        third = torch.empty(MIB, dtype=torch.uint8)
        del second, third

    assert allocated(function) == 3 * MIB


def test_the_record_is_merged_and_of_one_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own: two rows, each after the other, one of them again."""
    words = ["--quick", "--measure", "real", "--case", "SVD, tiny", "--out", str(tmp_path)]
    monkeypatch.setattr("benchmarks.peers.command.apart", lambda job, options: job.run(options))
    assert main([*words, "--method", "forward chunking"]) == 0
    assert main([*words, "--method", "diffusers eager", "--method", "forward chunking"]) == 0
    record = json.loads((tmp_path / "peers.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["diffusers eager", "forward chunking"]
    assert {"command", "device", "cores", "torch", "diffusers", "python", "date"} <= set(record)
    assert "| forward chunking |" in capsys.readouterr().out
    (tmp_path / "peers.json").write_text(json.dumps(record | {"torch": "1.0"}))
    with pytest.raises(SystemExit, match="another torch; next: give --fresh"):
        main([*words, "--method", "diffusers eager"])
    assert main(["--quick", "--method", "no such thing"]) == 2


def options_of(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(pairs=1, quick=True, scratch=folder, timeout=250, cache=None)


def test_a_process_that_answers_one_that_ends_and_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, options = Job("reduced", IMAGE_VAE, METHODS["torch.compile"]), options_of(tmp_path)

    def starting(text: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    starting("""echo noise; echo 'row: {"error": 1.0}'; echo more noise""")
    assert command.apart(job, options) == {"error": 1.0}
    starting("echo first >&2; echo last words >&2; exit 3")
    assert command.apart(job, options) == job.key | {"refused": "the process ended with 3: last words"}
    options.timeout = 0.1
    starting("exec sleep 5")
    assert command.apart(job, options) == job.key | {"refused": "no answer within 0.1 s"}


@pytest.mark.slow
def test_a_row_of_a_process_of_its_own(tmp_path: Path) -> None:
    job = Job("real", SVD, METHODS["diffusers eager"])
    assert command.apart(job, options_of(tmp_path)) == job.run(options_of(tmp_path))


def test_rows_keep_the_order_of_the_tables() -> None:
    eager, chunking = ({"measurement": "real", "case": SVD.name, "method": m.name} for m in EXACT[:2])
    assert merged([chunking], [eager]) == [eager, chunking]
    assert merged([eager | {"measured GiB": 1.0}], [eager | {"measured GiB": 2.0}])[0]["measured GiB"] == 2.0


def test_documentation_takes_the_tables_of_the_record(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("docs/peers.md", "README.md"):
        (tmp_path / name).write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for path in write_docs(record, tmp_path):
        text = path.read_text()
        assert text.startswith("before\n") and text.endswith("\nbehind\n") and "old" not in text
        assert text == (RECORD.parents[2] / path.relative_to(tmp_path)).read_text() or _block(text) == _block(
            (RECORD.parents[2] / path.relative_to(tmp_path)).read_text()
        ), "next: python -m benchmarks.peers --docs"


def _block(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0]


def test_in_the_record_this_project_takes_least_at_real_sizes() -> None:
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    measured = [row for row in rows if row["measurement"] == "real" and "refused" not in row]
    exact = [row for row in measured if METHODS[row["method"]].exact]
    for case in {row["case"] for row in exact}:
        found = {row["method"]: row["measured GiB"] for row in exact if row["case"] == case}
        least = min(found.values())
        assert min(gib for name, gib in found.items() if name.startswith("fmecompile")) == least, case


@pytest.mark.slow
@pytest.mark.parametrize("measurement", ["real", "time", "reduced", "reuse time"])
def test_the_quick_run_answers_every_row(measurement: str, tmp_path: Path) -> None:
    assert main(["--quick", "--measure", measurement, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert {row["case"] for row in rows} <= {case.name for case in TINY}
    for row in rows:
        if row["method"].startswith("fmecompile") and "inductor" not in row["method"]:
            assert "refused" not in row, row


def test_a_part_of_a_record_leaves_the_rest(tmp_path: Path) -> None:
    """A case measured alone, and the dates of both."""
    (tmp_path / "some.json").write_text(
        json.dumps({"date": "2026-01-02", "rows": [{"case": "a", "s": 1}, {"case": "b", "s": 2}]})
    )
    report.save("some", "python -m some", [{"case": "b", "s": 3}], tmp_path, is_part=True)
    known = json.loads((tmp_path / "some.json").read_text())
    assert known["rows"] == [
        {"case": "a", "s": 1, "date": "2026-01-02"},
        {"case": "b", "s": 3, "date": known["date"]},
    ]
    report.save("some", "python -m some", [{"case": "b", "s": 3}], tmp_path)
    assert json.loads((tmp_path / "some.json").read_text())["rows"] == [{"case": "b", "s": 3}]
