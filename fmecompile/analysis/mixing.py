"""Which modules mix frames, and which mix the rows and columns of a frame: told by axes, not by names.

An operator mixes an axis where it contracts it (attention over frames) or reaches along it (the kernel of a
convolution). Norms do neither: their statistics blend numbers, not content. A module mixes what its operators mix. A
**temporal** module mixes frames and nothing within them, and is not part of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.axes import GraphAxes
from fmecompile.graph.program import Input, Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.contraction import all_products

CLIP_DIMS = 5
"""A clip has a batch, channels and frames in either order, rows and columns."""


@dataclass(frozen=True)
class Mixing:
    """Paths of modules by what they mix: ``frames`` and ``space`` in any of their operators; ``temporal`` as above."""

    frames: frozenset[str]
    space: frozenset[str]
    temporal: tuple[str, ...]


def mixing(program: Program, axes: GraphAxes) -> Mixing:
    """What the modules of ``program`` mix; nothing where no input is a clip."""
    frames, space = clip_atoms(program, axes)
    order: dict[str, None] = {}
    mixed: tuple[set[str], set[str]] = (set(), set())
    for node in compute_nodes(program.graph):
        for path in called_in(node):
            order.setdefault(path)
            for found, atoms in zip(mixed, (frames, space), strict=True):
                if mixes(node, axes, atoms):
                    found.add(path)
    both = [path for path in order if path in mixed[0] and path not in mixed[1]]
    outer = tuple(path for path in both if not any(path.startswith(other + ".") for other in both))
    return Mixing(frozenset(mixed[0]), frozenset(mixed[1]), outer)


def mixes(node: fx.Node, axes: GraphAxes, atoms: frozenset[int]) -> bool:
    """Whether ``node`` contracts one of ``atoms``, or reaches along it."""
    if node not in axes.nodes or not all_products(node):
        return False
    return any(
        use.reduced & atoms or any(any(rows) and atoms & set(use.axes[d]) for d, rows in use.halo)
        for use in axes[node].uses
    )


def clip_atoms(program: Program, axes: GraphAxes) -> tuple[frozenset[int], frozenset[int]]:
    """The atoms of the frames and those within a frame, of all inputs that are clips.

    Of a clip's second and third dimension one has channels, which the first convolution contracts, and one has frames,
    which arrive at the output.
    """
    arriving = {
        atom
        for value in program.outputs
        if isinstance(value, fx.Node) and value in axes.nodes
        for axis in axes[value].axes
        for atom in axis
    }
    frames: set[int] = set()
    space: set[int] = set()
    for clip in clips(program):
        _, *either, rows, columns = axes[clip].axes
        frames.update(atom for axis in either for atom in axis if atom in arriving)
        space.update((*rows, *columns))
    return frozenset(frames), frozenset(space)


def clips(program: Program) -> list[fx.Node]:
    """Inputs with the dimensions of a clip."""
    bound = zip(program.placeholders, program.bindings, strict=True)
    inputs = [node for node, binding in bound if isinstance(binding, Input)]
    return [node for node in inputs if _ndim(node) == CLIP_DIMS]


def _ndim(node: fx.Node) -> int:
    spec = node_spec(node)
    return len(spec.shape) if isinstance(spec, TensorSpec) else 0


def called_in(node: fx.Node) -> Iterator[str]:
    """Paths of the modules in whose calls ``node`` runs, outermost first; lists of modules are never called."""
    yield from classes_in(node)


def classes_in(node: fx.Node) -> dict[str, str]:
    """The same modules with the names of their classes."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    named = ((str(path).removeprefix("L['self'].").removeprefix("L['self']"), kind) for path, kind in stack)
    return {path: getattr(kind, "__name__", str(kind)).rpartition(".")[2] for path, kind in named if path}
