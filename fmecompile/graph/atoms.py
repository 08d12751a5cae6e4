"""Axis atoms: the named pieces of an axis that operators share.

Every dimension of every tensor is a list of atoms, outermost first; the product of their sizes is the size of the
dimension, and a dimension of size 1 has none. Operators that keep an axis *unify* the atoms of their operands and
results; a reshape that cuts an axis *splits* an atom in two. The table is a union-find whose roots may be refined:
``28`` unified with ``[2, 14]`` becomes those two wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

Axis = tuple[int, ...]
"""The atoms of one dimension, outermost first."""


class AtomTable:
    """Creates, unifies, splits and resolves atoms."""

    def __init__(self) -> None:
        self._size: list[int] = []
        self._parent: list[int] = []
        self._parts: dict[int, Axis] = {}

    def fresh(self, size: int) -> Axis:
        """A new axis of ``size``: one atom, or none when the size is 1."""
        if size == 1:
            return ()
        self._size.append(size)
        self._parent.append(len(self._parent))
        return (len(self._parent) - 1,)

    def size(self, atom: int) -> int:
        return self._size[self._find(atom)]

    def extent(self, axis: Iterable[int]) -> int:
        """The number of rows of ``axis``."""
        return prod(self.size(atom) for atom in axis)

    def resolve(self, axis: Iterable[int]) -> Axis:
        """``axis`` in today's finest atoms."""
        found: list[int] = []
        for atom in axis:
            root = self._find(atom)
            parts = self._parts.get(root)
            found.extend((root,) if parts is None else self.resolve(parts))
        return tuple(found)

    def unify(self, left: Iterable[int], right: Iterable[int]) -> bool:
        """Make two axes of equal extent the same; False when neither divides the other where they differ.

        What was unified before a failure stays: outer digits of equal extent do agree.
        """
        a, b = list(self.resolve(left)), list(self.resolve(right))
        while a and b:
            x, y = a[0], b[0]
            if x != y:
                sx, sy = self._size[x], self._size[y]
                if sx == sy:
                    self._parent[y] = x
                elif sx % sy == 0:
                    self.split(x, sy)
                    a, b = list(self.resolve(a)), list(self.resolve(b))
                    continue
                elif sy % sx == 0:
                    self.split(y, sx)
                    a, b = list(self.resolve(a)), list(self.resolve(b))
                    continue
                else:
                    return False
            a, b = list(self.resolve(a[1:])), list(self.resolve(b[1:]))
        return not a and not b

    def split(self, atom: int, outer: int) -> Axis:
        """Cut ``atom`` into ``[outer, size / outer]`` everywhere."""
        root = self._find(atom)
        size = self._size[root]
        assert size % outer == 0 and root not in self._parts
        self._parts[root] = self.fresh(outer) + self.fresh(size // outer)
        return self._parts[root]

    def regroup(self, axis: Iterable[int], sizes: Sequence[int]) -> list[Axis] | None:
        """Distribute ``axis`` over dimensions of ``sizes``, splitting atoms at cuts; None if one cannot be split."""
        rest = list(self.resolve(axis))
        dims: list[Axis] = []
        for size in sizes:
            taken: list[int] = []
            missing = size
            while missing > 1:
                if not rest:
                    return None
                here = self._size[rest[0]]
                if missing % here == 0:
                    taken.append(rest.pop(0))
                    missing //= here
                elif here % missing == 0:
                    self.split(rest[0], missing)
                    rest = list(self.resolve(rest))
                else:
                    return None
            dims.append(tuple(taken))
        return dims if not rest else None

    def _find(self, atom: int) -> int:
        root = atom
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[atom] != root:
            self._parent[atom], atom = root, self._parent[atom]
        return root
