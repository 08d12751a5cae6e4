"""A graph in outline: what runs, in order, in which module; enough to draw it, with nothing to run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from fmecompile.graph.group import Group
from fmecompile.graph.invariants import module_path
from fmecompile.graph.program import compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec

OUTSIDE = -1
"""The group of what is in none."""
MOST_PARTS, LARGE_PART = 16, 0.4


class Row(NamedTuple):
    """One operator: its name in the graph; places in the tables of operators, modules and results; and its group."""

    name: str
    operator: int
    module: int
    result: int
    group: int


@dataclass(frozen=True)
class Outline:
    """``rows`` in the order of execution; those of one group stand together and run as one loop. ``results`` are texts
    such as ``f16 28x320x72x128`` with their bytes."""

    operators: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    results: tuple[tuple[str, int], ...] = ()
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        tables = (self.operators, self.modules, self.results)
        if not all(0 <= place < len(table) for row in self.rows for place, table in zip(row[1:4], tables, strict=True)):
            raise ValueError("a row of an outline names an entry that is not there")

    @classmethod
    def of(cls, graph: fx.Graph, groups: Mapping[str, Group]) -> Outline:
        """Of a graph whose ``call_module`` nodes are the loops of ``groups`` by name."""
        operators, modules, results = _Table(), _Table(), _Table()
        places = {name: place for place, name in enumerate(groups)}
        rows: list[Row] = []
        for node in compute_nodes(graph):
            is_loop = node.op == "call_module"
            for inner in groups[str(node.target)].inside if is_loop else (node,):
                group = places[str(node.target)] if is_loop else OUTSIDE
                places_of = operators[operator_name(inner)], modules[module_path(inner)], results[result_of(inner)]
                rows.append(Row(inner.name, *places_of, group))
        return cls(tuple(operators), tuple(modules), tuple(results), tuple(rows))

    def steps(self) -> Iterator[tuple[Row, ...]]:
        """One entry a call of the program: an operator, or the rows of a loop."""
        loop: list[Row] = []
        for row in self.rows:
            if loop and row.group != loop[0].group:
                yield tuple(loop)
                loop = []
            if row.group == OUTSIDE:
                yield (row,)
            else:
                loop.append(row)
        if loop:
            yield tuple(loop)

    def paths(self) -> list[str]:
        """For each step, the module that most of its operators are of."""
        return [self.modules[Counter(row.module for row in step).most_common(1)[0][0]] for step in self.steps()]


EMPTY = Outline()


class _Table(dict[Any, int]):
    """Distinct entries by the order in which they were asked for."""

    def __missing__(self, key: Any) -> int:
        self[key] = len(self)
        return self[key]


def operator_name(node: fx.Node) -> str:
    """``aten.linear.default``, or the name of a function."""
    return (
        str(node.target)
        if hasattr(node.target, "overloadpacket")
        else getattr(node.target, "__name__", str(node.target))
    )


def result_of(node: fx.Node) -> tuple[str, int]:
    """What a call returns, as ``f16 28x320x72x128``, and its bytes."""
    spec = node_spec(node)
    if isinstance(spec, TensorSpec):
        return spec_text(spec), spec.numel * spec.dtype.itemsize
    parts = [part for part in spec or () if isinstance(part, TensorSpec)]
    return ", ".join(map(spec_text, parts)), sum(part.numel * part.dtype.itemsize for part in parts)


def spec_text(spec: TensorSpec) -> str:
    """``f16 28x320x72x128``."""
    name = str(spec.dtype).removeprefix("torch.")
    short = name.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")
    return f"{short} {'x'.join(map(str, spec.shape)) or 'scalar'}"


def parts(paths: Sequence[str]) -> tuple[str, ...]:
    """The modules that divide a program well for a reader: children of the root, and of what is large, theirs."""
    weights = Counter(paths)
    opened, found = {""}, _children(weights, {""})
    while True:
        large = {part: _weight(part, weights) for part in found}
        part = max(large, key=lambda part: large[part], default="")
        wider = _children(weights, opened | {part})
        if not part or large[part] <= LARGE_PART * len(paths) or len(wider) > MOST_PARTS or wider == found:
            return tuple(dict.fromkeys(part for path in paths if (part := part_of(path, found))))
        opened, found = opened | {part}, wider


def _children(weights: Mapping[str, int], opened: set[str]) -> frozenset[str]:
    """Each path down to the first part that is not opened; a number belongs to the name in front of it."""
    found = set()
    for path in weights:
        names, part = path.split("."), ""
        while names and part in opened:
            taken = 2 if len(names) > 1 and names[1].isdecimal() else 1
            part = ".".join([*([part] if part else []), *names[:taken]])
            names = names[taken:]
        found.add(part)
    return frozenset(found - {""})


def _weight(part: str, weights: Mapping[str, int]) -> int:
    return sum(count for path, count in weights.items() if path == part or path.startswith(f"{part}."))


def part_of(path: str, known: Iterable[str]) -> str:
    """The longest of ``known`` that ``path`` is, or lies in; empty where none is."""
    return max((part for part in known if path == part or path.startswith(f"{part}.")), key=len, default="")


def bands(paths: Iterable[str], known: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Runs of entries of one part: its name, and the place of the first. Entries of none go with those before."""
    found: list[tuple[str, int]] = []
    seen: dict[str, str] = {}
    for place, path in enumerate(paths):
        if path not in seen:
            seen[path] = part_of(path, known)
        part = seen[path]
        if not found or (part and part != found[-1][0]):
            found.append((part, place))
    return tuple(found)
