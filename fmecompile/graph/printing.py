"""Readable programs: the graph as Python, and every chunk loop with its axes and its body."""

from __future__ import annotations

from textwrap import indent

from torch import fx

from fmecompile.runtime.chunk_loop import ChunkLoop, Slicing


def readable(module: fx.GraphModule) -> str:
    """The code of ``module``; bodies that several loops share are printed once."""
    parts = [module.print_readable(print_output=False, include_stride=False)]
    shown: dict[fx.GraphModule, str] = {}
    for name, loop in module.named_children():
        if isinstance(loop, ChunkLoop):
            parts.append(_loop(name, loop, shown))
    return "\n\n".join(parts)


def _loop(name: str, loop: ChunkLoop, shown: dict[fx.GraphModule, str]) -> str:
    spec = loop.spec
    axes = " x ".join(f"{axis.size} rows by {axis.chunk}" for axis in spec.axes)
    lines = [f"# {name}: {spec.trips} trips over {axes}"]
    lines += [
        f"#   reads operand {k} sliced by {_slicing(slicing)}"
        for k, slicing in enumerate(spec.slicings)
        if slicing is not None
    ]
    for k, output in enumerate(spec.outputs):
        where = "allocated" if output.takes is None else f"over operand {output.takes}"
        lines.append(f"#   writes result {k} {output.shape} {where}, sliced by {_slicing(output.slicing)}")
    for kind, body in enumerate(loop.bodies):
        assert isinstance(body, fx.GraphModule)
        role = f"body {kind}"
        if body in shown:
            lines.append(f"#   {role}: the same as {shown[body]}")
            continue
        shown[body] = f"the {role} of {name}"
        lines += [f"# {role}:", indent(body.print_readable(print_output=False), "    ")]
    return "\n".join(lines)


def _slicing(slicing: Slicing) -> str:
    dims = ", ".join(f"dim {narrow.dim}" for narrow in slicing.narrows)
    return dims if slicing.shape is None else f"{dims} of its view {slicing.shape}"
