"""The only file that mutates fx nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_structure

from fmecompile.analysis.facts import FactTable
from fmecompile.graph.program import Binding, Program, compute_nodes
from fmecompile.graph.specs import SPEC, specs_in

aten = torch.ops.aten

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


def return_instead(program: Program, values: list[Any]) -> None:
    """Let the program return ``values`` in the places of its outputs."""
    program.output.args = (tuple(values),)


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


def isolated(
    inside: Iterable[fx.Node], operands: Iterable[fx.Node], results: Iterable[fx.Node], placed: Collection[fx.Node]
) -> fx.Graph:
    """A graph of its own that makes ``results`` from ``operands`` by copies of the nodes ``inside``, contiguous ones of
    those in ``placed``."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for k, operand in enumerate(operands):
        env[operand] = graph.placeholder(f"operand_{k}")
        set_spec(env[operand], operand.meta[SPEC])
    for node in inside:
        set_spec(copy_into(graph, node, env), node.meta[SPEC])
    graph.output(tuple(_contiguous(env[node]) if node in placed else env[node] for node in results))
    return graph


def _contiguous(node: fx.Node) -> fx.Node:
    clone = node.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    spec = node.meta[SPEC]
    set_spec(clone, spec._replace(stride=tuple(prod(spec.shape[d + 1 :]) for d in range(len(spec.shape)))))
    return clone


def outline(
    name: str,
    core: Sequence[fx.Node],
    operands: Iterable[fx.Node],
    results: Sequence[fx.Node],
    specs: Sequence[Any],
) -> dict[fx.Node, fx.Node]:
    """Let a call of the submodule ``name`` behind the last of ``core`` make ``results`` instead of it; what stands for
    each, with ``specs``. Between the nodes of ``core`` only views may read a result: those move behind the call.
    """
    stretch = between(core[0], core[-1])
    anchor = core[-1].next
    call = insert_loop(anchor, name, tuple(operands), like=core[-1])
    set_spec(call, tuple(specs))
    stands: dict[fx.Node, fx.Node] = {}
    for k, result in enumerate(results):
        value = stands[result] = insert_before(anchor, operator.getitem, (call, k), like=result)
        set_spec(value, specs[k])
        for user in [user for user in result.users if user not in core]:
            read_instead(user, result, value)
    late = set(stands.values())
    for node in stretch:
        if node not in core and late & set(node.all_input_nodes):
            late.add(node)
            move_before(node, anchor)
    erase(node for node in stretch if node in core or _is_read_by_none_but(node, core))
    return stands


def _is_read_by_none_but(node: fx.Node, core: Sequence[fx.Node]) -> bool:
    return bool(node.users) and all(user in core or _is_read_by_none_but(user, core) for user in node.users)


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes from ``first`` to ``last``, both included."""
    found = [first]
    while found[-1] is not last:
        found.append(found[-1].next)
    return found


def keep_layout(graph: fx.Graph) -> None:
    """Tell Inductor that the strides of every result are read."""
    output = graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
