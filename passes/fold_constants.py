"""fold-constants: compute what depends on no input and no weight once, not at every call.

before  i = arange(14);  e = cat([sin(i * f), cos(i * f)])     at every call
after   e is an input of the graph, computed by the constants graph once per device
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Constant, Literal, Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec


@dataclass(frozen=True)
class FoldConstants:
    """Move constant subgraphs whose results take at most ``limit_bytes`` each into the constants graph."""

    limit_bytes: int = 16 << 20

    def apply(self, program: Program, facts: FactTable) -> str:
        bound = zip(program.placeholders, program.bindings, strict=True)
        sources = {node: binding.name for node, binding in bound if isinstance(binding, Literal)}
        constant: dict[fx.Node, fx.Node] = {node: node for node in sources}
        for node in compute_nodes(program.graph):
            if all(n in constant for n in node.all_input_nodes) and self._is_small(node):
                constant[node] = node
        results = [n for n in constant if any(user not in constant for user in n.users)]
        if not results:
            return "nothing to fold"
        calls = [node for node in constant if node not in sources]
        program.constants = _constants_graph(program, sources, calls, results)
        names = [node.name for node in results]
        for index, (node, name) in enumerate(zip(results, names, strict=True)):
            held = edit.add_placeholder(program, f"const_{name}", Constant(index), node_spec(node))
            for user in [u for u in node.users if u not in constant]:
                edit.read_instead(user, node, held)
        edit.drop_unused(program)
        return f"{len(constant) - len(sources)} calls folded into {len(results)} constants"

    def _is_small(self, node: fx.Node) -> bool:
        spec = node_spec(node)
        if not isinstance(spec, TensorSpec) or not isinstance(node.target, torch._ops.OpOverload):
            return False
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return not random and spec.numel * spec.dtype.itemsize <= self.limit_bytes


def _constants_graph(
    program: Program, sources: dict[fx.Node, str], calls: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    """All literals of the program in, in their order, whether they are read or not; constants out."""
    graph = fx.Graph()
    places = {name: graph.placeholder(f"c_{name}".replace(".", "_")) for name in program.literals}
    env = {node: places[name] for node, name in sources.items()}
    for node in calls:
        edit.copy_into(graph, node, env)
    graph.output(tuple(env[node] for node in results))
    return fx.GraphModule(torch.nn.Module(), graph)
