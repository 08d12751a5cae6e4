"""What it costs that values wait in host memory: bytes moved, and the time of it beside the time of computing."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import fx

from fmecompile.graph.group import Group
from fmecompile.graph.plan import Transfer
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.graph.specs import TensorSpec, node_spec, tensor_spec
from fmecompile.operators.contraction import products
from fmecompile.runtime.host import to_device, to_host
from fmecompile.runtime.rates import bytes_per_s, rates_of


def work(program: Program) -> int:
    """Products of convolutions and of matrix products with weights; attention is left out."""
    return sum(map(products, compute_nodes(program.graph)))


def transfer(program: Program, groups: Iterable[Group], computed: int) -> Transfer | None:
    """The transfers of a finished program that computes so many products; None where nothing moves."""
    plain = compute_nodes(program.graph)
    out = sum(_bytes(node) for node in plain if node.target is to_host)
    fetched = [(node, 1) for node in plain if node.target is to_device]
    for group in groups:
        hosted = zip(group.results, group.spec.outputs, strict=True)
        out += sum(_bytes(node) for node, output in hosted if output.host_of is not None)
        rounds = prod(axis.trips for axis in group.spec.axes[:-1])
        for kind, body in enumerate(group.bodies):
            trips = rounds * group.spec.kinds.count(kind)
            fetched += [(node, trips) for node in compute_nodes(body) if node.target is to_device]
    if not fetched:
        return None
    back = sum(_bytes(node) * trips for node, trips in fetched)
    spec = tensor_spec(fetched[0][0])
    copy_rate, is_measured = bytes_per_s(spec.device)
    rate = rates_of(spec.device, spec.dtype).products_per_s
    return Transfer(out, back, max(out, back) / copy_rate, computed / rate, is_measured)  # both directions at once


def _bytes(node: fx.Node) -> int:
    spec = node_spec(node)
    return spec.numel * spec.dtype.itemsize if isinstance(spec, TensorSpec) else 0
