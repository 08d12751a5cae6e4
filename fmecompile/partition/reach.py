"""How far the trips of a loop reach beyond their chunk: the halos of every value, and the rows each trip makes of it.

A convolution in a loop over rows needs rows of its operand beyond the chunk, and so, walking backward, does every call
in front of it. A trip makes those rows again (its neighbour makes them too), clipped where the tensor ends. Only the
innermost atom of a nest may have halos.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import fx

from fmecompile.analysis.axes import GraphAxes, Use
from fmecompile.operators.registry import Axes, Halo
from fmecompile.partition.layout import unit_of

Rows = tuple[int, int]
"""First row and the one behind the last, in rows of a dimension."""


@dataclass(frozen=True)
class Reach:
    """Halos of one loop over ``atom``, in rows of the dimension that has it: ``made`` of the values of the loop, and
    ``wanted`` by the n-th use of a node."""

    atom: int
    sizes: dict[int, int]
    axes: GraphAxes
    made: dict[fx.Node, Halo]
    wanted: dict[tuple[fx.Node, int], Halo]

    @property
    def has_halo(self) -> bool:
        return any(halo != (0, 0) for halo in self.wanted.values())

    def rows_made(self, node: fx.Node, start: int, rows: int) -> Rows | None:
        """The rows of ``node`` that the trip over ``[start, start + rows)`` makes; None when it makes all of it."""
        return self._rows(self.axes[node].axes, self.made.get(node, (0, 0)), start, rows)

    def rows_wanted(self, node: fx.Node, n: int, start: int, rows: int) -> tuple[Rows, Halo] | None:
        """The rows of its operand that the n-th use of ``node`` reads, and how many that it wants before and after
        those do not exist; None when that operand is read whole."""
        use = self.axes[node].uses[n]
        made = self.rows_made(node, start, rows)
        theirs, mine = (
            unit_of(kept_axes(use), self.atom, self.sizes),
            unit_of(self.axes[node].axes, self.atom, self.sizes),
        )
        if made is None or theirs is None or mine is None:
            return None
        before, after = halo_of(use, self.atom)
        first, last = made[0] * theirs // mine - before, -(-made[1] * theirs // mine) + after
        end = self.sizes[self.atom] * theirs
        return (max(first, 0), min(last, end)), (max(-first, 0), max(last - end, 0))

    def kind(self, start: int, rows: int) -> tuple[int, ...]:
        """Equal for trips that make the same shapes with the same borders."""
        whole = self.sizes[self.atom]
        reaches = sorted({(halo, self._unit(node, n)) for (node, n), halo in self.wanted.items() if halo != (0, 0)})
        clipped = ((min(b, start * unit), min(a, (whole - start - rows) * unit)) for (b, a), unit in reaches)
        return (rows, *(row for pair in clipped for row in pair))

    def _unit(self, node: fx.Node, n: int) -> int:
        return unit_of(kept_axes(self.axes[node].uses[n]), self.atom, self.sizes) or 1

    def _rows(self, axes: Axes, halo: Halo, start: int, rows: int) -> Rows | None:
        unit = unit_of(axes, self.atom, self.sizes)
        if unit is None:
            return None
        return max(start * unit - halo[0], 0), min((start + rows) * unit + halo[1], self.sizes[self.atom] * unit)


def kept_axes(use: Use) -> Axes:
    """The axes of the dimensions a use keeps; the others are read whole."""
    return tuple(axis for d, axis in enumerate(use.axes) if d in use.kept_dims)


def halo_of(use: Use, atom: int) -> Halo:
    """The halo of a use along ``atom``."""
    return next((halo for d, halo in use.halo if atom in use.axes[d]), (0, 0))


def reach(
    inside: Sequence[fx.Node], members: Collection[fx.Node], atom: int, axes: GraphAxes, sizes: dict[int, int]
) -> Reach:
    """Halos of the calls ``inside``, in execution order, of a loop over ``atom``."""
    made: dict[fx.Node, Halo] = {}
    wanted: dict[tuple[fx.Node, int], Halo] = {}
    for node in reversed(inside):
        mine = unit_of(axes[node].axes, atom, sizes)
        if mine is None:
            continue
        need = made.get(node, (0, 0))
        for n, use in enumerate(axes[node].uses):
            theirs = unit_of(kept_axes(use), atom, sizes)
            if theirs is None:
                continue
            ratio = Fraction(theirs, mine)
            core = tuple(-(-rows * ratio // 1) for rows in need)
            need = (int(core[0] / ratio), int(core[1] / ratio))
            halo = halo_of(use, atom)
            wanted[node, n] = (int(core[0]) + halo[0], int(core[1]) + halo[1])
            if use.node in members:
                before, after = made.get(use.node, (0, 0))
                made[use.node] = (max(before, wanted[node, n][0]), max(after, wanted[node, n][1]))
        made[node] = need
    return Reach(atom, sizes, axes, made, wanted)
