"""What the unmodified module holds during a call, beside a plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from fmecompile.graph.outline import bands
from fmecompile.graph.plan import Plan
from fmecompile.runtime.measure import Measurement

POINTS = 2000
"""So many samples of a timeline at most are kept."""


def with_eager(plan: Plan, eager: Measurement) -> Plan:
    """The plan with eager's peak and timeline: the maximum of each of equal stretches, so that no peak is lost."""
    timeline = eager.timeline
    stride = -(-len(timeline) // POINTS) or 1
    thinned = tuple(max(timeline[i : i + stride]) for i in range(0, len(timeline), stride))
    return replace(
        plan,
        eager_peak_bytes=eager.peak_bytes,
        eager_timeline=thinned,
        eager_bands=bands(_modules(eager, stride), plan.modules()),
    )


def _modules(eager: Measurement, stride: int) -> list[str]:
    """The module that begins the last in each stretch, or else goes on."""
    found = [""] * -(-len(eager.timeline) // stride)
    starts = [*eager.modules, ("", len(eager.timeline))]
    for (name, start), (_, stop) in pairwise(starts):
        if start < stop:
            first = start // stride
            found[first : -(-stop // stride)] = [name] * (-(-stop // stride) - first)
    return found
