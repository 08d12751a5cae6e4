"""What was done to a module and why, and what was refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmecompile.pipeline import Record


@dataclass(frozen=True)
class Explanation:
    """Printed, it tells a person; its fields tell a program. ``refused`` are captures that failed, as text."""

    module: str
    records: tuple[Record, ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.module}: {len(self.records)} compiled signatures, {len(self.refused)} refused"]
        for record in self.records:
            lines += ["", f"inputs {record.plan.key.signature}", record.plan.summary()]
            lines += [f"  why: {g.modules[0] if g.modules else g.first}: {g.because}" for g in record.plan.groups[:3]]
            held = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in record.plan.owners[:5])
            lines.append(f"  at the peak: {held}")
            lines += [f"  {line}" for line in str(record.reuse).splitlines()] if record.reuse is not None else []
            lines += [f"  {record.graphs}"] if record.graphs is not None else []
            lines += [f"  {record.allowance}"] if record.allowance is not None else []
            for barrier in record.plan.barriers:
                lines.append(f"  barrier: {barrier.operator} x{barrier.count}: {barrier.reason} (at {barrier.where})")
            lines += [f"  {name}: {note}" for name, note in record.notes]
        lines += ["", *(f"refused: {text}" for text in self.refused)] if self.refused else []
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class PipelineExplanation:
    """One explanation a part, by its path in the target; None for a part that is not optimized. ``decoding`` says how
    many frames the decoder gets at once, in words.
    """

    target: str
    parts: Mapping[str, Explanation | None]
    decoding: str

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for part in self.parts.values() if part is not None for record in part.records)

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(text for part in self.parts.values() if part is not None for text in part.refused)

    def __str__(self) -> str:
        lines = [f"{self.target}: {', '.join(self.parts)}"]
        lines += [f"decoding: {self.decoding}"] if self.decoding else []
        for path, part in self.parts.items():
            lines += ["", f"{path}: {part or 'not optimized'}"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)
