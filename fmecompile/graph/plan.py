"""The plan: every decision of one compilation, frozen, readable, saved as JSON and replayed without a search.

Three words for bytes: *allowed* (what the search was given) >= *projected* (what the plan says) >= *measured*.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmecompile.config import write_whole
from fmecompile.errors import PlanMismatch
from fmecompile.graph.outline import EMPTY, Outline, bands, parts
from fmecompile.graph.plan_json import decoded, parsed

if TYPE_CHECKING:
    from fmecompile.runtime.measure import Measurement

FORMAT = 6


RUNNING, RESULT, OPERAND, WAITING, SMALLER = "running", "result", "operand", "waiting", "smaller"


@dataclass(frozen=True)
class Owner:
    """Something that is held at the peak, with the module that made it and the next one that reads it. ``role``: what
    the call that runs then has to do with it (``RUNNING``: it holds that for itself; its ``RESULT`` or ``OPERAND``;
    ``WAITING`` for a later call). ``SMALLER`` stands for all that are too small to list."""

    name: str
    nbytes: int
    role: str
    made_in: str = ""
    read_in: str = ""


@dataclass(frozen=True)
class PlannedAxis:
    """A loop axis: the atom found at part ``part`` of dimension ``dim`` of the value ``node``; ``size`` rows handled
    ``chunk`` at a time."""

    node: str
    dim: int
    part: int
    size: int
    chunk: int

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= self.size:
            raise ValueError(f"{self.chunk} rows of {self.size} are no chunk")

    @property
    def trips(self) -> int:
        return -(-self.size // self.chunk)


@dataclass(frozen=True)
class PlannedGroup:
    """One run of operators executed as one chunk loop; ``extra_s`` is by how much that is slower than the operators run
    whole, which take ``whole_s``, both projected. ``slots`` trips are under way at once, all within
    ``peak_bytes``."""

    first: str
    last: str
    axes: tuple[PlannedAxis, ...]
    modules: tuple[str, ...]
    operators: tuple[str, ...]
    peak_bytes: int
    whole_bytes: int
    taken_over: int
    extra_s: float
    whole_s: float
    because: str
    slots: int = 1

    @property
    def trips(self) -> int:
        """Chunk count: how often the body runs."""
        count = 1
        for axis in self.axes:
            count *= axis.trips
        return count


@dataclass(frozen=True)
class PlanKey:
    """What a plan belongs to: the normalised graph (model, shapes, dtypes) and the versions that made it."""

    graph: str
    signature: str
    torch: str
    fmecompile: str


@dataclass(frozen=True)
class Barrier:
    """Why an operator cannot be sliced: ``count`` operators ``operator`` give ``reason``; ``where`` is one of them."""

    operator: str
    reason: str
    count: int
    where: str


@dataclass(frozen=True)
class Transfer:
    """What moves to host memory and back during one call, and how long that and the computing beside it take: at rates
    of the device where they are measured, else at assumed ones."""

    out_bytes: int
    back_bytes: int
    copy_s: float
    compute_s: float
    is_measured: bool

    @property
    def exposed_s(self) -> float:
        """By how much a call gets longer at least, however well copies overlap."""
        return max(self.copy_s - self.compute_s, 0.0)

    def __str__(self) -> str:
        gib, rates = 2**30, "measured" if self.is_measured else "assumed"
        cost = f"costs {self.exposed_s:.3f} s a call" if self.exposed_s else "hidden"
        return (
            f"{self.out_bytes / gib:.3f} GiB to host memory, {self.back_bytes / gib:.3f} GiB back: {self.copy_s:.3f} s "
            f"beside {self.compute_s:.3f} s of computing at {rates} rates: {cost}"
        )


@dataclass(frozen=True)
class Plan:
    """All decisions for one module and one input signature. Byte counts are activations: weights and inputs apart.

    ``eager_peak_bytes`` is what the unmodified module holds (0 when it was not asked for), ``allowed_bytes`` the limit
    of the search, ``projected_peak_bytes`` what the compiled program holds at most, ``floor_bytes`` the least peak that
    was found at any number of trips. ``recomputed`` names the moments of GroupNorms whose operands are made twice,
    ``spilled`` the values that wait in host memory, each with the call from which on it is read back;
    ``joined`` the GroupNorms outside loops that run whole. ``eager_s`` is how long the unmodified module
    takes, ``whole_s`` how long all operators of the rewritten graph take run whole, projected at measured or assumed
    rates of the device: where they are measured, and no other program is running.

    ``timeline`` has an entry a call of the compiled program, a loop being one; ``durations_s`` is how long each takes,
    projected. ``eager_timeline`` has the maxima of equal stretches, and ``eager_bands`` tells which module each of its
    entries is of. ``beside_bytes`` of the peak are held all along, and are in no timeline. ``before`` is the graph as
    it was captured, ``after`` the one that runs.
    """

    key: PlanKey
    groups: tuple[PlannedGroup, ...]
    projected_peak_bytes: int
    allowed_bytes: int
    floor_bytes: int
    eager_peak_bytes: int
    weight_bytes: int
    input_bytes: int
    owners: tuple[Owner, ...]
    timeline: tuple[int, ...]
    eager_timeline: tuple[int, ...]
    barriers: tuple[Barrier, ...]
    recomputed: tuple[str, ...] = ()
    spilled: tuple[tuple[str, str], ...] = ()
    joined: tuple[str, ...] = ()
    whole_s: float = 0.0
    eager_s: float = 0.0
    transfer: Transfer | None = None
    durations_s: tuple[float, ...] = ()
    eager_bands: tuple[tuple[str, int], ...] = ()
    beside_bytes: int = 0
    before: Outline = EMPTY
    after: Outline = EMPTY

    @property
    def trips(self) -> int:
        """Chunk trips of one call of the whole program."""
        return sum(group.trips for group in self.groups)

    @property
    def pipelined(self) -> int:
        """Groups whose trips overlap."""
        return sum(group.slots > 1 for group in self.groups)

    @property
    def extra_s(self) -> float:
        """By how much the loops are slower than their operators run whole, projected; what caches save is not in it."""
        return sum(group.extra_s for group in self.groups)

    @property
    def projected_s(self) -> float:
        """How long a call takes."""
        return self.whole_s + self.extra_s

    @property
    def bands(self) -> tuple[tuple[str, int], ...]:
        """Which module the entries of ``timeline`` are of: its path, and the place of its first."""
        paths = self.after.paths()
        return bands(paths, self.modules()) if len(paths) == len(self.timeline) else ()

    def modules(self) -> tuple[str, ...]:
        """The modules that divide the graph for a reader."""
        return parts(self.before.paths())

    def beside(self, nbytes: int) -> Plan:
        """The same while so many bytes more are held."""
        more = {"projected_peak_bytes", "allowed_bytes", "floor_bytes", "beside_bytes"}
        return replace(self, **{name: getattr(self, name) + nbytes for name in more})

    def to_json(self) -> str:
        """A line a field; :meth:`from_json` reads it."""
        data = {"format": FORMAT, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}
        lines = (f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in data.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanMismatch when ``text`` is not a plan of this format."""
        data = parsed(text)
        if data.pop("format", None) != FORMAT:
            raise PlanMismatch(f"not a plan of format {FORMAT}", next_step="make it again with fmecompile.plan")
        return decoded(cls, data)

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises PlanMismatch for what is no plan of this format, and OSError where the file cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PlanMismatch(f"not a plan: {error}", next_step="make it again with fmecompile.plan") from error
        return cls.from_json(text)

    def summary(self) -> str:
        """One paragraph a person can read, then a line a group."""
        gib = 2**30
        eager = f"{self.eager_peak_bytes / gib:.3f} GiB eager, " if self.eager_peak_bytes else ""
        lines = [
            f"activations: {eager}{self.projected_peak_bytes / gib:.3f} GiB projected "
            f"({self.allowed_bytes / gib:.3f} allowed, floor {self.floor_bytes / gib:.3f}); "
            f"weights {self.weight_bytes / gib:.3f} GiB, inputs {self.input_bytes / gib:.3f} GiB",
            f"{len(self.groups)} groups, {self.trips} chunk trips; eager {self.eager_s:.3f} s, run whole "
            f"{self.whole_s:.3f} s, loops {self.extra_s:+.3f} s (projected)",
            *([f"{self.pipelined} groups are pipelined: their trips overlap"] if self.pipelined else []),
            *([f"{len(self.recomputed)} values are made twice"] if self.recomputed else []),
            *([f"{len(self.spilled)} values wait in host memory: {self.transfer}"] if self.transfer else []),
        ]
        for group in self.groups:
            nest = " x ".join(f"{axis.size}/{axis.chunk}" for axis in group.axes)
            slots = f"  {group.slots} at once" if group.slots > 1 else ""
            lines.append(
                f"  {group.trips:>4} trips over {nest:<14} {len(group.operators):>3} operators  "
                f"{group.whole_bytes / gib:.3f} -> {group.peak_bytes / gib:.3f} GiB  "
                f"{group.whole_s * 1e3:.1f} {group.extra_s * 1e3:+.1f} ms{slots}  {', '.join(group.modules)}"
            )
        return "\n".join(lines)

    def to_html(self, path: str | Path, measured: Measurement | None = None) -> None:
        """Write a self-contained page: memory timelines, what the peak is made of, groups, barriers, graphs. Times of
        loops are shown too, where ``measured`` has them: what ``fmecompile.measure`` returned for the optimized module.
        """
        from fmecompile.report.plan_page import Sheet, write_page

        sheet = Sheet(self, group_s={} if measured is None else measured.group_s)
        write_page(Path(path), "Memory plan", "", [sheet])

    def to_trace(self, path: str | Path, measured: Measurement | None = None) -> None:
        """Write a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: slices of modules, chunk loops and trips,
        and the bytes of activations as a counter. Times are projected; ``measured``, what ``fmecompile.measure``
        returned for the optimized module, adds measured ones.
        """
        from fmecompile.report.trace import write_trace

        write_trace(self, Path(path), measured)


def _plain(value: Any) -> Any:
    """What JSON takes, without copying what it takes as it is: outlines have thousands of rows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(item) for item in value] if value and isinstance(value, tuple) and is_dataclass(value[0]) else value
