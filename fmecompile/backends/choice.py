"""What a policy reuses and measures in one program, and the rewrites of that program for each kind of step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from fmecompile.analysis.cuts import Cuts, CutValue
from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.probes import Probes
from fmecompile.analysis.storages import storages
from fmecompile.backends.offer import NO_OFFER, Offer
from fmecompile.errors import OptionError
from fmecompile.graph.program import Kept, Program
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.passes.step_reuse import Cut, StepReuse
from fmecompile.reuse.policy import HOST, STORES, FeedbackPolicy, Policy, ProbePolicy
from fmecompile.reuse.steps import FULL, Decision
from fmecompile.runtime.change import Frames
from fmecompile.runtime.guidance import gap_bytes
from fmecompile.runtime.reusing import HEAD

_CROSSING = next(iter(HEAD))


@dataclass(frozen=True)
class Choice:
    """``cuts`` may be reused, and lie at ``values``, whose bytes are those that are stored, in host memory where
    ``is_on_host``; ``probes`` are measured, at ``watched``, whose frames are in ``frames``; ``crossing`` is what a
    step's head hands to its tail, where the policy decides in between. ``batch`` is that of the first clip,
    ``gap_bytes`` what is kept of the difference between the halves of guidance. ``offer`` is what could be reused
    instead."""

    cuts: tuple[Cut, ...]
    values: tuple[CutValue, ...]
    offer: Offer
    order: int
    batch: int
    gap_bytes: int = 0
    is_on_host: bool = False
    probes: tuple[Cut, ...] = ()
    watched: tuple[CutValue, ...] = ()
    frames: tuple[Frames, ...] = ()
    crossing: tuple[Cut, ...] = ()
    crossing_bytes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, program: Program, facts: FactTable) -> Choice:
        """Raises OptionError where a name stands for nothing, where nothing would be saved, and where values are as
        small as they would be stored."""
        if policy.is_lossless:
            return cls((), (), NO_OFFER, order=0, batch=0)
        cuts = Cuts(program)
        probes = Probes(cuts)
        watched, frames = _watched(policy, probes)
        has_head = policy.kind == "probe"
        head = probes.head(watched) if has_head else set()
        before = {node.name for node in head}
        chosen = {name: _chosen(policy, cuts, name, before) for name in policy.cuts}
        store = None if policy.store in (None, HOST) else getattr(torch, policy.store)
        named = {node.name: node for node in program.graph.nodes}
        found = [value for several in chosen.values() for value in several]
        values = tuple(_stored(value, tensor_spec(named[value.value]).dtype, store) for value in found)
        batch = tensor_spec(cuts.clips[0]).shape[0] if cuts.clips else 1
        order = policy.order if policy.mode == "forecast" else 0
        gap = sum(map(_gap_bytes, program.outputs)) if policy.needs_guidance else 0
        offer = Offer.of(cuts.sets, tuple(found), policy.alike)
        made = partial(cls, tuple(_named(chosen, store)), values, offer, order, batch, gap, policy.store == HOST)
        measured = tuple(Cut(f"(probe):{k}", v.value, "(probe)", v.source) for k, v in enumerate(watched))
        if not has_head:
            return made(measured, tuple(watched), frames)
        sources = {value.source for value in found}
        nodes = list(_crossing(program, head, sources, facts))
        crossing = tuple(Cut(f"{_CROSSING}:{k}", node.name, _CROSSING) for k, node in enumerate(nodes))
        nbytes = {cut.name: _nbytes(node) for cut, node in zip(crossing, nodes, strict=True)}
        return made(measured, tuple(watched), frames, crossing, nbytes)

    @property
    def components(self) -> dict[str, tuple[str, ...]]:
        """The names of the cuts of each component."""
        found: dict[str, tuple[str, ...]] = {}
        for cut in self.cuts:
            found[cut.component] = (*found.get(cut.component, ()), cut.name)
        return found

    @property
    def watched_bytes(self) -> int:
        """Bytes of what is measured."""
        return sum(value.nbytes for value in self.watched)

    def rewrite(self, program: Program, decision: Decision, facts: FactTable) -> str:
        """Turn a copy of the program into the variant of ``decision``; into its head for ``HEAD``."""
        if decision == HEAD:
            return StepReuse((*self.crossing, *self.probes), is_head=True).apply(program, facts)
        measured = self.probes if decision == FULL and not self.crossing else ()
        note = StepReuse((*self.cuts, *measured), decision, self.order).apply(program, facts)
        if self.crossing:
            note += "; behind the head: " + StepReuse(self.crossing, HEAD).apply(program, facts)
        return note

    def held_bytes(self, program: Program) -> int:
        """Bytes on the device that are kept while the variant ``program`` runs, beside its operands that are no kept
        values. Of what waits in host memory those are what it takes, or one value that differences are taken to."""
        taken = {binding.name for binding in program.bindings if isinstance(binding, Kept)}
        nbytes = {cut.name: value.nbytes for cut, value in zip(self.cuts, self.values, strict=True)}
        replaced = set() if self.order else set(program.keeps)
        held = taken & set(nbytes) if self.is_on_host else set(nbytes) - replaced
        kept = sum(nbytes[name] for name in held) * (self.order + 1)
        if self.is_on_host and self.order:
            kept = max(kept, *(nbytes.get(name, 0) for name in program.keeps), 0)
        crossing = sum(nbytes for name, nbytes in self.crossing_bytes.items() if name in taken)
        return kept + crossing + self.watched_bytes + self.gap_bytes


def _watched(policy: Policy, probes: Probes) -> tuple[list[CutValue], tuple[Frames, ...]]:
    """What a policy that decides as it goes measures. Raises OptionError where it wants motion and there are no
    frames."""
    if policy.kind == "static" or not isinstance(policy, (ProbePolicy, FeedbackPolicy)):
        return [], ()
    found = probes.named(policy.probe)
    if not isinstance(policy, FeedbackPolicy) or not policy.needs_motion:
        return found, ()
    frames = [probes.frames(value) for value in found]
    placed = tuple(frame for frame in frames if frame is not None)
    if len(placed) < len(frames):
        raise OptionError(
            f"{policy.probe!r} has no frames, so its motion cannot be told", next_step="watch another value"
        )
    return found, placed


def _chosen(policy: Policy, cuts: Cuts, component: str, head: set[str]) -> list[CutValue]:
    """The values of one component, without those that the head of every step computes anyway."""
    wanted = policy.cuts[component]
    if policy.needs_guidance and "auto:" in str(wanted):
        raise OptionError(
            f"{wanted!r} within its bytes would be other values where one branch of guidance is left out",
            next_step='name the values, or use cut="auto"',
        )
    copies = policy.order + 1 if policy.mode == "forecast" else 1
    found = [value for value in cuts.named(wanted, policy.mode, copies) if value.value not in head]
    if cuts.saved_by(found) <= 0:
        raise OptionError(
            f"{wanted!r} can be reused, and nothing would be saved by it",
            next_step='name a later value, or use cut="auto"',
        )
    return found


def _stored(value: CutValue, dtype: torch.dtype, store: torch.dtype | None) -> CutValue:
    """A value of ``dtype`` with the bytes that it has in ``store``. Raises OptionError where those are no fewer."""
    if store is None:
        return value
    if store.itemsize >= dtype.itemsize or not dtype.is_floating_point:
        smaller = [name for name in STORES if name != HOST and getattr(torch, name).itemsize < dtype.itemsize]
        told = ", ".join(map(repr, [*smaller, HOST]))
        raise OptionError(
            f"{value.module or value.value} is {dtype}, and kept as {store} it is no smaller",
            next_step=f"give store one of {told}, or None",
        )
    return replace(value, nbytes=value.nbytes * store.itemsize // dtype.itemsize)


def _named(chosen: Mapping[str, list[CutValue]], store: torch.dtype | None) -> Iterator[Cut]:
    for component, values in chosen.items():
        for k, value in enumerate(values):
            name = component if len(values) == 1 else f"{component}:{k}"
            yield Cut(name, value.value, component, value.source, store)


def _crossing(program: Program, head: set[fx.Node], sources: set[str | None], facts: FactTable) -> Iterator[fx.Node]:
    """The values of the head that the rest reads, in the order of the graph. Views are made again from what they are
    views of, so that no bytes cross twice; views of inputs and weights cost nothing."""
    nodes = [node for node in program.graph.nodes if node in head and node.op == "call_function"]
    roots = storages(nodes, (), facts).roots
    found: dict[fx.Node, None] = {}
    for node in nodes:
        if node.name in sources or any(user not in head for user in node.users):
            root = roots[node]
            found[root if isinstance(node_spec(root), TensorSpec) else node] = None
    yield from (node for node in found if node.op == "call_function")


def _gap_bytes(value: object) -> int:
    spec = tensor_spec(value) if isinstance(value, fx.Node) else None
    return gap_bytes(spec.numel, spec.dtype) if spec is not None else 0


def _nbytes(node: fx.Node) -> int:
    spec = tensor_spec(node)
    return spec.numel * spec.dtype.itemsize
