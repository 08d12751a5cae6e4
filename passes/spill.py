"""spill: let a value wait in host memory between two of its readers.

    before  x = conv(a);  y = silu(x);  ... the middle of the model ...;  z = cat([y, x])
    after   x = conv(a);  h = to_host(x);  y = silu(x);  ...;  b = to_device(h);  z = cat([y, b])

The device holds ``x`` only up to its last early reader, and each late reader's copy only while that runs. Inside a
chunk loop the copies are slices: then the device never holds the value as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.storages import Storages, part_of, storages
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.runtime.host import to_device, to_host

Wait = tuple[str, str]
"""A value that owns its storage, and the call from which on its readers get a copy back; by name."""


@dataclass(frozen=True)
class Spill:
    """Let values wait, each up to a call."""

    waits: Sequence[Wait]

    def apply(self, program: Program, facts: FactTable) -> str:
        moved = 0
        for owner, at in self.waits:
            nodes = compute_nodes(program.graph)
            named = {node.name: node for node in nodes}
            held = storages(nodes, program.outputs, facts)
            moved += held.nbytes[held.position[named[owner]]]
            _spilled(named[owner], held.position[named[at]], held, facts)
            edit.drop_dead(program.graph)  # views of the owner that nothing reads any more would keep it waiting
        return f"{len(self.waits)} values wait in host memory, {moved / 2**20:.0f} MiB" if moved else "no value moved"


def _spilled(owner: fx.Node, at: int, held: Storages, facts: FactTable) -> None:
    device = tensor_spec(owner).device
    host = edit.insert_before(owner.next, to_host, (owner,), like=owner)
    edit.annotate([host], facts)
    for reader, values in late_readers(owner, at, held):
        back = edit.insert_before(reader, to_device, (host, device), like=reader)
        edit.annotate([back], facts)
        copies = {owner: back}
        for value in values:
            edit.read_instead(reader, value, _again(value, reader, copies, facts))


def _again(value: fx.Node, reader: fx.Node, copies: dict[fx.Node, fx.Node], facts: FactTable) -> fx.Node:
    """A view of the owner, taken anew of its copy."""
    if value not in copies:
        source = next(n for n in value.all_input_nodes if n in copies or isinstance(node_spec(n), TensorSpec))
        _again(source, reader, copies, facts)
        copies[value] = edit.clone_before(value, reader, copies)
        edit.annotate([copies[value]], facts)
    return copies[value]


def in_parts(held: Storages) -> set[fx.Node]:
    """Owners that cannot wait: of which a call with several results takes a view, or that are such a call."""
    return {
        owner
        for value, owner in held.roots.items()
        if part_of(value) is not None or not isinstance(node_spec(value), TensorSpec)
    }


def late_readers(owner: fx.Node, at: int, held: Storages) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Calls from position ``at`` on that read the storage of ``owner``, each with the values it reads it by."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, root in held.roots.items():
        if root is owner:
            for user in value.users:
                if held.roots.get(user) is not owner and held.position.get(user, -1) >= at:
                    found.setdefault(user, []).append(value)
    return sorted(found.items(), key=lambda item: held.position[item[0]])
