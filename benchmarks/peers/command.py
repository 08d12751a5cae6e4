"""``python -m benchmarks.peers``: each alternative in a process of its own, on the same model and inputs.

``real``: peak of activations of a call at the real size, float16, on fake tensors. ``time`` and ``reduced``, with real
widths at a reduced size in float32: time over eager's in interleaved pairs; peak, error against float64, compile time
and programs. ``reuse real`` and ``reuse time``: the same of short generations, and the bytes that are kept between
steps. ``quality``: clips of the trained models (benchmarks/quality) against eager in float64.

An error of a peer is a cell. Rows are merged into ``benchmarks/results/peers.json`` by measurement, case and method, so
that one can be measured alone (``--measure``, ``--case``, ``--method``); a record of another machine, or of other
versions, is refused until ``--fresh``. ``--quick`` measures tiny models and writes nothing unless ``--out`` says where.
``--docs`` only writes the tables of the record into ``docs/peers.md`` and ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import measuring, subjects
from benchmarks.peers.measuring import Row
from benchmarks.peers.methods import EXACT, REUSE, Method, of_family
from benchmarks.peers.page import tables, write_docs
from benchmarks.peers.subjects import Case, denoisers
from benchmarks.peers.trained import CALIBRATED, TRAINED, quality
from benchmarks.report import RESULTS, machine, save

COMMAND = "python -m benchmarks.peers"
ROOT = Path(__file__).parents[2]
KEY = ("measurement", "case", "method")


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    measurement: str
    case: Case
    method: Method

    @property
    def key(self) -> Row:
        return {"measurement": self.measurement, "case": self.case.name, "method": self.method.name}

    def run(self, options: argparse.Namespace) -> Row:
        """Here, in this process."""
        scratch = options.scratch
        timed = {"pairs": options.pairs}
        functions: dict[str, tuple[Any, dict[str, Any]]] = {
            "real": (measuring.real_size, {}),
            "time": (measuring.call_time, timed),
            "reduced": (measuring.reduced, {"scratch": scratch}),
            "reuse real": (measuring.real_generation, {}),
            "reuse time": (measuring.generation_time, timed),
            "quality": (quality, {"scratch": scratch}),
        }
        function, given = functions[self.measurement]
        return self.key | measuring.answer(function, self.case, self.method, **given)


MEASUREMENTS = ("real", "time", "reduced", "reuse real", "reuse time", "quality")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What was asked for, in the order of the tables."""
    for job in _quick() if options.quick else _all():
        if (
            job.measurement in (options.measure or MEASUREMENTS)
            and _is_chosen(job.case.name, options.case)
            and _is_chosen(job.method.name, options.method)
        ):
            yield job


def _is_chosen(name: str, parts: Sequence[str] | None) -> bool:
    return not parts or any(part == name or part.lower() in name.lower().replace(",", "").split() for part in parts)


def _all() -> Iterator[Job]:
    yield from _each("real", subjects.REAL, EXACT)
    yield from _each("time", subjects.REDUCED, EXACT[1:])
    yield from _each("reduced", subjects.REDUCED, EXACT)
    yield from _each("reuse real", denoisers(subjects.REAL), REUSE)
    yield from _each("reuse time", subjects.GENERATIONS, REUSE)
    yield from _each("quality", TRAINED, (EXACT[0], *REUSE, *CALIBRATED))


def _quick() -> Iterator[Job]:
    yield from _each("real", subjects.TINY, EXACT)
    yield from _each("time", subjects.TINY, EXACT[1:])
    yield from _each("reduced", subjects.TINY, EXACT)
    yield from _each("reuse time", denoisers(subjects.TINY), REUSE)


def _each(measurement: str, cases: Any, methods: Sequence[Method]) -> Iterator[Job]:
    return (Job(measurement, case, method) for case in cases for method in of_family(methods, case.family))


# -------------------------------------------------------------------------------------------------------------- process


def apart(job: Job, options: argparse.Namespace) -> Row:
    """The row of a job that was run in a process of its own; how the process ended where it gives none."""
    words = [sys.executable, "-m", "benchmarks.peers", "--worker", json.dumps(job.key)]
    words += ["--pairs", str(options.pairs), "--scratch", str(options.scratch)]
    words += ["--quick"] if options.quick else []
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(_inductor_cache(job, options))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | caches | {"PYTHONPATH": path}
    try:
        ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return job.key | {"refused": f"no answer within {options.timeout} s"}
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    last = ended.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
    return job.key | {"refused": f"the process ended with {ended.returncode}: {last[0]}"}


def _inductor_cache(job: Job, options: argparse.Namespace) -> Path:
    """Compile times are cold ones; where only calls are timed, what an earlier run compiled is as good."""
    if options.cache is not None and job.measurement == "time":
        return options.cache
    return Path(tempfile.mkdtemp(dir=options.scratch))


ANSWER = "row: "


def worker(options: argparse.Namespace) -> int:
    """Measure the one row that ``--worker`` names and print it."""
    key = json.loads(options.worker)
    everything = _quick() if options.quick else _all()
    job = next(job for job in everything if job.key == key)
    print(ANSWER + json.dumps(job.run(options)))
    return 0


# --------------------------------------------------------------------------------------------------------------- record


def merged(before: Sequence[Row], fresh: Sequence[Row]) -> list[Row]:
    """``fresh`` rows in the place of those with the same key, others behind."""
    rows = {tuple(row[part] for part in KEY): row for row in before}
    rows |= {tuple(row[part] for part in KEY): row for row in fresh}
    order = {tuple(job.key.values()): at for at, job in enumerate([*_all(), *_quick()])}
    return sorted(rows.values(), key=lambda row: order.get(tuple(row[part] for part in KEY), len(order)))


def recorded(folder: Path, is_fresh: bool) -> list[Row]:
    """The rows of the record in ``folder``. Exits where it was made elsewhere, as figures would not compare."""
    path = folder / "peers.json"
    if is_fresh or not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    here = machine()
    other = [name for name in here if name != "date" and record.get(name) != here[name]]
    if other:
        raise SystemExit(f"{path} was made with another {', '.join(other)}; next: give --fresh, or another --out")
    return record["rows"]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="append", choices=MEASUREMENTS, help="by default all")
    parser.add_argument("--case", action="append", help="a case's name, or a word of it; by default all")
    parser.add_argument("--method", action="append", help="a method's name, or a word of it; by default all")
    parser.add_argument("--pairs", type=int, help="of eager and the method, interleaved (5; 1 with --quick)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a row may take")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--here", action="store_true", help="in this process, which is quicker to debug")
    parser.add_argument("--fresh", action="store_true", help="drop the rows of the record")
    parser.add_argument("--out", type=Path, help="folder of peers.json")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and not as tables")
    parser.add_argument("--cache", type=Path, help="folder of Inductor's cache, kept, for time alone")
    parser.add_argument("--list", action="store_true", help="only say what would be measured")
    parser.add_argument("--docs", action="store_true", help="only write the record's tables into the documentation")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.pairs = options.pairs or (1 if options.quick else 5)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code. Rows are saved as they come, so that a run may be stopped and taken up."""
    options = parsed(argv)
    if options.worker:
        return worker(options)
    if options.docs:
        for path in write_docs(json.loads((RESULTS / "peers.json").read_text(encoding="utf-8")), ROOT):
            print(path)
        return 0
    chosen = list(jobs(options))
    if options.list or not chosen:
        print("\n".join(f"{job.measurement}: {job.case.name}: {job.method.name}" for job in chosen) or _nothing())
        return 0 if chosen else 2
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        fresh = list(measured(chosen, options))
    print(json.dumps(fresh, indent=1) if options.json else tables(fresh))
    return 0


def _nothing() -> str:
    return f"nothing has such a name; next: {COMMAND} --list"


def measured(chosen: Sequence[Job], options: argparse.Namespace) -> Iterator[Row]:
    """A row a job, as they come; each is in the record before the next one starts."""
    folder = options.out or (None if options.quick else RESULTS)
    before = [] if folder is None else recorded(folder, options.fresh)
    rows: list[Row] = []
    for job in chosen:
        rows.append(job.run(options) if options.here else apart(job, options))
        print(*rows[-1].values(), sep=" | ", file=sys.stderr, flush=True)
        if folder is not None:
            save("peers", COMMAND, merged(before, rows), folder)
        yield rows[-1]
