"""The structure of a graph without its names: what is equal in two graphs that do the same."""

from __future__ import annotations

from typing import Any

from torch import fx

from fmecompile.graph.specs import node_spec


def structure(graph: fx.Graph) -> tuple[Any, ...]:
    """Calls, literals, wiring, and specs of inputs. Hashable; equal for graphs that differ in names only."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    def key(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("%", index[value])
        if isinstance(value, (tuple, list)):
            return tuple(map(key, value))
        if isinstance(value, dict):
            return tuple((name, key(item)) for name, item in value.items())
        return literal_key(value)

    rows: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            rows.append(("placeholder", node_spec(node)))
        else:
            rows.append((node.op, node.target, key(node.args), key(node.kwargs)))
    return tuple(rows)


def literal_key(value: Any) -> Any:
    """Equal for arguments that are the same to an operator: ``1``, ``1.0`` and ``True`` are not, nor are ``0.0`` and
    ``-0.0``.
    """
    return (type(value).__name__, repr(value) if isinstance(value, (float, complex)) else value)
