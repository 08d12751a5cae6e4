"""Pictures of plans and policies as small SVG files that stand alone: light and dark, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from fmecompile.graph.plan import Plan
from fmecompile.report import bytes_text, ticks_up_to, unit_of

WIDTH, LEFT, TOP, RIGHT = 760, 64, 40, 28
STYLE = """
svg { --text: #1b2127; --quiet: #55606b; --rule: #d5dbe1; --back: #ffffff; --eager: #b45309; --ours: #1d5fd0; }
@media (prefers-color-scheme: dark) { svg { --text: #e7ecf1; --quiet: #a3afba; --rule: #343e48; --back: #11161b;
  --eager: #f2a33a; --ours: #6cabff; } }
text { font: 12px system-ui, sans-serif; fill: var(--quiet); } .title { font-weight: 600; fill: var(--text); }
.back { fill: var(--back); } .rule { stroke: var(--rule); } .end { text-anchor: end; } .middle { text-anchor: middle; }
path { fill-opacity: 0.25; stroke-width: 1.5; } .eager { fill: var(--eager); } .ours { fill: var(--ours); }
path.eager { stroke: var(--eager); } path.ours { stroke: var(--ours); }
.hollow { fill: none; stroke: var(--quiet); } .limit { stroke: var(--text); stroke-dasharray: 6 4; }
"""
_COLUMNS = 340


def timelines(title: str, plan: Plan) -> str:
    """Both activation timelines of a plan on one axis, and what was allowed."""
    height = 260
    bottom = TOP + height
    top, parts = _axis(max(*plan.eager_timeline, *plan.timeline), height)
    for style, values in (("eager", plan.eager_timeline), ("ours", plan.timeline)):
        parts.append(f'<path class="{style}" d="{_steps(values, top, height)}"/>')
    y = _number(bottom - plan.allowed_bytes / top * height)
    parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    parts += [
        f'<text class="middle" x="{_across(part)}" y="{bottom + 18}">{part} %</text>' for part in (0, 25, 50, 75, 100)
    ]
    parts.append(f'<text class="middle" x="{_across(50)}" y="{bottom + 36}">of the operators run</text>')
    parts += [
        *_legend(0, bottom + 60, "eager", f"eager: {bytes_text(max(plan.eager_timeline))} at most"),
        *_legend(1, bottom + 60, "ours", f"optimized: {bytes_text(max(plan.timeline))} at most"),
        f'<text x="{LEFT + 480}" y="{bottom + 60}">dashed: {bytes_text(plan.allowed_bytes)} allowed</text>',
    ]
    return _picture(title, bottom + 76, parts)


def groups(title: str, plan: Plan) -> str:
    """Two bars a group, in the order of the call: what the call would hold, and what it holds, while it runs."""
    height = 220
    bottom = TOP + height
    top, parts = _axis(max(group.whole_bytes for group in plan.groups), height)
    room = (WIDTH - LEFT - RIGHT) / len(plan.groups)
    for k, group in enumerate(plan.groups):
        for style, share, nbytes in (("eager", 0.1, group.whole_bytes), ("ours", 0.5, group.peak_bytes)):
            tall = nbytes / top * height
            x, y = _number(LEFT + (k + share) * room), _number(bottom - tall)
            about = escape(f"{', '.join(group.modules) or group.first}: {group.trips} trips, {bytes_text(nbytes)}")
            size = f'width="{_number(0.4 * room)}" height="{_number(tall)}"'
            parts.append(f'<rect class="{style}" x="{x}" y="{y}" {size}><title>{about}</title></rect>')
    parts += [
        f'<text class="middle" x="{_across(50)}" y="{bottom + 18}">{len(plan.groups)} groups, first to last</text>',
        *_legend(0, bottom + 44, "eager", "held if the group ran whole"),
        *_legend(1, bottom + 44, "ours", "held while its loop runs"),
    ]
    return _picture(title, bottom + 60, parts)


def strips(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A row of cells a policy, one a step: filled where everything is computed (``1``)."""
    names, cell, pitch = 330, 15, 26
    parts = []
    for k, (name, bits) in enumerate(rows):
        y = TOP + k * pitch
        parts.append(f'<text class="end" x="{names - 12}" y="{y + 12}">{escape(name)}</text>')
        for step, bit in enumerate(bits):
            style = "ours" if bit == "1" else "hollow"
            parts.append(
                f'<rect class="{style}" x="{names + step * (cell + 2)}" y="{y}" width="{cell}" height="{cell}"/>'
            )
    bottom = TOP + len(rows) * pitch
    parts.append(f'<text x="{names}" y="{bottom + 12}">filled: computed; empty: reused</text>')
    return _picture(title, bottom + 28, parts)


def _picture(title: str, height: int, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="back" width="{WIDTH}" height="{height}"/>\n'
        f'<text class="title" x="16" y="22">{escape(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _axis(most: int, height: int) -> tuple[float, list[str]]:
    """The bytes at the top of a vertical axis, and its rules."""
    unit, name = unit_of(most)
    ticks = ticks_up_to(most / unit)
    parts = []
    for tick in ticks:
        y = _number(TOP + height * (1 - tick / ticks[-1]))
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{_number(float(y) + 4)}">{tick:g} {name}</text>')
    return ticks[-1] * unit, parts


def _steps(values: Sequence[int], top: float, height: int) -> str:
    """A step curve with the area below it; the maximum of each column."""
    stride = math.ceil(len(values) / _COLUMNS)
    heights = [max(values[i : i + stride]) / top * height for i in range(0, len(values), stride)]
    across = (WIDTH - LEFT - RIGHT) / len(heights)
    bottom = TOP + height
    moves = (f"V{_number(bottom - h)}H{_number(LEFT + (k + 1) * across)}" for k, h in enumerate(heights))
    return f"M{LEFT} {bottom}{''.join(moves)}V{bottom}Z"


def _legend(place: int, y: int, style: str, text: str) -> list[str]:
    x = LEFT + 240 * place
    return [
        f'<rect class="{style}" x="{x}" y="{y - 10}" width="12" height="12"/>',
        f'<text x="{x + 18}" y="{y}">{escape(text)}</text>',
    ]


def _across(percent: float) -> str:
    return _number(LEFT + (WIDTH - LEFT - RIGHT) * percent / 100)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
