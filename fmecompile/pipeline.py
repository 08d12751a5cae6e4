"""The passes, in order, on one screen.

Each pass is a frozen dataclass whose fields are its options, with one ``apply(program, facts) -> str`` that says what
it did. Valid graph in, valid graph out: after any of them the program runs, prints and states its projected peak.
"""

from __future__ import annotations

from fmecompile.analysis.facts import FactTable
from fmecompile.graph import edit
from fmecompile.graph.program import Program, compute_nodes
from fmecompile.passes.drop_noops import DropNoops
from fmecompile.passes.eliminate_common import EliminateCommon
from fmecompile.passes.fold_constants import FoldConstants
from fmecompile.passes.relax_views import RelaxViews
from fmecompile.passes.sink_producers import SinkProducers
from fmecompile.passes.two_pass_norm import TwoPassNorm

NORMALISE = (DropNoops(), RelaxViews(), FoldConstants(), EliminateCommon(), DropNoops(), SinkProducers(), TwoPassNorm())


def normalise(program: Program, facts: FactTable):
    edit.annotate(compute_nodes(program.graph), facts)
    for item in NORMALISE:
        print(type(item).__name__, item.apply(program, facts))
        edit.annotate(compute_nodes(program.graph), facts)
