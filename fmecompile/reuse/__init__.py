"""Step reuse: policies that say, for each step, what is computed and what is reused. Pure Python, no tensors."""

from fmecompile.reuse.ada_cache import FAST_30, FAST_100, SLOW_30, AdaCache
from fmecompile.reuse.db_cache import DBCache
from fmecompile.reuse.deep_cache import DeepCache
from fmecompile.reuse.faster_cache import FasterCache, attention_weight, frequency_factors
from fmecompile.reuse.first_block_cache import FirstBlockCache
from fmecompile.reuse.forecast import difference_scales, newton_coefficients, renew, taylor_coefficients
from fmecompile.reuse.guards import Guards, History, guarded
from fmecompile.reuse.mag_cache import MagCache
from fmecompile.reuse.policy import (
    FeedbackPolicy,
    FeedbackRun,
    Policy,
    ProbePolicy,
    ProbeRun,
    SchedulePolicy,
    StaticPolicy,
)
from fmecompile.reuse.pyramid_attention import Broadcast, PyramidAttention
from fmecompile.reuse.smooth_cache import SmoothCache
from fmecompile.reuse.step_rehash import StepRehash, gamma_for, keys
from fmecompile.reuse.steps import ALL, ATTENTION, FULL, REUSE, UNCOND, Decision, Steps, to_bits, variants
from fmecompile.reuse.taylor_seer import TaylorSeer
from fmecompile.reuse.tea_cache import TeaCache

__all__ = [
    "ALL",
    "ATTENTION",
    "FAST_30",
    "FAST_100",
    "FULL",
    "REUSE",
    "SLOW_30",
    "UNCOND",
    "AdaCache",
    "Broadcast",
    "DBCache",
    "Decision",
    "DeepCache",
    "FasterCache",
    "FeedbackPolicy",
    "FeedbackRun",
    "FirstBlockCache",
    "Guards",
    "History",
    "MagCache",
    "Policy",
    "ProbePolicy",
    "ProbeRun",
    "PyramidAttention",
    "SchedulePolicy",
    "SmoothCache",
    "StaticPolicy",
    "StepRehash",
    "Steps",
    "TaylorSeer",
    "TeaCache",
    "attention_weight",
    "difference_scales",
    "frequency_factors",
    "gamma_for",
    "guarded",
    "keys",
    "newton_coefficients",
    "renew",
    "taylor_coefficients",
    "to_bits",
    "variants",
]
