"""write-over: in the body of a loop, a pointwise call writes over an operand that nothing reads afterwards.

    before  n = group_norm(x, 32, w, b);  y = silu(n);         return (conv2d(y, k), x)
    after   n = group_norm(x, 32, w, b);  y = silu(n, out=n);  return (conv2d(y, k), x)

The same numbers in the same memory, so that a trip holds two values where it held three. Bodies are written so as they
are built, and the search counts on it. A value that ``reader-layout`` lays out anew keeps memory of its own. Where a
backend makes kernels of runs of operators nothing is written over: a kernel does not write what stands between, and
what it returns is new.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fmecompile.analysis.facts import FactTable
from fmecompile.analysis.overwrites import INTO, overwrites
from fmecompile.graph import edit
from fmecompile.graph.program import compute_nodes
from fmecompile.passes.reader_layout import wanted_strides


@dataclass(frozen=True)
class WriteOver:
    """Rewrite the body of a loop."""

    def apply(self, body: fx.Graph, facts: FactTable) -> int:
        """Let calls of ``body`` write over operands; how many do."""
        chosen = overwrites(compute_nodes(body))
        found = {node: over for node, over in chosen.items() if wanted_strides(node) is None}
        for node, over in found.items():
            edit.retarget(node, INTO[node.target], node.args, {**node.kwargs, "out": over})
        if found:
            edit.annotate(compute_nodes(body), facts)  # strides of one row may differ
        return len(found)
