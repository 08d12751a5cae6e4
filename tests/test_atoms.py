"""Atom tables: whatever is unified, split or regrouped, axes keep their extents and stay what they were."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fmecompile.graph.atoms import AtomTable, Axis

quick = settings(max_examples=150, deadline=None, derandomize=True)
sizes = st.integers(1, 12)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def factorisations(draw: st.DrawFn, numel: int) -> list[int]:
    """Sizes whose product is ``numel``."""
    found: list[int] = []
    while numel > 1 and len(found) < 5:
        found.append(draw(st.sampled_from(divisors(numel))))
        numel //= found[-1]
    return [*found, numel]


@st.composite
def pieces(draw: st.DrawFn) -> tuple[AtomTable, Axis, list[int]]:
    """One axis of several atoms in a fresh table, and their sizes."""
    table = AtomTable()
    extents = draw(st.lists(sizes, min_size=1, max_size=4))
    return table, tuple(atom for size in extents for atom in table.fresh(size)), extents


def consistent(table: AtomTable, axes: list[Axis], extents: list[int]) -> None:
    """Extents hold, and resolving is final: every resolved atom is a root of at least two rows."""
    for axis, extent in zip(axes, extents, strict=True):
        resolved = table.resolve(axis)
        assert table.extent(resolved) == extent
        assert table.resolve(resolved) == resolved
        assert all(table.size(atom) > 1 for atom in resolved)


def test_one_row_has_no_atom() -> None:
    table = AtomTable()
    assert table.fresh(1) == ()
    assert table.extent(()) == 1


@quick
@given(pieces())
def test_resolving_twice_changes_nothing(case: tuple[AtomTable, Axis, list[int]]) -> None:
    table, axis, extents = case
    consistent(table, [axis], [prod(extents)])


@quick
@given(st.data(), st.integers(2, 240))
def test_split_keeps_the_extent_everywhere(data: st.DataObject, size: int) -> None:
    table = AtomTable()
    (atom,), (twin,) = table.fresh(size), table.fresh(size)
    assert table.unify((atom,), (twin,))
    outer = data.draw(st.sampled_from(divisors(size)))
    assume(1 < outer < size)
    parts = table.split(twin, outer)
    assert [table.size(part) for part in parts] == [outer, size // outer]
    assert table.resolve((atom,)) == table.resolve((twin,)) == parts
    consistent(table, [(atom,), (twin,)], [size, size])


@quick
@given(st.data())
def test_regroup_there_and_back(data: st.DataObject) -> None:
    """Any factorisation of one atom can be regrouped into one dimension, and back into itself."""
    table = AtomTable()
    numel = data.draw(st.integers(1, 360))
    axis = table.fresh(numel)
    first = data.draw(factorisations(numel))
    there = table.regroup(axis, first)
    assert there is not None
    assert [table.extent(part) for part in there] == first
    flat = tuple(atom for part in there for atom in part)
    assert table.regroup(flat, [numel]) == [table.resolve(axis)]
    assert table.regroup(flat, first) == [table.resolve(part) for part in there]


@quick
@given(st.data())
def test_two_factorisations_agree_or_are_refused(data: st.DataObject) -> None:
    """A second regroup gives dimensions of the sizes asked for, over the same atoms in the same order, or None."""
    table = AtomTable()
    numel = data.draw(st.integers(2, 360))
    axis = table.fresh(numel)
    first, second = data.draw(factorisations(numel)), data.draw(factorisations(numel))
    parts = table.regroup(axis, first)
    assert parts is not None
    again = table.regroup(axis, second)
    nested = all(b % a == 0 or a % b == 0 for a in _cuts(first) for b in _cuts(second))
    assert (again is not None) == nested
    consistent(table, [axis, *parts], [numel, *first])
    if again is not None:
        assert tuple(atom for part in again for atom in table.resolve(part)) == table.resolve(axis)
        consistent(table, again, second)


def _cuts(sizes: list[int]) -> list[int]:
    """The strides at which a factorisation cuts."""
    return [prod(sizes[k:]) for k in range(len(sizes) + 1)]


@quick
@given(st.data(), st.integers(1, 360))
def test_unify_makes_equal_what_can_be(data: st.DataObject, numel: int) -> None:
    table = AtomTable()
    first, second = data.draw(factorisations(numel)), data.draw(factorisations(numel))
    left = tuple(atom for size in first for atom in table.fresh(size))
    right = tuple(atom for size in second for atom in table.fresh(size))
    same = table.unify(left, right)
    assert same == all(b % a == 0 or a % b == 0 for a in _cuts(first) for b in _cuts(second))
    consistent(table, [left, right], [numel, numel])
    if same:
        assert table.resolve(left) == table.resolve(right)
    assert table.unify(left, right) == same
    assert table.unify(right, left) == same


@quick
@given(st.data())
def test_a_history_of_unifying_and_splitting_keeps_every_extent(data: st.DataObject) -> None:
    """Axes of equal extent, made the same and cut in any order, keep their extents; equal ones stay equal."""
    table = AtomTable()
    extents = data.draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12, 24]), min_size=2, max_size=6))
    axes = [table.fresh(extent) for extent in extents]
    equal: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        i, j = data.draw(st.integers(0, len(axes) - 1)), data.draw(st.integers(0, len(axes) - 1))
        if extents[i] == extents[j] and data.draw(st.booleans()):
            if table.unify(axes[i], axes[j]):
                equal.append((i, j))
        else:
            table.regroup(axes[i], data.draw(factorisations(extents[i])))
        consistent(table, axes, extents)
        assert all(table.resolve(axes[a]) == table.resolve(axes[b]) for a, b in equal)


def test_28_unified_with_2_and_14_is_those_two_everywhere() -> None:
    table = AtomTable()
    frames, other = table.fresh(28), table.fresh(28)
    assert table.unify(frames, other)
    batch, rest = table.fresh(2), table.fresh(14)
    assert table.unify(frames, batch + rest)
    assert table.resolve(other) == table.resolve(batch + rest)


@pytest.mark.parametrize("wanted", [[4, 6], [3, 8], [6, 4]])
def test_an_indivisible_cut_is_refused(wanted: list[int]) -> None:
    """[2, 12] can become [4, 6] but [2, 3, 4] cannot become [4, 6]."""
    table = AtomTable()
    axis = tuple(atom for size in (2, 3, 4) for atom in table.fresh(size))
    possible = {4: False, 3: False, 6: True}[wanted[0]]
    assert (table.regroup(axis, wanted) is not None) == possible
    other = tuple(atom for size in wanted for atom in table.fresh(size))
    assert table.unify(axis, other) == possible


def test_sizes_that_do_not_fit_are_refused() -> None:
    table = AtomTable()
    assert table.regroup(table.fresh(6), [2, 2]) is None
    assert table.regroup(table.fresh(6), [2, 3, 2]) is None
    assert table.regroup(table.fresh(6), [4]) is None
    assert table.regroup(table.fresh(6), [3]) is None
    assert table.regroup((), [2]) is None
    assert not table.unify(table.fresh(6), table.fresh(3))
