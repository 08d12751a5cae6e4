"""The rows of an evaluation as a page: tables in Markdown, and a plot as SVG that reads in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.report import table

Row = dict[str, Any]
Points = list[tuple[int, float]]

METRIC = "PSNR dB"
NAMES = {"svd": "SVD", "animatediff": "AnimateDiff"}
COLUMNS = ("policy", "full steps", "work", METRIC, "SSIM", "perceptual", "flicker")
PLOTTED = {
    "fewer steps": "grey dotted",
    "DeepCache": "orange",
    "Step Rehash calibrated, feature": "blue",
    "Step Rehash calibrated, residual": "green",
    "Step Rehash calibrated, forecast 1": "purple",
    "Step Rehash even, forecast 1": "purple dashed",
}
"""What is drawn, and how; the tables have the rest."""
WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 260, 52, 40, 40
STYLE = """
svg { --text: #1b2127; --quiet: #55606b; --rule: #d5dbe1; --back: #ffffff;
  --grey: #6b7280; --orange: #b45309; --blue: #1d5fd0; --green: #15803d; --purple: #8b3fc7; }
@media (prefers-color-scheme: dark) { svg { --text: #e7ecf1; --quiet: #a3afba; --rule: #343e48; --back: #11161b;
  --grey: #9aa5b1; --orange: #f2a33a; --blue: #6cabff; --green: #4ccb7c; --purple: #c894f5; } }
text { font: 12px system-ui, sans-serif; fill: var(--quiet); } .title { font-weight: 600; fill: var(--text); }
.back { fill: var(--back); } .rule { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dotted { stroke-dasharray: 2 4; }
.dashed { stroke-dasharray: 7 4; } .end { text-anchor: end; } .middle { text-anchor: middle; }
"""
COLOURS = ("grey", "orange", "blue", "green", "purple")
CLASSES = "".join(f".{c} {{ stroke: var(--{c}); }} circle.{c} {{ fill: var(--{c}); }}\n" for c in COLOURS)


def write_page(
    rows: Sequence[Row], trained: Mapping[str, Mapping[str, str]], folder: Path, *, command: str, clips: int, steps: int
) -> list[Path]:
    """Write ``quality.md`` and ``quality.svg`` into ``folder``. ``trained``: what is known of each model's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    plot, page = folder / "quality.svg", folder / "quality.md"
    plot.write_text(drawn(rows), encoding="utf-8")
    page.write_text("\n".join(_page(rows, trained, command, clips, steps)) + "\n", encoding="utf-8")
    return [page, plot]


# --------------------------------------------------------------------------------------------------------------- tables


def _page(
    rows: Sequence[Row], trained: Mapping[str, Mapping[str, str]], command: str, clips: int, steps: int
) -> list[str]:
    lines = [
        "# What step reuse does to clips",
        "",
        f"Written by `{command}`: {clips} clips a model, {steps} steps, the same seed with reuse and without; the"
        " figures compare the two. The UNets are small, of the real classes, and trained on moving digits and three"
        " real clips (`benchmarks/quality`): they tell schedules and modes apart, and do not stand for large models.",
        "",
        "`work` is relative to full steps only. `no reuse` is rounding alone, `inf` where there is none; `fewer steps`"
        " is the sampler run with that many.",
        "",
        "![PSNR over full steps](quality.svg)",
    ]
    for model, facts in trained.items():
        own = [row for row in rows if row["model"] == model]
        lines += ["", f"## {NAMES.get(model, model)}", "", f"Trained: {_facts(facts)}", ""]
        lines += [f"{METRIC} at equal numbers of full steps:", "", pivot(own, METRIC), "", "All metrics:", ""]
        lines += [table([_cells(row) for row in own if METRIC in row])]
        lines += [f"\n`{row['policy']}` was refused: {row['refused']}" for row in own if "refused" in row]
    return lines


def _facts(facts: Mapping[str, str]) -> str:
    told = [f"{name} {facts[name]}" for name in ("trained_steps", "batch", "seed", "loss", "date") if name in facts]
    return ", ".join(told).replace("trained_steps", "steps") + (f"; `{facts['command']}`" if "command" in facts else "")


def _cells(row: Row) -> Row:
    sources = [name for name in row if name.startswith(f"{METRIC}, ")]
    cells = {name: "-" if row.get(name) is None else row[name] for name in (*COLUMNS, *sources)}
    return cells | {"perceptual": f"{row['perceptual']:.1e}"}


def pivot(rows: Sequence[Row], metric: str) -> str:
    """A policy a line, a number of full steps a column; those that all share come first."""
    counts = sorted({row["full steps"] for row in rows if row["policy"] == "fewer steps"}, reverse=True)
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if metric in row and row["full steps"] in counts:
            found.setdefault(row["policy"], {})[row["full steps"]] = row[metric]
    lines = [{"policy": name} | {str(n): of.get(n, "-") for n in counts} for name, of in found.items()]
    return table(lines) if lines else "none"


# ----------------------------------------------------------------------------------------------------------------- plot


def drawn(rows: Sequence[Row]) -> str:
    """One panel a model, PSNR over full steps, with one legend."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    panels = [_panel(model, _lines(rows, model), LEFT + k * (WIDTH + LEFT + GAP)) for k, model in enumerate(models)]
    width = LEFT + len(models) * (WIDTH + LEFT + GAP)
    legend = [
        _legend(name, style, LEFT + (k % 3) * 270, TOP + HEIGHT + 62 + 20 * (k // 3))
        for k, (name, style) in enumerate(PLOTTED.items())
    ]
    width, height = max(width, LEFT + 3 * 270), TOP + HEIGHT + 105
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>PSNR of clips with step reuse against those without, over the number of full steps</title>\n"
        f"<style>{STYLE}{CLASSES}</style>\n"
        f'<rect class="back" width="{width}" height="{height}"/>\n' + "\n".join([*panels, *legend]) + "\n</svg>\n"
    )


def _lines(rows: Sequence[Row], model: str) -> dict[str, Points]:
    found: dict[str, Points] = {name: [] for name in PLOTTED}
    for row in rows:
        if row["model"] == model and row["policy"] in PLOTTED and math.isfinite(row.get(METRIC, math.nan)):
            found[row["policy"]].append((row["full steps"], row[METRIC]))
    return {name: sorted(points) for name, points in found.items() if points}


def _panel(model: str, lines: Mapping[str, Points], left: float) -> str:
    points = [point for found in lines.values() for point in found] or [(1, 0.0)]
    least, most = min(x for x, _ in points), max(x for x, _ in points)
    low, high, step = scale(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - least) / max(most - least, 1) * WIDTH
        return round(left + across, 1), round(TOP + HEIGHT - (y - low) / (high - low) * HEIGHT, 1)

    parts = [f'<text class="title" x="{left}" y="{TOP - 16}">{escape(NAMES.get(model, model))}: PSNR in dB</text>']
    for k in range(round((high - low) / step) + 1):
        y = place(least, low + k * step)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 4}">{low + k * step:g}</text>')
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text class="middle" x="{place(x, low)[0]}" y="{TOP + HEIGHT + 18}">{x}</text>')
    parts.append(f'<text class="middle" x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 36}">full steps</text>')
    for name, found in lines.items():
        parts += _line(name, [place(*point) for point in found])
    return "\n".join(parts)


def _line(name: str, places: Sequence[tuple[float, float]]) -> list[str]:
    style = PLOTTED[name]
    path = " ".join(f"{x},{y}" for x, y in places)
    dots = [f'<circle class="{style.split()[0]}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    return [f'<polyline class="line {style}" points="{path}"><title>{escape(name)}</title></polyline>', *dots]


def _legend(name: str, style: str, x: float, y: float) -> str:
    line = f'<line class="line {style}" x1="{x}" x2="{x + 26}" y1="{y - 4}" y2="{y - 4}"/>'
    return f'{line}<text x="{x + 33}" y="{y}">{escape(name)}</text>'


def scale(least: float, most: float) -> tuple[float, float, float]:
    """An axis around values: its ends and the distance of its rules, 1, 2 or 5 times a power of ten."""
    rough = max(most - least, 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    low = math.floor(least / step) * step
    return low, max(math.ceil(most / step) * step, low + step), step
