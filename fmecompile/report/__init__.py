"""Self-contained HTML pages, light and dark, no network. Knows no compiler, only plans as data."""

from fmecompile.report.demo_page import Exhibit, write_demo
from fmecompile.report.drawing import (
    GIB,
    KIB,
    MIB,
    Curve,
    Mark,
    bytes_text,
    template,
    ticks_up_to,
    timeline,
    unit_of,
)

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "Curve",
    "Exhibit",
    "Mark",
    "bytes_text",
    "template",
    "ticks_up_to",
    "timeline",
    "unit_of",
    "write_demo",
]
