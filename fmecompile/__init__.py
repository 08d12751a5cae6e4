"""Video diffusion in a fraction of the activation memory: a torch.fx graph-rewriting compiler, exact by default."""

from fmecompile.api import explain, is_optimized, optimize, plan, restore, stages
from fmecompile.errors import (
    BudgetInfeasible,
    CaptureError,
    FmeError,
    GradientError,
    OptionError,
    PlanMismatch,
    TargetError,
    VerificationError,
)
from fmecompile.graph.plan import Plan
from fmecompile.runtime.measure import Measurement, measure

__all__ = [
    "BudgetInfeasible",
    "CaptureError",
    "FmeError",
    "GradientError",
    "Measurement",
    "OptionError",
    "Plan",
    "PlanMismatch",
    "TargetError",
    "VerificationError",
    "explain",
    "is_optimized",
    "measure",
    "optimize",
    "plan",
    "restore",
    "stages",
]
