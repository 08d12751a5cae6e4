"""The record as Markdown: a table a measurement and case, and where ``docs/peers.md`` and ``README.md`` have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, str, str]
"""A heading, the name of the figure in a row, and its format."""

COLUMNS: dict[str, tuple[Column, ...]] = {
    "real": (
        ("projected GiB", "projected GiB", ".3f"),
        ("measured GiB", "measured GiB", ".3f"),
    ),
    "reduced": (
        ("time / eager", "time", ".2f"),
        ("least", "least", ".2f"),
        ("most", "most", ".2f"),
        ("projected MiB", "projected MiB", ".1f"),
        ("measured MiB", "measured MiB", ".1f"),
        ("allocator MiB", "allocator MiB", ".1f"),
        ("error", "error", ".1e"),
        ("compile s", "compile s", ".1f"),
        ("graphs", "graphs", "d"),
    ),
    "reuse real": (("peak GiB", "peak GiB", ".3f"), ("kept MiB", "kept MiB", ".1f")),
    "reuse time": (("time / eager", "time", ".2f"), ("least", "least", ".2f"), ("most", "most", ".2f")),
    "quality": (("PSNR dB", "PSNR dB", ".1f"), ("SSIM", "SSIM", ".4f")),
}
TITLES = {
    "real": "Peak of activations of a call at the real size, float16, guidance batch 2, on fake tensors",
    "reduced": "A call with real widths at a reduced size, float32",
    "reuse real": "A generation of 6 steps with reuse at the real size, float16, on fake tensors",
    "reuse time": "The time of a generation of 6 steps with reuse at a reduced size, float32",
    "quality": "Clips of the trained models with reuse, 25 steps, against eager in float64",
}
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


def tables(rows: Iterable[Row], level: str = "###") -> str:
    """Every table of ``rows``."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in joined(rows):
        found.setdefault(row["measurement"], {}).setdefault(row["case"], []).append(row)
    parts: list[str] = []
    for measurement, cases in found.items():
        parts.append(f"{level} {TITLES[measurement]}")
        parts += [table(case, part, COLUMNS[measurement]) for case, part in cases.items()]
    return "\n\n".join(parts)


def joined(rows: Iterable[Row]) -> list[Row]:
    """Times of calls in the rows that have the rest; a method that one of the two refuses has the other's figures."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        measurement = "reduced" if row["measurement"] == "time" else row["measurement"]
        both = found.get((measurement, row["case"], row["method"]), {}) | row | {"measurement": measurement}
        if "error" in both or "time" in both:
            both.pop("refused", None)
        found[measurement, row["case"], row["method"]] = both
    return list(found.values())


def table(case: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """One case. A row without figures says why, across the columns; the least bytes of exact methods are bold."""
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [f"| {case} | " + " | ".join(head for head, *_ in columns) + " |", "|---|" + "--:|" * len(columns)]
    refused = [row for row in rows if "refused" in row]
    for row in rows:
        if "refused" not in row:
            lines.append(
                f"| {row['method']} | " + " | ".join(cell(row.get(name), how) for _, name, how in columns) + " |"
            )
    if len(refused) == len(rows):
        lines = [f"| {case} | |", "|---|---|"]
    lines += [f"| {row['method']} | {escaped(row['refused'])} |" + " |" * (len(columns) - 1) for row in refused]
    return "\n".join(lines)


def cell(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)


def escaped(text: str, most: int = 160) -> str:
    """Another library's words in a cell of a table."""
    short = text if len(text) <= most else text[: most - 1].rstrip() + "…"
    return short.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("`", "'")


def write_docs(record: Mapping[str, Any], root: Path) -> list[Path]:
    """Put the record's tables where ``docs/peers.md`` has them, and the shortest ones in the README."""
    where = f"{record['device']}, {record['cores']} cores, torch {record['torch']}, diffusers {record['diffusers']}"
    head = (
        f"Written by `{record['command']} --docs` from the record of `{record['command']}`: {record['date']}, {where}."
    )
    rows = record["rows"]
    texts = {root / "docs" / "peers.md": f"{head}\n\n{tables(rows)}", root / "README.md": summary(rows, head)}
    for path, text in texts.items():
        page = path.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return list(texts)


def summary(rows: Sequence[Row], head: str) -> str:
    """Exact methods, a line each: the measured peak of each denoiser at the real size, and time at the reduced one."""
    chosen = {
        "SVD, GiB": ("real", "SVD, 14 frames, 576x1024", "measured GiB", ".2f"),
        "SVD-XT, GiB": ("real", "SVD-XT, 25 frames, 576x1024", "measured GiB", ".2f"),
        "AnimateDiff, GiB": ("real", "AnimateDiff, 16 frames, 512x512", "measured GiB", ".2f"),
        "SVD, time": ("time", "SVD, 4 frames, 128x160, 2 levels", "time", ".2f"),
        "AnimateDiff, time": ("time", "AnimateDiff, 4 frames, 128x128, 2 levels", "time", ".2f"),
    }
    by_key = {(row["measurement"], row["case"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows if row["measurement"] in ("real", "reduced")))
    lines = [head, "", "| | " + " | ".join(chosen) + " |", "|---|" + "--:|" * len(chosen)]
    for method in methods:
        found = [
            cell(by_key.get((measurement, case, method), {}).get(name), how)
            for measurement, case, name, how in chosen.values()
        ]
        if any(found):
            lines.append(f"| {method} | " + " | ".join(found) + " |")
    return "\n".join(lines)
