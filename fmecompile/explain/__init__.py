"""What was done to a module and why, and what was refused and why: as data, as text, on a terminal, as a page."""

from fmecompile.explain.eager import with_eager
from fmecompile.explain.explanation import Explanation, PipelineExplanation

__all__ = ["Explanation", "PipelineExplanation", "with_eager"]
