"""Everything the planner found out about one model, as data: what the table, the page and the JSON show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import diffusers
import torch

from fmecompile.backends.budgeted import ASSUMED_WORKSPACE_BYTES
from fmecompile.offline.calls import Call, calls_of, check_size
from fmecompile.offline.figures import planner
from fmecompile.offline.largest import Largest, largest
from fmecompile.offline.ledger import COLUMNS
from fmecompile.offline.model import Model, Size
from fmecompile.offline.survey import RESIDENCES, Survey
from fmecompile.offline.sweep import Sweep
from fmecompile.offline.weights import component_bytes
from fmecompile.pipeline import package_version
from fmecompile.report import bytes_text

Columns = Mapping[str, int]
VERDICTS = (*COLUMNS, "spill", "none")
"""What fits a budget, from the easiest on: ``eager`` (all does), ``planned``, ``floor``, only with values in host
memory (``spill``), or ``none``."""


@dataclass(frozen=True)
class ComponentRow:
    """A model of the pipeline. ``weight_bytes`` is None where nothing says."""

    name: str
    class_name: str
    weight_bytes: int | None


@dataclass(frozen=True)
class Spill:
    """A plan with values in host memory, asked for where nothing else meets the budget; what is the device's to hold.

    ``host_bytes`` go to host memory in a call. Not ``is_feasible``: both others are the least that was found.
    """

    activation_bytes: int
    total_bytes: int
    host_bytes: int
    is_feasible: bool


@dataclass(frozen=True)
class CallRow:
    """One call. ``weight_bytes`` are its own component's, as it runs; ``activation_bytes`` by column (eager, planned,
    floor); ``total_bytes`` by residence, then column: everything on the device at the peak, workspace included;
    ``spill`` by residence, where there was cause to ask.
    """

    name: str
    component: str
    size: Size
    dtype: str
    weight_bytes: int
    input_bytes: int
    activation_bytes: Columns
    total_bytes: Mapping[str, Columns]
    spill: Mapping[str, Spill]

    def verdict(self, residence: str, budget_bytes: int) -> str:
        """Which of the ways to run fits the budget first, of :data:`VERDICTS`."""
        totals, spill = self.total_bytes[residence], self.spill.get(residence)
        found = next((column for column in COLUMNS if totals[column] <= budget_bytes), "none")
        if found != "none" or spill is None or not spill.is_feasible:
            return found
        return "spill" if spill.host_bytes else "floor"


@dataclass(frozen=True)
class SweepRow:
    """One size: planned figures of every call, and by residence and column what the device must hold.

    Not ``is_planned``: estimated between sizes that were planned.
    """

    size: Size
    value: int
    is_planned: bool
    planned_bytes: Columns
    total_bytes: Mapping[str, Columns]


@dataclass(frozen=True)
class Answer:
    """The whole report. All sizes in bytes; ``sweep_axis`` is empty where nothing was swept."""

    model: str
    pipeline_class: str
    size: Size
    dtype: str
    guidance: bool
    budget_bytes: int | None
    components: tuple[ComponentRow, ...]
    calls: tuple[CallRow, ...]
    largest: tuple[Largest, ...]
    sweep_axis: str
    sweep: tuple[SweepRow, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    def needed_bytes(self, residence: str, column: str) -> int:
        """What the device must hold for the whole pipeline: the most of all calls."""
        return max(call.total_bytes[residence][column] for call in self.calls)

    def verdict(self, residence: str) -> str:
        """Of the whole pipeline: that of the call that fits last."""
        budget_bytes = self.budget_bytes
        assert budget_bytes is not None
        return max((call.verdict(residence, budget_bytes) for call in self.calls), key=VERDICTS.index)

    def spilled_bytes(self, residence: str) -> tuple[int, int] | None:
        """(On the device, waiting in host memory) at most, of the whole pipeline with values in host memory where a
        call needs that; None where none was asked.
        """
        spills = [call.spill[residence] for call in self.calls if residence in call.spill]
        others = [call.total_bytes[residence]["floor"] for call in self.calls if residence not in call.spill]
        if not spills:
            return None
        return max(*others, *(s.total_bytes for s in spills), 0), max(spill.host_bytes for spill in spills)

    def to_json(self) -> str:
        """JSON, with ``verdict`` spelled out where there is a budget: by residence, and of every call."""
        data, budget_bytes = asdict(self), self.budget_bytes
        if budget_bytes is not None:
            data["verdict"] = {residence: self.verdict(residence) for residence in RESIDENCES}
            for call, row in zip(data["calls"], self.calls, strict=True):
                call["verdict"] = {residence: row.verdict(residence, budget_bytes) for residence in RESIDENCES}
        return json.dumps(data, indent=1)


@dataclass(frozen=True)
class Question:
    """What is asked of a model. ``exact`` plans every size of a sweep; ``processes`` is how many plan at once;
    ``may_spill`` lets values wait in host memory where nothing else meets the budget.
    """

    model: Model
    dtype: torch.dtype
    guidance: bool = True
    budget_bytes: int | None = None
    sweep: Sweep | None = None
    exact: bool = False
    processes: int = 1
    may_spill: bool = True


def answer(question: Question, say: Callable[[str], None] = lambda text: None) -> Answer:
    """Plan every call of the model, add up, search for the largest clips, sweep.

    Raises:
        TargetError: a component cannot be built, or none has known inputs.
        OptionError: there is no clip of some size.
        CaptureError: a component cannot be captured.
    """
    model = question.model
    calls = calls_of(model, question.dtype, question.guidance)
    swept = question.sweep.sizes(model.size) if question.sweep else []
    for size in (model.size, *swept):
        check_size(model, size, calls[0].scale)
    rows = tuple(ComponentRow(c.name, c.class_name, component_bytes(c, question.dtype)) for c in model.components)
    with planner(question.processes, say) as pool:
        weights = {row.name: row.weight_bytes or 0 for row in rows}
        survey = Survey(calls, weights, pool, question.budget_bytes, question.may_spill)
        survey.measure([model.size, *(question.sweep.planned(model.size, question.exact) if question.sweep else ())])
        found = largest(model, survey, question.budget_bytes) if question.budget_bytes is not None else []
        planned = tuple(_call_row(call, survey) for call in calls)
    return Answer(
        model=model.name,
        pipeline_class=model.pipeline_class,
        size=model.size,
        dtype=str(question.dtype).removeprefix("torch."),
        guidance=question.guidance,
        budget_bytes=question.budget_bytes,
        components=rows,
        calls=planned,
        largest=tuple(found),
        sweep_axis=question.sweep.axis if question.sweep else "",
        sweep=tuple(_sweep_row(size, value, survey) for size, value in zip(swept, _values(question), strict=True)),
        notes=tuple(_notes(rows, calls, question)),
        versions={"fmecompile": package_version(), "torch": torch.__version__, "diffusers": diffusers.__version__},
    )


def _values(question: Question) -> tuple[int, ...]:
    return question.sweep.values if question.sweep else ()


def _call_row(call: Call, survey: Survey) -> CallRow:
    return CallRow(
        name=call.name,
        component=call.component.name,
        size=call.size,
        dtype=call.dtype,
        weight_bytes=survey.ledger.value(call, "weights"),
        input_bytes=survey.ledger.value(call, "inputs"),
        activation_bytes={column: survey.ledger.value(call, column) for column in COLUMNS},
        total_bytes={
            residence: {column: survey.total_bytes(call, column, residence) for column in COLUMNS}
            for residence in RESIDENCES
        },
        spill={residence: spill for residence in RESIDENCES if (spill := _spill(call, survey, residence)) is not None},
    )


def _spill(call: Call, survey: Survey, residence: str) -> Spill | None:
    held = survey.spilled(call, residence)
    if held is None:
        return None
    total = survey.base_bytes(call, residence) + held.peak_bytes
    return Spill(held.peak_bytes, total, held.host_bytes, held.is_feasible)


def _sweep_row(size: Size, value: int, survey: Survey) -> SweepRow:
    return SweepRow(
        size=size,
        value=value,
        is_planned=survey.is_planned(size),
        planned_bytes={call.name: survey.ledger.value(call.at(size), "planned") for call in survey.calls},
        total_bytes={
            residence: {column: survey.bottleneck(size, column, residence)[1] for column in COLUMNS}
            for residence in RESIDENCES
        },
    )


def _notes(rows: tuple[ComponentRow, ...], calls: list[Call], question: Question) -> list[str]:
    """What the figures leave out, and why some differ from what was asked."""
    called = {call.component.name for call in calls}
    idle = [row.name for row in rows if row.name not in called and row.weight_bytes is not None]
    unknown = [f"{row.name} ({row.class_name})" for row in rows if row.weight_bytes is None]
    wide = [call.name for call in calls if call.dtype != str(question.dtype).removeprefix("torch.")]
    found = []
    if idle:
        found.append(f"Of {', '.join(idle)} only the weights are counted, not what a run of them holds.")
    if unknown:
        found.append(f"The weights of {', '.join(unknown)} are not known here and not counted; install transformers.")
    if wide:
        found.append(f"{', '.join(wide)} runs in float32, weights included, as the diffusion pipeline upcasts it.")
    if any(call.kind == "decode" for call in calls):
        found.append("The VAE decodes the whole clip at once; eagerly, a smaller decode_chunk_size holds less.")
    workspace = bytes_text(ASSUMED_WORKSPACE_BYTES)
    found.append(f"Totals hold {workspace} for what CUDA's libraries take beside tensors: an assumption.")
    return found


def at_size(model: Model, frames: int | None, height: int | None, width: int | None) -> Model:
    """The model with another clip; None keeps what is usual for it."""
    given = {"frames": frames, "height": height, "width": width}
    return replace(model, size=replace(model.size, **{name: v for name, v in given.items() if v is not None}))
