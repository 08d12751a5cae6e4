"""Video diffusion in a fraction of the activation memory: a torch.fx graph-rewriting compiler, exact by default."""

from fmecompile.api import explain, is_optimized, optimize, plan, restore, stages
from fmecompile.bisect import bisect
from fmecompile.calibrate import calibrate
from fmecompile.difference import diff
from fmecompile.errors import (
    BudgetInfeasible,
    CalibrationMismatch,
    CaptureError,
    FmeError,
    GradientError,
    OptionError,
    PlanMismatch,
    TargetError,
    VerificationError,
)
from fmecompile.graph.plan import Plan
from fmecompile.reuse import (
    AdaCache,
    DBCache,
    DeepCache,
    FasterCache,
    FirstBlockCache,
    Guards,
    MagCache,
    PyramidAttention,
    SmoothCache,
    StepRehash,
    TaylorSeer,
    TeaCache,
)
from fmecompile.reuse.calibration import Calibration
from fmecompile.runtime.generation import generation
from fmecompile.runtime.measure import Measurement, measure
from fmecompile.runtime.snapshot import memory_snapshot

__all__ = [
    "AdaCache",
    "BudgetInfeasible",
    "Calibration",
    "CalibrationMismatch",
    "CaptureError",
    "DBCache",
    "DeepCache",
    "FasterCache",
    "FirstBlockCache",
    "FmeError",
    "GradientError",
    "Guards",
    "MagCache",
    "Measurement",
    "OptionError",
    "Plan",
    "PlanMismatch",
    "PyramidAttention",
    "SmoothCache",
    "StepRehash",
    "TargetError",
    "TaylorSeer",
    "TeaCache",
    "VerificationError",
    "bisect",
    "calibrate",
    "diff",
    "explain",
    "generation",
    "is_optimized",
    "measure",
    "memory_snapshot",
    "optimize",
    "plan",
    "restore",
    "stages",
]
