"""What differs between two stages, for a reader: calls added, removed and changed, by module, and the peaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import fx, nn

from fmecompile.budget import mib
from fmecompile.errors import TargetError
from fmecompile.graph.invariants import module_path
from fmecompile.graph.outline import operator_name, result_of
from fmecompile.graph.printing import described
from fmecompile.graph.program import compute_nodes
from fmecompile.runtime.chunk_loop import ChunkLoop
from fmecompile.stages import Stage


class _Call(NamedTuple):
    """A call as a line, the module that it is of, and the loop and kernel that it runs in, if it is in one."""

    line: str
    module: str
    inside: str


def diff(before: Stage, after: Stage) -> str:
    """What differs between two of :func:`fmecompile.stages`, as text: equal stages, equal texts, on every machine.

    A line begins with ``-`` for a call that is gone, ``+`` for a new one, ``~`` for one that is another under the same
    name (was, then is), and ``>`` for one that runs in a chunk loop, or a kernel, now. Lines stand by module, in the
    order of execution.

    Raises TargetError for what is no stage.
    """
    for stage in (before, after):
        if not isinstance(stage, Stage):
            raise TargetError(
                f"diff takes two stages, not a {type(stage).__name__}",
                next_step="pass two of fmecompile.stages(module)",
            )
    old, new = _calls(before.program), _calls(after.program)
    lines = dict(_changes(old, new))
    peaks = f"projected peak {mib(before.projected_peak_bytes)} -> {mib(after.projected_peak_bytes)}"
    counts = {mark: sum(line.startswith(mark) for line in lines.values()) for mark in "+-~>"}
    told = ", ".join(f"{counts[mark]} {word}" for mark, word in _WORDS.items() if counts[mark]) or "the same calls"
    head = f"{before.name} -> {after.name}: {peaks}; {len(old)} -> {len(new)} calls: {told}"
    by_module: dict[str, list[str]] = {}
    for name, line in lines.items():
        call = new.get(name) or old[name]
        by_module.setdefault(call.module or "the module itself", []).append(line)
    blocks = ["\n".join([f"{module}:", *(f"  {line}" for line in found)]) for module, found in by_module.items()]
    return "\n".join([head, *_loops(before.program, after.program), *blocks]) + "\n"


_WORDS = {"+": "added", "-": "removed", "~": "changed", ">": "moved into loops or kernels"}


def _changes(old: dict[str, _Call], new: dict[str, _Call]) -> Iterator[tuple[str, str]]:
    """(name of the call, line), in the order of both: what is gone stands where it was."""
    waiting = iter(old)
    for name, call in new.items():
        if name in old:
            for earlier in waiting:
                if earlier == name:
                    break
                if earlier not in new:
                    yield earlier, f"- {old[earlier].line}"
        yield from ((name, line) for line in [_line(old.get(name), call)] if line)
    yield from ((name, f"- {old[name].line}") for name in waiting if name not in new)


def _line(was: _Call | None, call: _Call) -> str:
    if was is None:
        return f"+ {call.line}" + (f"  in {call.inside}" if call.inside else "")
    if call.inside != was.inside:
        return f"> {call.line}  in {call.inside or 'no loop any more'}"
    return "" if call.line == was.line else f"~ {was.line}\n      {call.line}"


def _calls(program: fx.GraphModule) -> dict[str, _Call]:
    """Every call by its name, those of the first body of each loop, and of kernels, at their place."""
    found: dict[str, _Call] = {}

    def visit(module: fx.GraphModule, place: str) -> None:
        for node in compute_nodes(module.graph):
            name = node.name if node.name not in found else f"{place}.{node.name}"
            found[name] = _Call(_text(node), module_path(node), place)
            if node.op == "call_module":
                inner = _inner(module.get_submodule(str(node.target)))
                visit(inner, f"{place}.{node.name}".lstrip("."))

    visit(program, "")
    return found


def _inner(module: nn.Module) -> fx.GraphModule:
    """What runs in a loop or a kernel."""
    inner = module.bodies[0] if isinstance(module, ChunkLoop) else module.operators
    assert isinstance(inner, fx.GraphModule)
    return inner


def _text(node: fx.Node) -> str:
    given = ", ".join([*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())])
    return f"{node.name} = {operator_name(node)}({given})  {result_of(node)[0]}".rstrip()


def _loops(before: fx.GraphModule, after: fx.GraphModule) -> Iterator[str]:
    """New loops, described; and those that are gone."""
    old, new = (dict(m.named_children()) for m in (before, after))
    for name, loop in new.items():
        if isinstance(loop, ChunkLoop) and name not in old:
            yield "+ " + "\n    ".join(described(loop))
    yield from (f"- {name}" for name in old if name not in new)
