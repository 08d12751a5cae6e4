"""What was done to a module or a diffusion pipeline: fields for a program; text, terminal and page for a person."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fmecompile.errors import OptionError
from fmecompile.explain.sheets import Eager, sheet_of, titles
from fmecompile.explain.terminal import rendered
from fmecompile.pipeline import Record
from fmecompile.report.plan_page import Sheet, write_page
from fmecompile.reuse.calibration import Calibration
from fmecompile.runtime.measure import Measurement


@dataclass(frozen=True)
class Explanation:
    """Printed, it tells a person, in tables with ``rich.print``; its fields tell a program. ``refused`` are captures
    that failed, as text. ``eager`` runs the unmodified module on fake tensors, where a page needs its timeline.
    """

    module: str
    records: tuple[Record, ...]
    refused: tuple[str, ...]
    eager: Eager | None = field(default=None, repr=False, compare=False)

    def to_html(
        self,
        path: str | Path,
        *,
        measured: Measurement | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Write a self-contained page: for each compiled signature its memory timelines, what its peak is made of,
        groups, barriers, what is reused between steps, the graph before and after, and the plan.

        Runs the unmodified module once a signature, on fake tensors, for its timeline: seconds for a large one.
        ``measured`` is what ``fmecompile.measure`` returned for the signature that was called last; ``calibration``
        adds how much steps are alike. Raises OptionError where one of them is something else.
        """
        _write(Path(path), f"What was done to {self.module}", "", {"": self}, measured, calibration)

    def sheets(
        self, part: str = "", measured: Measurement | None = None, calibration: Calibration | None = None
    ) -> list[Sheet]:
        """What a page shows of each signature."""
        last = len(self.records) - 1
        return [
            sheet_of(record, self.eager, title, measured if k == last else None, calibration)
            for k, (record, title) in enumerate(zip(self.records, titles(self.records, part), strict=True))
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.module}: {len(self.records)} compiled signatures, {len(self.refused)} refused", style="bold")
        for record in self.records:
            yield from rendered(record, options.max_width)
        yield from (Text(f"refused: {text}", style="yellow") for text in self.refused)

    def __str__(self) -> str:
        lines = [f"{self.module}: {len(self.records)} compiled signatures, {len(self.refused)} refused"]
        for record in self.records:
            lines += ["", f"inputs {record.plan.key.signature}", record.plan.summary()]
            lines += [f"  why: {g.modules[0] if g.modules else g.first}: {g.because}" for g in record.plan.groups[:3]]
            held = ", ".join(f"{owner.name} {owner.nbytes / 2**20:.0f} MiB" for owner in record.plan.owners[:5])
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

    def to_html(
        self,
        path: str | Path,
        *,
        measured: Measurement | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Write one page of all parts, as :meth:`Explanation.to_html` does; ``measured`` and ``calibration`` are of the
        first part, the denoiser."""
        told = {path: part for path, part in self.parts.items() if part is not None}
        _write(Path(path), f"What was done to {self.target}", _decoding(self.decoding), told, measured, calibration)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.target}: {', '.join(self.parts)}", style="bold")
        if self.decoding:
            yield Text(_decoding(self.decoding))
        for path, part in self.parts.items():
            yield Text(f"\n{path}" if part is not None else f"\n{path}: not optimized", style="bold")
            if part is not None:
                yield part

    def __str__(self) -> str:
        lines = [f"{self.target}: {', '.join(self.parts)}"]
        lines += [_decoding(self.decoding)] if self.decoding else []
        for path, part in self.parts.items():
            lines += ["", f"{path}: {part or 'not optimized'}"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def _decoding(text: str) -> str:
    return f"decoding: {text}" if text else ""


def _write(
    path: Path,
    title: str,
    about: str,
    parts: Mapping[str, Explanation],
    measured: Any,
    calibration: Any,
) -> None:
    for name, value, kind in (("measured", measured, Measurement), ("calibration", calibration, Calibration)):
        if value is not None and not isinstance(value, kind):
            made = "measure" if kind is Measurement else "calibrate"
            raise OptionError(
                f"{name} is a {type(value).__name__}, not a {kind.__name__}",
                next_step=f"pass what fmecompile.{made} returned",
            )
    given = {name: (measured, calibration) if place == 0 else (None, None) for place, name in enumerate(parts)}
    sheets = [sheet for name, part in parts.items() for sheet in part.sheets(name, *given[name])]
    write_page(path, title, about, sheets, [text for part in parts.values() for text in part.refused])
