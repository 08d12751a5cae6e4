"""The rule table, one file a family. Importing this package fills it."""

from fmecompile.operators import contraction, normalisation, pointwise, shape
from fmecompile.operators.registry import RULES

__all__ = ["RULES", "contraction", "normalisation", "pointwise", "shape"]
