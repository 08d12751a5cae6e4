"""Sets of values that a step may take together from an earlier one: what each keeps in bytes, and what it saves.

Where several values together separate a graph, no single one of them need save anything: the skip connections of a
UNet, the branches of a transformer. Sets are minimum cuts (separation.py) under one condition: along some path from the
clip to the output everything runs, or a step would repeat the last one. Only values that the clip reaches are kept;
what the timestep alone makes takes no work worth an outdated one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import fx

from fmecompile.analysis.separation import Flow, separations, ways
from fmecompile.budget import mib, parse_bytes
from fmecompile.errors import OptionError

if TYPE_CHECKING:
    from fmecompile.analysis.cuts import Cuts, CutValue

LEAST = 0.001
"""A set is on the list where it saves this share of all work more than every smaller one."""

CLEARLY = 0.01
"""Sets that save as much within this share of all work are as good as one another; the smallest is taken."""


@dataclass(frozen=True)
class CutSet:
    """Values that are taken together, in the order of the graph, their bytes, the share of all work that a step saves
    which takes them, and the modules that still compute something in it: whole ones by their outermost path, parts of
    others by their own; those with the most work first."""

    values: tuple[CutValue, ...]
    nbytes: int
    saved: float
    running: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Whose results the values are."""
        return tuple(dict.fromkeys(value.module or value.value for value in self.values))

    @property
    def names(self) -> frozenset[str]:
        """The names of its nodes."""
        return frozenset(value.value for value in self.values)


class CutSets:
    """The sets of one program's values that are worth keeping."""

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = cuts
        self._results = {node: module for node, module in cuts.results if node in cuts.moving}

    @cached_property
    def singles(self) -> tuple[CutValue, ...]:
        """The values on offer, alone, that save at least ``LEAST``; the most saved first."""
        moving = {node.name for node in self._results}
        return tuple(value for value in self._cuts.offered() if value.value in moving and value.saved >= LEAST)

    @cached_property
    def listed(self) -> tuple[CutSet, ...]:
        """Bytes rising, work saved rising: what saves no more than a smaller set is left out."""
        found = [((value,), value.nbytes, value.saved) for value in self.singles]
        several = (self._values(kept) for kept in self._separated() if len(kept) > 1)
        found += [(values, sum(v.nbytes for v in values), self._cuts.saved_by(values)) for values in several]
        best, listed = 0.0, []
        for values, _, saved in sorted(found, key=lambda one: (one[1], -one[2], len(one[0]))):
            if saved > best + LEAST:
                best = saved
                listed.append(self.of(values))
        return tuple(listed)

    def _separated(self) -> Iterator[frozenset[fx.Node]]:
        """Sets of values on the hull of bytes and work, for every way that the clip may take."""
        cuts = self._cuts
        flow = Flow(
            {node: node.all_input_nodes for node in cuts.nodes},
            cuts.products,
            {node: cuts.cut_value(node, module).nbytes for node, module in self._results.items()},
            [value for value in cuts.program.outputs if isinstance(value, fx.Node) and value in cuts.products],
        )
        entries = {user for clip in cuts.clips for user in clip.users}
        for way in ways(flow, entries):
            for found in separations(flow, way, int(LEAST * cuts.work)):
                yield found.kept

    def _values(self, kept: Iterable[fx.Node]) -> tuple[CutValue, ...]:
        ordered = sorted(kept, key=self._cuts.place.__getitem__)
        return tuple(self._cuts.cut_value(node, self._results[node]) for node in ordered)

    def of(self, values: Sequence[CutValue]) -> CutSet:
        """``values`` as a set."""
        nbytes = sum({value.value: value.nbytes for value in values}.values())
        return CutSet(tuple(values), nbytes, self._cuts.saved_by(values), tuple(self._running(values)))

    def _running(self, values: Iterable[CutValue]) -> list[str]:
        """Modules all of whose work is left, the outermost, and what is left outside of those."""
        running = self._cuts.running({value.value: value.source for value in values})
        left, stopped = [node for node in self._cuts.nodes if self._cuts.products[node]], set[str]()
        for node in left:
            stopped.update(self._cuts.paths[node] if node not in running else ())
        work: dict[str, int] = {}
        for node in left:
            if node in running:
                paths = self._cuts.paths[node]
                path = next((path for path in paths if path not in stopped), paths[-1] if paths else node.name)
                work[path] = work.get(path, 0) + self._cuts.products[node]
        return sorted(work, key=lambda path: -work[path])

    def within(self, limit_bytes: int, copies: int = 1) -> CutSet:
        """What saves most of that which ``copies`` of fit in ``limit_bytes``; of those that save as much within
        ``CLEARLY``, the smallest.

        Raises OptionError where nothing fits, with the smallest there is.
        """
        fitting = [one for one in self.listed if one.nbytes * copies <= limit_bytes]
        if fitting:
            return next(one for one in fitting if one.saved >= fitting[-1].saved - CLEARLY)
        if not self.listed:
            raise OptionError("no value of this model can be reused", next_step="leave out reuse")
        least, nbytes = self.listed[0], self.listed[0].nbytes * copies
        raise OptionError(
            f"nothing that this model could reuse fits in {mib(limit_bytes)}",
            next_step=f"allow {nbytes} bytes ({mib(nbytes)}) for {', '.join(least.modules)}, or more",
        )

    def automatic(self, single: CutValue) -> CutSet:
        """``single``, or what saves clearly more within its bytes."""
        fitting = [one for one in self.listed if one.nbytes <= single.nbytes]
        if fitting and fitting[-1].saved > single.saved + CLEARLY:
            return self.within(single.nbytes)
        return self.of([single])


def limit_of(name: str) -> int | None:
    """The bytes of ``auto:200MiB``; None for ``auto`` alone. Raises OptionError for anything else."""
    _, colon, amount = name.partition(":")
    try:
        return parse_bytes(amount) if colon else None
    except OptionError as error:
        raise OptionError(
            f"cut={name!r} names no limit: {error.fact}", next_step='give cut="auto:200MiB", or a number of bytes'
        ) from error
