"""Step reuse: policies that say, for each step, what is computed and what is reused. Pure Python, no tensors."""

from fmecompile.reuse.forecast import difference_scales, newton_coefficients, renew, taylor_coefficients
from fmecompile.reuse.guards import Guards, History, guarded
from fmecompile.reuse.policy import (
    FeedbackPolicy,
    FeedbackRun,
    Policy,
    ProbePolicy,
    ProbeRun,
    SchedulePolicy,
    StaticPolicy,
)
from fmecompile.reuse.steps import ALL, ATTENTION, FULL, REUSE, UNCOND, Decision, Steps, to_bits, variants

__all__ = [
    "ALL",
    "ATTENTION",
    "FULL",
    "REUSE",
    "UNCOND",
    "Decision",
    "FeedbackPolicy",
    "FeedbackRun",
    "Guards",
    "History",
    "Policy",
    "ProbePolicy",
    "ProbeRun",
    "SchedulePolicy",
    "StaticPolicy",
    "Steps",
    "difference_scales",
    "guarded",
    "newton_coefficients",
    "renew",
    "taylor_coefficients",
    "to_bits",
    "variants",
]
