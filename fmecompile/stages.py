"""Every stage of a compilation: code that tells where each call comes from, the projected peak, a program that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import fx, nn

from fmecompile.errors import OptionError
from fmecompile.graph.printing import Annotated, readable
from fmecompile.pipeline import Compilation
from fmecompile.runtime.chunk_loop import ChunkLoop

DRAWN = ("dot", "svg", "png", "pdf")


class Stage(NamedTuple):
    """A graph after one pass: the pass's name, its Python code, the projected peak, and the module that runs it. The
    code stands alone: run, it defines ``program``, which takes the same operands.

    Unpacks as ``name, code, projected_peak_bytes, program``.
    """

    name: str
    code: str
    projected_peak_bytes: int
    program: fx.GraphModule

    def draw(self, group: int, path: str | Path) -> None:
        """Write a picture of what one trip of a group runs, with pydot: ``.dot``, and with Graphviz ``.svg``, ``.png``
        or ``.pdf``.

        Raises OptionError where there is no such group, no such kind of file, or neither pydot nor Graphviz.
        """
        path = Path(path)
        body = self._body(group)
        kind = path.suffix.removeprefix(".")
        if kind not in DRAWN:
            raise OptionError(f"no picture can be written to {path.name}", next_step=f"name it .{', .'.join(DRAWN)}")
        dot = _dot(body, f"chunk_loop_{group}")
        try:
            path.write_bytes(dot.to_string().encode() if kind == "dot" else dot.create(format=kind))
        except FileNotFoundError as error:
            raise OptionError(
                f"a .{kind} needs Graphviz, and its program dot is not on the path",
                next_step="install Graphviz, or name the file .dot",
            ) from error

    def _body(self, group: int) -> fx.GraphModule:
        loops = [loop for loop in self.program.children() if isinstance(loop, ChunkLoop)]
        if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < len(loops):
            known = f"give a number from 0 to {len(loops) - 1}" if loops else "take a stage from chunk-loops on"
            raise OptionError(f"the stage {self.name} has no group {group!r}", next_step=known)
        body = loops[group].bodies[0]
        assert isinstance(body, fx.GraphModule)
        return body


def _dot(body: fx.GraphModule, name: str) -> Any:
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    try:
        import pydot  # noqa: F401  # pyright: ignore[reportMissingImports]

        return FxGraphDrawer(body, name, ignore_getattr=True).get_dot_graph()
    except (ImportError, RuntimeError) as error:
        raise OptionError("drawing a group needs the package pydot", next_step="pip install pydot") from error


class StageRecorder:
    """The observer between stages: keeps a copy of each program, and which passes made and changed each of its calls.

    Where a compilation goes back and tries again, what came after that is forgotten.
    """

    def __init__(self, model: str) -> None:
        self.stages: list[Stage] = []
        self._model = model
        self._histories: list[dict[str, _History]] = []

    def __call__(self, name: str, compilation: Compilation) -> None:
        place = len(compilation.notes) - 1
        del self.stages[place:], self._histories[place:]
        before = self._histories[-1] if self._histories else {}
        history = {node.name: _next(before.get(node.name), node, name) for node in compilation.program.graph.nodes}
        self._histories.append(before | history)
        made = {node: past.words for node, past in self._histories[-1].items()}
        program = Annotated(_parts(compilation), _copied(compilation.program.graph), class_name=name.replace("-", "_"))
        title = f"{self._model} after {name}: {compilation.notes[-1][1]}"
        peak = self._peak(compilation)
        self.stages.append(Stage(name, readable(program, made, title), peak, program))

    def _peak(self, compilation: Compilation) -> int:
        """Kernels allocate no more than the operators that they stand for: with them, the peak of the stage before."""
        nodes = compilation.program.graph.nodes
        has_kernels = any(node.op == "call_module" and node.target not in compilation.groups for node in nodes)
        return self.stages[-1].projected_peak_bytes if has_kernels else compilation.project().peak_bytes


def _parts(compilation: Compilation) -> nn.Module:
    """What the program of a stage calls, with bodies that later passes do not change; shared ones stay shared."""
    copies: dict[nn.Module, fx.GraphModule] = {}
    root = nn.Module()
    for name, part in compilation.loops.items():
        if isinstance(part, ChunkLoop):
            for body in part.bodies:
                assert isinstance(body, fx.GraphModule)
                if body not in copies:
                    copies[body] = fx.GraphModule(body, _copied(body.graph), class_name="ChunkBody")
            part = ChunkLoop(part.spec, [copies[body] for body in part.bodies], part.label)
        root.add_module(name, part)
    return root


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


class _History(NamedTuple):
    """What a call is now, the pass that made it, and the last one that changed it."""

    call: str
    made: str
    changed: str

    @property
    def words(self) -> str:
        return self.made + (f", changed by {self.changed}" if self.changed else "")


def _next(past: _History | None, node: fx.Node, name: str) -> _History:
    call = f"{node.target} {node.args} {node.kwargs}"
    if past is None:
        return _History(call, name, "")
    return past if past.call == call else past._replace(call=call, changed=name)
