"""The stack of blocks of a denoiser: modules called one after another that take the hidden state and return it.

Told by what enters and leaves: a block takes one value that the clip reached and returns one, or takes and returns
several of equal shapes (the clip and the text of a joint transformer, whose last block returns the clip alone). A
module that does anything else, like the half of a UNet that hands out skip connections, is looked into. Blocks are
repeated, so a stack begins and ends with elements of module lists; what is called in between (the middle of a UNet)
belongs to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.mixing import called_in
from fmecompile.graph.program import Input, Program, Weight, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec


@dataclass(frozen=True)
class Block:
    """One call of a module: the hidden states it takes and returns, in the order of the graph."""

    path: str
    takes: tuple[fx.Node, ...]
    returns: tuple[fx.Node, ...]


def block_stack(program: Program, moving: set[fx.Node]) -> list[Block]:
    """The blocks in execution order; ``moving`` are the values that the clip reaches. Empty where there is no stack."""
    nodes = compute_nodes(program.graph)
    called = {path for node in nodes for path in called_in(node)}
    weights = {n for n, b in zip(program.placeholders, program.bindings, strict=True) if isinstance(b, Weight)}
    found: list[Block] = []
    _find(nodes, 0, moving, weights, found)
    listed = [at for at, block in enumerate(found) if _is_listed(block.path, called)]
    return found[listed[0] : listed[-1] + 1] if listed else []


def _find(
    nodes: Iterable[fx.Node], depth: int, moving: set[fx.Node], weights: set[fx.Node], found: list[Block]
) -> None:
    """Add the blocks among the modules called in ``nodes``, ``depth`` calls deep or deeper, to ``found``."""
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes:
        paths = list(called_in(node))
        if len(paths) > depth:
            calls.setdefault(paths[depth], []).append(node)
    for path, inside in calls.items():
        block = _block(path, inside, moving, weights)
        if _is_block(block, found):
            found.append(block)
        elif block.returns:
            _find(inside, depth + 1, moving, weights, found)


def _is_block(block: Block, found: Sequence[Block]) -> bool:
    takes, returns = (Counter(map(_shape, states)) for states in (block.takes, block.returns))
    if len(block.takes) == len(block.returns):
        return len(block.takes) == 1 or (takes == returns and bool(takes))
    handed_on = found[-1].returns if found else ()
    return bool(returns) and set(block.takes) == set(handed_on) and returns <= takes


def _block(path: str, nodes: Sequence[fx.Node], moving: set[fx.Node], weights: set[fx.Node]) -> Block:
    """What enters and leaves the call of a module of what the clip reached."""
    inside = set(nodes)
    entering = dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside and is_large(o))
    takes = [value for value in entering if value in moving]
    returns = [n for n in nodes if n in moving and is_large(n) and any(user not in inside for user in n.users)]
    missing = Counter(map(_shape, returns)) - Counter(map(_shape, takes))
    if len(returns) > len(takes):  # the first block of a joint transformer takes a text that no clip has reached
        for value in entering:
            if value not in moving and value not in weights and missing[_shape(value)] > 0:
                missing[_shape(value)] -= 1
                takes.append(value)
    return Block(path, tuple(takes), tuple(returns))


def _is_listed(path: str, called: set[str]) -> bool:
    """Whether ``path`` lies in an element of a list of modules: a number under something that is never called."""
    parts = path.split(".")
    return any(part.isdecimal() and ".".join(parts[:at]) not in called for at, part in enumerate(parts) if at)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tensor_spec(node).shape


def is_large(node: fx.Node) -> bool:
    """One tensor of two dimensions or more."""
    spec = node_spec(node)
    return isinstance(spec, TensorSpec) and len(spec.shape) > 1


def behind(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """All values that are made of ``sources``."""
    return _reached(sources, lambda node: [user for user in node.users if user.op != "output"])


def before(values: Iterable[fx.Node], inside: Container[fx.Node] | None = None) -> set[fx.Node]:
    """All values that ``values`` are made of; of ``inside`` only, if given."""
    return _reached(values, lambda node: [n for n in node.all_input_nodes if inside is None or n in inside])


def _reached(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        new = [node for node in step(waiting.pop()) if node not in found]
        found.update(new)
        waiting += new
    return found


def time_input(program: Program) -> fx.Node | None:
    """The first input that is one number, or one for each clip: the timestep."""
    bound = zip(program.placeholders, program.bindings, strict=True)
    inputs = [(b.leaf, node) for node, b in bound if isinstance(b, Input) and len(tensor_spec(node).shape) <= 1]
    floating = [(leaf, node) for leaf, node in inputs if tensor_spec(node).dtype.is_floating_point]
    return min(floating or inputs, key=lambda pair: pair[0])[1] if inputs else None
