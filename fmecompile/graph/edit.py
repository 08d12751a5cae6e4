"""The only file that mutates fx nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_structure

from fmecompile.analysis.facts import FactTable
from fmecompile.graph.program import Binding, Program, compute_nodes
from fmecompile.graph.specs import SPEC, specs_in

_PROVENANCE = ("nn_module_stack", "stack_trace")


def replace(node: fx.Node, value: Any) -> None:
    """Let every reader of ``node`` read ``value`` (a node or a literal) instead, and erase ``node``."""
    for user in list(node.users):
        _swap_input(user, node, value)
    node.graph.erase_node(node)


def _swap_input(user: fx.Node, old: fx.Node, new: Any) -> None:
    def swapped(argument: Any) -> Any:
        return fx.map_arg(argument, lambda n: new if n is old else n)

    user.args, user.kwargs = swapped(user.args), swapped(user.kwargs)


def read_instead(user: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Let ``user`` alone read ``new`` where it read ``old``."""
    user.replace_input_with(old, new)


def retarget(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make ``node`` call something else; name, place and provenance stay."""
    node.target, node.args, node.kwargs = target, args, kwargs


def insert_before(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], *, like: fx.Node) -> fx.Node:
    """A new call in front of ``node`` with the provenance of ``like``."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    inherit(new, like)
    return new


def insert_loop(before: fx.Node, name: str, args: tuple[Any, ...], *, like: fx.Node) -> fx.Node:
    """A call of the submodule ``name`` in front of ``before``."""
    with before.graph.inserting_before(before):
        new = before.graph.create_node("call_module", name, args, {}, name=name)
    inherit(new, like)
    return new


def inherit(new: fx.Node, like: fx.Node) -> None:
    """Give ``new`` the module path and source line of ``like``."""
    for key in _PROVENANCE:
        if key in like.meta:
            new.meta[key] = like.meta[key]


def clone_before(node: fx.Node, anchor: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of ``node`` in front of ``anchor`` that reads ``copies`` where there are any."""
    with node.graph.inserting_before(anchor):
        return node.graph.node_copy(node, lambda n: copies.get(n, n))


def move_before(node: fx.Node, anchor: fx.Node) -> None:
    anchor.prepend(node)


def erase(nodes: Iterable[fx.Node]) -> None:
    """Erase ``nodes``, given in topological order, none of which is read from outside."""
    for node in reversed(list(nodes)):
        node.graph.erase_node(node)


def add_placeholder(program: Program, name: str, binding: Binding, spec: Any) -> fx.Node:
    """A new graph input behind the present ones."""
    last = program.placeholders
    anchor = last[-1].next if last else next(iter(program.graph.nodes))
    with program.graph.inserting_before(anchor):
        node = program.graph.placeholder(name)
    node.meta[SPEC] = spec
    program.bindings.append(binding)
    return node


def drop_unused(program: Program) -> int:
    """Erase what nothing reads, placeholders included; the number of nodes erased."""
    erased = 0
    for node in reversed(compute_nodes(program.graph)):
        if not node.users:
            program.graph.erase_node(node)
            erased += 1
    kept = []
    for node, binding in zip(program.placeholders, program.bindings, strict=True):
        if node.users:
            kept.append(binding)
        else:
            program.graph.erase_node(node)
            erased += 1
    program.bindings = kept
    return erased


def return_also(program: Program, name: str, value: fx.Node) -> None:
    """Let the program also return ``value``, kept under ``name``."""
    program.output.args = ((*program.outputs, value),)
    program.keeps = (*program.keeps, name)


def return_nothing(program: Program) -> None:
    """Let the program return an empty tuple, and keep nothing."""
    program.output.args = ((),)
    program.out_spec, program.keeps = tree_structure(()), ()


def replace_by(node: fx.Node, value: fx.Node) -> None:
    """Let every reader of ``node`` but ``value`` itself read ``value`` instead; ``node`` stays."""
    node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)


def annotate(nodes: Iterable[fx.Node], facts: FactTable) -> None:
    """Compute every node's spec from its operands' specs."""
    for node in nodes:
        if node.op == "call_function":
            node.meta[SPEC] = facts(node.target, specs_in(node.args), specs_in(node.kwargs)).result  # type: ignore[arg-type]


def drop_dead(graph: fx.Graph) -> None:
    """Erase calls that nothing reads, and that write nothing; placeholders stay."""
    for node in reversed(compute_nodes(graph)):
        if not node.users and not (isinstance(node.target, OpOverload) and node.target._schema.is_mutable):
            graph.erase_node(node)


def copy_into(
    graph: fx.Graph,
    node: fx.Node,
    env: dict[fx.Node, fx.Node],
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Copy ``node`` to the end of another graph, with ``args`` and ``kwargs`` or its own looked up in ``env``."""
    arguments = args if args is not None else fx.map_arg(node.args, lambda n: env[n])
    named = kwargs if kwargs is not None else fx.map_arg(node.kwargs, lambda n: env[n])
    new = graph.create_node(node.op, node.target, arguments, named, name=node.name)  # type: ignore[arg-type]
    inherit(new, node)
    env[node] = new
    return new


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy with nodes of its own."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def add_operand(graph: fx.Graph, name: str, spec: Any) -> fx.Node:
    """A new placeholder of a loop's body, behind the present ones."""
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(anchor):
        node = graph.placeholder(name)
    node.meta[SPEC] = spec
    return node


def return_values(graph: fx.Graph, values: tuple[Any, ...]) -> None:
    """Let a loop's body return ``values``."""
    next(iter(reversed(graph.nodes))).args = (values,)


def set_spec(node: fx.Node, spec: Any) -> None:
    node.meta[SPEC] = spec
