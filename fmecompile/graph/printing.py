"""Programs as Python that runs: one class a graph, chunk loops with their axes, trips and bytes, and for each call the
module, the source line and the pass it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from fmecompile.graph.invariants import module_path
from fmecompile.graph.outline import result_of
from fmecompile.runtime.chunk_loop import ChunkLoop, Slicing
from fmecompile.runtime.fused import FusedRun

Provenance = Mapping[str, str]
"""By the name of a node, which passes made it what it is, in words."""

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n\s*(?P<code>.*)')
_ASSIGNED = re.compile(r"    (\w+) = ")
_LIBRARY = str(Path(torch.__file__).parent)
_LOOP_CLASSES = "ChunkLoop, LoopAxis, LoopSpec, Narrow, Output, Slicing"


class Annotated(fx.GraphModule):
    """A graph module whose ``print_readable`` prints its chunk loops too, as Python that runs."""

    def print_readable(self, print_output: bool = True, *_: Any, **__: Any) -> str:
        """The code; printed unless ``print_output`` is false."""
        code = readable(self)
        if print_output:
            print(code)
        return code


def readable(module: fx.GraphModule, provenance: Provenance | None = None, title: str = "") -> str:
    """``module`` as Python: run, it defines ``program``, which computes what ``module`` does on the same operands.

    Bodies that several loops share are written once, and so are the operators behind a compiled kernel.
    """
    writer = _Writer(provenance or {})
    writer.write(module, "Program")
    head = "\n".join(
        [*([f"# {title}"] if title else []), *sorted(writer.imports, key=lambda line: (line.startswith("from"), line))]
    )
    return "\n\n\n".join([head, *writer.classes, "program = Program()\n"])


class _Writer:
    """Writes a class a graph, behind those that it is made of, and collects what they import."""

    def __init__(self, provenance: Provenance) -> None:
        self.classes: list[str] = []
        self.imports = {"import torch", "import fmecompile"}
        self._provenance = provenance
        self._names: dict[nn.Module, str] = {}

    def write(self, module: nn.Module, name: str) -> str:
        """The name of the class of a graph."""
        assert isinstance(module, fx.GraphModule)
        if module not in self._names:
            self._names[module] = name
            parts = [line for child in module.named_children() for line in self._part(*child)]
            made = "".join(f"    {line}\n" for line in parts)
            init = f"def __init__(self) -> None:\n    super().__init__()\n{made}\n" if parts else ""
            code = "\n".join(_annotated(module.graph, self._provenance))
            self.imports |= _imports(module.graph)
            self.classes.append(f"class {name}(torch.nn.Module):\n{indent(init + code, '    ')}")
        return self._names[module]

    def _part(self, name: str, child: nn.Module) -> list[str]:
        """What makes a part of a program: a loop with its axes, slices and bodies, or operators for a kernel."""
        if isinstance(child, FusedRun):
            return ["# one compiled kernel; here its operators", f"self.{name} = {self.write(child.operators, name)}()"]
        assert isinstance(child, ChunkLoop)
        bodies = [self.write(body, f"{name}_body_{kind}") for kind, body in enumerate(child.bodies)]
        self.imports |= {"from torch import device", f"from fmecompile.runtime.chunk_loop import {_LOOP_CLASSES}"}
        made = f"self.{name} = ChunkLoop({child.spec!r}, [{', '.join(f'{body}()' for body in bodies)}])"
        return [*(f"# {line}" for line in described(child)), made]


def _imports(graph: fx.Graph) -> set[str]:
    """What the code of ``graph`` names."""
    code = graph.python_code("self")
    used = set(re.findall(r"[A-Za-z_]\w*", code.src))
    return {_import_of(name, value) for name, value in code.globals.items() if name in used}


def _import_of(name: str, value: Any) -> str:
    if name in ("torch", "fmecompile"):
        return f"import {name}"
    if isinstance(value, float):
        return f"from math import {name}"
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    module, own = value.__module__, value.__name__
    return f"from {module} import {own}" + (f" as {name}" if own != name else "")


def _annotated(graph: fx.Graph, provenance: Provenance) -> Iterator[str]:
    """The lines of ``forward``: results behind calls, and where they come from in front where that changes."""
    nodes = {node.name: node for node in graph.nodes}
    lines = graph.python_code("self").src.strip().splitlines()
    said = ""
    for line in lines:
        found = _ASSIGNED.match(line)
        node = nodes.get(found[1]) if found else None
        if node is not None and (origin := _origin(node, provenance)) != said:
            said = origin
            yield f"    # {origin}"
        yield line.rstrip() if node is None else f"{line}  # {result_of(node)[0]}"


def _origin(node: fx.Node, provenance: Provenance) -> str:
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    frames = [frame for frame in frames if _LIBRARY not in frame["file"]] or frames
    place = f"{Path(frames[-1]['file']).name}:{frames[-1]['line']}: {frames[-1]['code'].strip()}" if frames else ""
    parts = (module_path(node) or "the module itself", place, provenance.get(node.name, ""))
    return " | ".join(filter(None, parts)).replace("\n", " ")


def described(loop: ChunkLoop) -> list[str]:
    """What a loop runs over, how often, what it holds, and how it reads and writes."""
    spec, label = loop.spec, loop.label
    axes = " x ".join(f"{axis.size} rows by {axis.chunk}" for axis in spec.axes)
    slots = f", {spec.slots} at once" if spec.slots > 1 else ""
    modules = f" in {label.modules}" if label.modules else ""
    lines = [f"{label.name}{modules}: {spec.trips} trips over {axes}{slots}; they hold {label.held_bytes} bytes"]
    for k, slicing in enumerate(spec.slicings):
        if slicing is not None:
            lines.append(f"  reads operand {k} sliced by {_slicing(slicing)}")
    for k, output in enumerate(spec.outputs):
        place = "allocated" if output.takes is None else f"over operand {output.takes}"
        place = "in host memory" if output.host_of is not None else place
        nbytes = output.dtype.itemsize * prod(output.shape)
        lines.append(
            f"  writes result {k} {output.shape}, {nbytes} bytes {place}, sliced by {_slicing(output.slicing)}"
        )
    return lines


def _slicing(slicing: Slicing) -> str:
    dims = ", ".join(f"dim {narrow.dim}" for narrow in slicing.narrows)
    return dims if slicing.shape is None else f"{dims} of its view {slicing.shape}"
