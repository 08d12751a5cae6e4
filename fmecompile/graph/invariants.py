"""What holds for a graph after every stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import fx

from fmecompile.errors import VerificationError
from fmecompile.graph.program import Program
from fmecompile.graph.specs import SPEC


def check(program: Program) -> None:
    """Topological order, one binding a placeholder, a spec on every value.

    Raises VerificationError naming the node that breaks one of them.
    """
    program.graph.lint()
    placeholders = program.placeholders
    if len(placeholders) != len(program.bindings):
        raise VerificationError(f"{len(placeholders)} graph inputs, {len(program.bindings)} bindings")
    for node in program.graph.nodes:
        if node.op != "output" and SPEC not in node.meta:
            raise VerificationError(f"{node.name} has no spec", place=module_path(node))


def module_path(node: fx.Node) -> str:
    """The qualified name of the module that made ``node``; empty for code outside modules."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix("L['self'].")


def common_module(nodes: Sequence[fx.Node]) -> str:
    """The innermost module that all ``nodes`` are of; empty where that is the whole."""
    names = [path.split(".") for node in nodes if (path := module_path(node))]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return ".".join(parts[0] for parts in shared)
