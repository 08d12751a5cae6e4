"""Writes a benchmark's rows as JSON with the machine and versions, and as a Markdown table."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import diffusers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "device": device,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def save(name: str, command: str, rows: list[dict[str, Any]], folder: Path = RESULTS, *, is_part: bool = False) -> Path:
    """Write ``benchmarks/results/<name>.json``, or into another folder. Where ``rows`` are a part of the cases, the
    rest stays as it was; ``date`` tells when each was measured, unless all were with the record."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if is_part and path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        dated = {row["case"]: {"date": known["date"], **row} for row in known["rows"]}
        dated |= {row["case"]: {**row, "date": machine()["date"]} for row in rows}
        rows = list(dated.values())
    path.write_text(json.dumps({"command": command, **machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; floats with three digits."""
    heads = list(rows[0])

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(cell(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines)
