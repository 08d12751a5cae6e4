"""What a peak is made of, and what could be done about each part, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmecompile.report.drawing import bytes_text

if TYPE_CHECKING:
    from fmecompile.graph.plan import Owner, Plan


@dataclass(frozen=True)
class Part:
    """Bytes that are held at the peak: what they are, and what makes them fewer."""

    name: str
    nbytes: int
    about: str
    advice: str


def parts_of(plan: Plan, others: Sequence[Part] = ()) -> tuple[Part, ...]:
    """The peak of a call in parts, weights and inputs included; ``others`` lie on the device beside it. The parts of
    the activations add up to the projected peak. Parts of no bytes are left out."""
    found = (*_given(plan), *_activations(plan), *others)
    return tuple(part for part in found if part.nbytes)


def _given(plan: Plan) -> Iterator[Part]:
    yield Part(
        "Weights",
        plan.weight_bytes,
        "Parameters and buffers of the module; they are read in place.",
        "Half precision halves those of float32. With enable_model_cpu_offload() a pipeline keeps only the weights of "
        "the model that runs on the device.",
    )
    yield Part(
        "Inputs",
        plan.input_bytes,
        "Tensors that the caller gave.",
        "Fewer frames, a smaller height and width, or a smaller batch.",
    )


def _activations(plan: Plan) -> Iterator[Part]:
    by_role = {role: [owner for owner in plan.owners if owner.role == role] for role in _ROLES}
    for role, (name, about) in _ROLES.items():
        owners = by_role[role]
        yield Part(name, sum(owner.nbytes for owner in owners), about + _largest(owners), _advice(role, plan))
    yield Part(
        "Held all along",
        plan.beside_bytes,
        "Buffers of CUDA graphs, or what all steps of a generation share.",
        "Without cuda_graphs=True there are no such buffers.",
    )
    told = sum(owner.nbytes for owner in plan.owners) + plan.beside_bytes
    yield Part(
        "Found by the check",
        plan.projected_peak_bytes - told if plan.owners else 0,
        "More than the memory model says: the finished program held it on fake tensors.",
        "Nothing: the projection states the larger of both.",
    )


_ROLES = {
    "waiting": (
        "Skip connections and other values that wait",
        "Made before, read later; the call at the peak does not touch them.",
    ),
    "operand": ("Working set: what the call reads", "Operands of the call or the loop that runs at the peak, whole."),
    "result": ("Working set: what the call returns", "Results of the call or the loop that runs at the peak, whole."),
    "running": (
        "Working set: while it runs",
        "Values inside one trip of the loop, or the workspace of the one call, that runs at the peak.",
    ),
    "smaller": ("Smaller values", "Values that are too small to list one by one."),
}


def _largest(owners: Sequence[Owner]) -> str:
    if not owners or owners[0].role not in ("waiting", "operand"):
        return ""
    shown = [f"{bytes_text(o.nbytes)} from {o.made_in or 'the module'}{_until(o)}" for o in owners[:2]]
    return f" The largest: {'; '.join(shown)}."


def _until(owner: Owner) -> str:
    return f", read next in {owner.read_in}" if owner.read_in else ""


def _advice(role: str, plan: Plan) -> str:
    if role == "waiting":
        return _about_waiting(plan)
    if role in ("smaller", "result"):
        return "Fewer frames or a smaller picture; no loop makes it smaller."
    if role == "operand":
        return (
            "A loop reads its operands by slices, but each is there until the last trip. Where another layout allows "
            "it, the result takes over the storage of an operand that dies."
        )
    if plan.floor_bytes < 0.995 * plan.projected_peak_bytes:
        return (
            f"A memory_budget that leaves less for activations, {bytes_text(plan.floor_bytes)} at least, takes smaller "
            "chunks: more trips, more time."
        )
    return "The plan is at its floor: smaller chunks would not lower the peak. A rule for a barrier near it might."


def _about_waiting(plan: Plan) -> str:
    if plan.spilled:
        return f"{len(plan.spilled)} values wait in host memory already: {plan.transfer}."
    return (
        "No loop can slice away what is read later. Under a memory_budget that nothing else meets they wait in host "
        "memory (spill=True), which costs transfers."
    )
