"""How much of everything: ``SOAK`` random graphs, and in proportion to them the rest."""

from __future__ import annotations

import os

GRAPHS = int(os.environ.get("SOAK", "10"))


def share(times: float, least: int = 1) -> int:
    """So many for each random graph."""
    return max(int(times * GRAPHS), least)
