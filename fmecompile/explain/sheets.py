"""From records of compiled calls to what a page shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

from markupsafe import Markup

from fmecompile.backends.reusing import ReuseRecord, kind_of
from fmecompile.budget import Allowance
from fmecompile.capture.example import Example
from fmecompile.explain.eager import with_eager
from fmecompile.graph.plan import Plan
from fmecompile.pipeline import Record
from fmecompile.report.peak import Part
from fmecompile.report.plan_page import Sheet, Strip
from fmecompile.reuse.calibration import Calibration
from fmecompile.reuse.heat_map import heat_map
from fmecompile.reuse.steps import FULL
from fmecompile.runtime.measure import Measurement
from fmecompile.runtime.reusing import Taken

Eager = Callable[[Example], Measurement]
"""Runs the unmodified module on fake tensors like those of an example."""


def sheet_of(
    record: Record, eager: Eager | None, title: str, measured: Measurement | None, calibration: Calibration | None
) -> Sheet:
    """What a page shows of one compiled signature. ``measured`` is of the module that it belongs to."""
    reuse = record.reuse if isinstance(record.reuse, ReuseRecord) else None
    plan = record.plan
    if not plan.eager_timeline and eager is not None:
        plan = with_eager(plan, eager(record.example))
    return Sheet(
        plan,
        title=title,
        budget=str(record.allowance or ""),
        limit_bytes=None if record.allowance is None else record.allowance.activation_bytes,
        others=others_of(record),
        group_s={} if measured is None else measured.group_s,
        kinds=[] if reuse is None else list(_kinds(reuse)),
        strips=[] if reuse is None else list(_strips(reuse)),
        maps=[] if calibration is None or reuse is None else list(_maps(calibration, reuse)),
        remarks=[] if reuse is None else [reuse.policy, *_values(reuse)],
        notes=record.notes,
    )


def others_of(record: Record) -> list[Part]:
    """What is held beside the call itself."""
    reuse = record.reuse if isinstance(record.reuse, ReuseRecord) else None
    return [*_kept(reuse), *_beside(record.allowance)]


def _kept(reuse: ReuseRecord | None) -> Iterator[Part]:
    if reuse is not None:
        yield Part(
            "Step cache",
            reuse.kept_bytes,
            "What a step keeps for later ones, once for each branch of guidance that is called alone.",
            "A policy with store='float8_e4m3fn' keeps a byte an element, store='host' keeps it in host memory; "
            "cut='auto:100MiB' takes what saves most within so many bytes.",
        )


def _beside(allowance: Allowance | None) -> Iterator[Part]:
    if allowance is None:
        return
    for name, nbytes in allowance.residents:
        yield Part(
            f"Beside it: {name}",
            nbytes,
            "Another component on the same device while this one runs.",
            "With enable_model_cpu_offload() it waits in host memory.",
        )
    yield Part(
        "Library workspaces",
        allowance.workspace_bytes,
        "A reserve for what the libraries of the device hold beside tensors.",
        "CUBLAS_WORKSPACE_CONFIG sets that of cuBLAS.",
    )


def _kinds(reuse: ReuseRecord) -> Iterator[tuple[str, Plan, str]]:
    for decision, plan in reuse.plans.items():
        yield kind_of(decision), plan, reuse.notes[decision]


def _values(reuse: ReuseRecord) -> Iterator[str]:
    for value in reuse.values:
        yield f"{value.module or value.value}: {value.nbytes / 2**20:.1f} MiB kept, {value.saved:.1%} of the work saved"


def _strips(reuse: ReuseRecord) -> Iterator[Strip]:
    """The latest generation, a strip a branch."""
    for run in list(reuse.runs)[-1:]:
        components = sorted(set().union(*(taken.decision for taken in run))) or ["all"]
        full = sum(taken.decision == FULL for taken in run)
        yield Strip(
            f"The latest run: {full} of {len(run)} steps compute everything.",
            [(name, [(name not in taken.decision, _said(taken)) for taken in run]) for name in components],
        )


def _said(taken: Taken) -> str:
    what = f"reuses {', '.join(sorted(taken.decision))}" if taken.decision else "computes everything"
    change = "" if taken.change is None or not isfinite(taken.change) else f"; a change of {taken.change:.3g}"
    return f"step {taken.step}: {what}{change}"


def _maps(calibration: Calibration, reuse: ReuseRecord) -> Iterator[tuple[str, Markup]]:
    """What the policy reuses first."""
    chosen = {value.module for value in reuse.values}
    found = list(zip(calibration.cuts, calibration.records, strict=True))
    for name, record in sorted(found, key=lambda item: chosen.isdisjoint(item[1].modules)):
        yield name, heat_map(f"Similarity of {name} between steps", record.trace.similarity)


def titles(records: Sequence[Record], part: str) -> list[str]:
    """A heading for each of several records; none where there is one alone."""
    alone = len(records) == 1
    return [part if alone else f"{part or 'Signature'} {k + 1}" for k in range(len(records))]
