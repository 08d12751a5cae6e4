"""What calls cost in time: a roofline a call, split into what every trip of a loop pays and what trips share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fmecompile.graph.specs import TensorSpec, node_spec
from fmecompile.operators.contraction import all_products
from fmecompile.runtime.rates import Rates, rates_of


@dataclass(frozen=True)
class Cost:
    """Seconds of one call. ``fixed_s`` is spent whenever it is made, on a slice or on everything: the call itself, and
    reading weights; ``sliced_s`` is in proportion to the slice. ``whole_s`` is that of the whole by the roofline, where
    the slower of computing and moving hides the other."""

    fixed_s: float
    sliced_s: float
    whole_s: float

    @property
    def sum_s(self) -> float:
        """Of the whole, by the parts."""
        return self.fixed_s + self.sliced_s


def cost_of(node: fx.Node, rates: Rates, *, is_view: bool) -> Cost:
    """What one call costs; a view moves nothing."""
    read = () if is_view else node.all_input_nodes
    weights = _nbytes(n for n in read if n.op == "placeholder")
    moved = _nbytes([node, *(n for n in read if n.op != "placeholder")]) if read else 0
    compute_s = all_products(node) / rates.products_per_s
    moved_s = moved / rates.bytes_per_s
    return Cost(
        rates.call_s + weights / rates.weight_bytes_per_s,
        compute_s + moved_s,
        rates.call_s + max(compute_s, moved_s + weights / rates.bytes_per_s),
    )


def rates_for(nodes: Sequence[fx.Node]) -> Rates:
    """The rates of where the largest value of these calls is, in its dtype."""
    specs = [spec for node in nodes if isinstance(spec := node_spec(node), TensorSpec)]
    largest = max(specs, key=lambda spec: spec.numel, default=None)
    if largest is None:
        return rates_of(torch.device("cpu"), torch.float32)
    return rates_of(largest.device, largest.dtype)


def _nbytes(nodes: Iterable[fx.Node]) -> int:
    specs = [spec for node in nodes if isinstance(spec := node_spec(node), TensorSpec)]
    return sum(spec.numel * spec.dtype.itemsize for spec in specs)
