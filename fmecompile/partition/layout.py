"""Where atoms lie in memory: how a trip slices a tensor, and when one tensor may be laid over another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from math import prod

from fmecompile.graph.atoms import Axis
from fmecompile.graph.specs import TensorSpec
from fmecompile.operators.registry import Axes, Halo
from fmecompile.partition.region import atom_strides
from fmecompile.runtime.chunk_loop import Narrow, Slicing

Nest = tuple[int, ...]


def unit_of(axes: Axes, atom: int, sizes: dict[int, int]) -> int | None:
    """How many rows of its dimension one row of ``atom`` spans; None when no dimension has the atom."""
    for axis in axes:
        if atom in axis:
            return prod(sizes[inner] for inner in axis[axis.index(atom) + 1 :])
    return None


def local_shape(
    axes: Axes, nest: Nest, rows: Fraction | int, sizes: dict[int, int], kept: Collection[int] | None = None
) -> tuple[int, ...]:
    """The shape of one trip's slice: one row of outer atoms, ``rows`` of the innermost, other atoms whole.

    With a halo ``rows`` may be a fraction, as long as the dimension has a whole number of its own rows. Dimensions not
    in ``kept`` (all by default) stay whole.
    """
    return tuple(
        int(prod(_extent(atom, nest if kept is None or d in kept else (), rows, sizes) for atom in axis))
        for d, axis in enumerate(axes)
    )


def _extent(atom: int, nest: Nest, rows: Fraction | int, sizes: dict[int, int]) -> Fraction | int:
    if atom not in nest:
        return sizes[atom]
    return rows if atom == nest[-1] else 1


def slicing_of(
    axes: Axes,
    nest: Nest,
    chunk: int,
    sizes: dict[int, int],
    kept: Collection[int] | None = None,
    halo: Halo = (0, 0),
) -> Slicing | None:
    """How a trip slices a tensor with ``axes`` along the dimensions in ``kept``; None when the nest does not touch it.

    A dimension can be narrowed as it is when its looped atoms stand in front, single rows before the chunk; another one
    is viewed as its atoms first, and the body joins them again. ``halo`` is in rows of the innermost atom's dimension.
    """
    narrows: list[Narrow] = []
    shape: list[int] = []
    for d, axis in enumerate(axes):
        active = nest if kept is None or d in kept else ()
        is_whole = _is_contiguous_slice(axis, active, chunk if halo == (0, 0) else 2)
        for part in [axis] if is_whole else [(atom,) for atom in axis]:
            narrow = _narrow(len(shape), part, active, nest, sizes, _scaled(halo, axis, part, nest[-1], sizes))
            narrows += [narrow] if narrow else []
            shape.append(prod(sizes[atom] for atom in part))
    if not narrows:
        return None
    return Slicing(tuple(narrows), tuple(shape) if len(shape) > len(axes) else None)


def _scaled(halo: Halo, axis: Axis, part: Axis, atom: int, sizes: dict[int, int]) -> Halo:
    """A halo in rows of ``axis`` in rows of the part of it that has ``atom``."""
    whole, here = unit_of((axis,), atom, sizes), unit_of((part,), atom, sizes)
    if whole is None or here is None:
        return (0, 0)
    return (-(-halo[0] * here // whole), -(-halo[1] * here // whole))


def piece_spec(
    spec: TensorSpec, axes: Axes, slicing: Slicing, offsets: Sequence[int], rows: int, sizes: dict[int, int]
) -> TensorSpec:
    """What the trip at ``offsets`` gets of a tensor: its spec viewed as the slicing says, then narrowed."""
    shape, stride = spec.shape, spec.stride
    if slicing.shape is not None:
        shape, stride = slicing.shape, _viewed_strides(spec, axes, slicing.shape, sizes)
    lengths = dict(enumerate(shape)) | {d: length for d, _, length in slicing.spans(offsets, rows)}
    return TensorSpec(tuple(lengths.values()), stride, spec.dtype, spec.device)


def _viewed_strides(spec: TensorSpec, axes: Axes, shape: tuple[int, ...], sizes: dict[int, int]) -> tuple[int, ...]:
    """Strides of ``spec`` viewed as ``shape``, which splits some of its dimensions into their atoms."""
    strides: list[int] = []
    atoms = atom_strides(spec, axes, sizes)
    for d, axis in enumerate(axes):
        if shape[len(strides)] == spec.shape[d]:
            strides.append(spec.stride[d])
        else:
            strides.extend(atoms[atom] for atom in axis)
    return tuple(strides)


def _is_contiguous_slice(axis: Axis, nest: Nest, chunk: int) -> bool:
    """Single rows first, then at most one partial atom, then whole ones."""
    open_to_loops = True
    for atom in axis:
        if atom in nest:
            if not open_to_loops:
                return False
            open_to_loops = atom != nest[-1] or chunk == 1
        else:
            open_to_loops = False
    return True


def _narrow(dim: int, axis: Axis, active: Nest, nest: Nest, sizes: dict[int, int], halo: Halo) -> Narrow | None:
    terms, step = [], 1
    for atom in reversed(axis):
        if atom in active:
            terms.append((nest.index(atom), step))
        step *= sizes[atom]
    if not terms:
        return None
    unit = prod(sizes[atom] for atom in axis if atom not in active)
    if nest[-1] not in active or nest[-1] not in axis:
        return Narrow(dim, tuple(terms), unit, False)
    return Narrow(dim, tuple(terms), unit, True, halo, sizes[nest[-1]] * unit)


def can_overlay(
    new: TensorSpec, new_axes: Axes, old: TensorSpec, old_axes: Axes, nest: Nest, sizes: dict[int, int]
) -> bool:
    """Whether each trip's slice of ``new`` fills exactly the bytes of the same trip's slice of ``old``.

    So it is when looped atoms have the same strides in both and the rest spans the same set of addresses.
    """
    if new.dtype != old.dtype or new.numel != old.numel:
        return False
    a, b = atom_strides(new, new_axes, sizes), atom_strides(old, old_axes, sizes)
    if any(a.get(atom) is None or a.get(atom) != b.get(atom) for atom in nest):
        return False
    return _addresses(a, nest, sizes) == _addresses(b, nest, sizes)


def _addresses(strides: dict[int, int], nest: Nest, sizes: dict[int, int]) -> list[tuple[int, int]]:
    """(stride, extent) runs of the atoms outside the nest, neighbours in memory merged."""
    runs: list[tuple[int, int]] = []
    for stride, size in sorted((strides[atom], sizes[atom]) for atom in strides if atom not in nest):
        if runs and runs[-1][0] * runs[-1][1] == stride:
            runs[-1] = (runs[-1][0], runs[-1][1] * size)
        else:
            runs.append((stride, size))
    return runs
