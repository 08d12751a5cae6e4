"""Facts about families of diffusers models, as data: nothing in the compiler depends on a model's name."""

from __future__ import annotations

SCALAR_INPUTS = frozenset({"timestep", "timesteps", "t", "sigma"})
"""Arguments of denoisers that arrive as Python numbers and change at every step."""
