"""What one run of a sampler tells about its steps: data, saved as JSON, that policies are made from.

A **record** belongs to one cut. It has one **trace** per branch of guidance, and a trace compares the cut's values of
different steps: all pairs by their cosine, neighbours by relative L1 and by magnitude. The model's output is a record
too. Figures are means over the generations of a calibration, and over the values of a cut that has several.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from fmecompile.config import write_whole
from fmecompile.errors import CalibrationMismatch, OptionError
from fmecompile.reuse.options import numbers, one_of, whole

FORMAT = 1
LAGS = 3
"""Neighbours up to this many steps apart are compared by relative L1."""

OUTPUT = "output"
"""The record of what the model returns."""

Row = tuple[float, ...]
Matrix = tuple[Row, ...]
Cut = str | tuple[str, ...]
Mode = Literal["feature", "residual", "probe"]
MODES: tuple[Mode, ...] = ("feature", "residual", "probe")


@dataclass(frozen=True)
class CalibrationKey:
    """What figures belong to: the denoiser's class and a digest of its configuration, the sampler's class (``""`` where
    it is not known), the number of steps, shape and dtype of the clip that the denoiser takes.

    A policy carries the key of its calibration, and refuses another model and another number of steps.
    """

    model: str
    config: str
    sampler: str
    steps: int
    shape: tuple[int, ...]
    dtype: str

    def require_steps(self, count: int) -> None:
        """Raises CalibrationMismatch where a run has another number of steps."""
        if count != self.steps:
            raise CalibrationMismatch(
                f"the calibration is of {self.steps} steps, the run has {count}",
                next_step=f"calibrate with {count} steps, or run {self.steps}",
            )

    def require_model(self, model: Any) -> None:
        """Raises CalibrationMismatch where ``model`` is another one than was calibrated."""
        name, config = identity(model)
        if (name, config) != (self.model, self.config):
            other = name if name != self.model else f"{name} with another configuration ({config}, not {self.config})"
            raise CalibrationMismatch(
                f"the calibration is of a {self.model}, and this is a {other}", next_step="calibrate this model"
            )

    def differences(self, other: CalibrationKey) -> tuple[str, ...]:
        """What differs, in words: ``"steps: 25, not 10"``. A sampler that is not known differs from none."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return tuple(
            f"{name}: {mine}, not {theirs}"
            for name, mine, theirs in pairs
            if mine != theirs and not (name == "sampler" and not (mine and theirs))
        )


def identity(model: Any) -> tuple[str, str]:
    """A model's class and a digest of its configuration; without one, of the names and shapes of its weights."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        told: Any = {key: value for key, value in config.items() if not key.startswith("_")}
    else:
        told = [(name, list(weight.shape)) for name, weight in model.named_parameters()]
    text = json.dumps(told, sort_keys=True, default=str)
    return type(model).__name__, hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trace:
    """Figures of one cut on one branch, over N steps.

    ``similarity[i][j]`` is the cosine of the values of steps i and j. ``errors[lag - 1][i]`` is mean|v_i - v_{i+lag}| /
    mean|v_{i+lag}| for lags 1 to 3, N - lag of them: the denominator is the later value (SmoothCache). ``moved[i]`` is
    mean|v_i - v_{i-1}| / mean|v_{i-1}|, the first 0: the denominator is the earlier value (TeaCache). ``ratios[i]`` is
    the mean over tokens of ||v_i|| / ||v_{i-1}||, the first 1 (MagCache); a token has the channels of one place.
    """

    similarity: Matrix
    errors: Matrix
    moved: Row
    ratios: Row

    @classmethod
    def of(cls, data: Any) -> Self:
        """From parsed JSON. Raises OptionError for figures that are none, or do not fit together."""
        _has_fields(cls, data)
        similarity = _rows("similarity", data["similarity"], -1, 1)
        count = len(similarity)
        errors = tuple(numbers("errors", row, 0) if row else () for row in data["errors"])
        moved, ratios = numbers("moved", data["moved"], 0), numbers("ratios", data["ratios"], 0)
        lengths = [*map(len, similarity), len(moved), len(ratios)]
        if lengths != [count] * (count + 2) or [len(row) for row in errors] != row_lengths(count):
            raise OptionError(f"figures of {count} steps have rows of other lengths")
        return cls(similarity, errors, moved, ratios)


def row_lengths(count: int) -> list[int]:
    """How many errors there are for lags 1 to 3 of ``count`` steps."""
    return [max(0, count - lag) for lag in range(1, LAGS + 1)]


def _rows(name: str, rows: Any, least: float, most: float) -> Matrix:
    return tuple(numbers(f"{name}[{at}]", row, least, most) for at, row in enumerate(rows))


def mean(traces: Sequence[Trace]) -> Trace:
    """The mean of traces over equally many steps."""
    return Trace(
        _mean_rows([trace.similarity for trace in traces]),
        _mean_rows([trace.errors for trace in traces]),
        _mean_row([trace.moved for trace in traces]),
        _mean_row([trace.ratios for trace in traces]),
    )


def _mean_rows(matrices: Sequence[Matrix]) -> Matrix:
    return tuple(_mean_row(rows) for rows in zip(*matrices, strict=True))


def _mean_row(rows: Iterable[Row]) -> Row:
    return tuple(math.fsum(column) / len(column) for column in zip(*rows, strict=True))


def neighbours(similarity: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least and the greatest similarity of two steps that follow one another, of two steps or more."""
    found = [row[i + 1] for i, row in enumerate(similarity[:-1])]
    return min(found), max(found)


@dataclass(frozen=True)
class CutRecord:
    """One cut: what it is, what reuse of it saves, and its traces by branch, in the order the sampler calls them.

    ``cut`` is what was asked for, ``modules`` whose results that is; ``mode`` says whether figures are of the values,
    of residuals (out minus in), or of a probe, which is measured and not reused. A step that reuses it saves the share
    ``saved`` of all work (multiplications) and keeps ``nbytes``. ``sketch_entries`` is 0 where similarities are exact;
    where the values of all steps were too large to keep, each was reduced to so many sums.
    """

    cut: Cut
    mode: Mode
    modules: tuple[str, ...]
    nbytes: int
    saved: float
    sketch_entries: int
    branches: tuple[Trace, ...]

    @property
    def trace(self) -> Trace:
        """The mean over branches."""
        return mean(self.branches)

    @property
    def similarity_error(self) -> float:
        """The relative standard error of 1 - similarity: at most sqrt(2 / m) for a sketch of m sums."""
        return math.sqrt(2 / self.sketch_entries) if self.sketch_entries else 0.0

    @property
    def name(self) -> str:
        """The cut in one word."""
        return self.cut if isinstance(self.cut, str) else ", ".join(self.cut)

    @classmethod
    def of(cls, data: Any) -> Self:
        """From parsed JSON. Raises OptionError."""
        _has_fields(cls, data)
        one_of("mode", data["mode"], MODES)
        whole("nbytes", data["nbytes"], 0)
        whole("sketch_entries", data["sketch_entries"], 0)
        numbers("saved", [data["saved"]], 0, 1)
        if not data["branches"]:
            raise OptionError("a cut has no branch")
        cut = data["cut"] if isinstance(data["cut"], str) else tuple(data["cut"])
        lists = {"modules": tuple(data["modules"]), "branches": tuple(map(Trace.of, data["branches"]))}
        return cls(**data | lists | {"cut": cut})


@dataclass(frozen=True)
class Calibration:
    """The records of one calibration and what they belong to. Made by :func:`fmecompile.calibrate`."""

    key: CalibrationKey
    records: tuple[CutRecord, ...]

    @property
    def cuts(self) -> tuple[str, ...]:
        """What was recorded, in words."""
        return tuple(r.name if r.mode == "feature" else f"{r.name} ({r.mode})" for r in self.records)

    def record(self, cut: Cut | None = None, mode: Mode = "feature", default: Cut | None = None) -> CutRecord:
        """The record of ``cut``; by default that of ``default`` where there is one, else the only one but the output's.

        Raises OptionError where there is none, or more than one to choose from.
        """
        of_mode = [r for r in self.records if r.mode == mode]
        wanted = cut if cut is not None else next((r.cut for r in of_mode if r.cut == default), None)
        left = [r for r in of_mode if (r.cut == wanted if wanted is not None else r.cut != OUTPUT)]
        if len(left) == 1:
            return left[0]
        fact = "several cuts were recorded" if left else f"no {mode} of {cut or 'any cut'} was recorded"
        raise OptionError(fact, next_step=f"name one of {', '.join(self.cuts)}, or calibrate with it in cuts=[...]")

    def similarity(self, cut: Cut | None = None, branch: int | None = None) -> Matrix:
        """The matrix of cosines of ``cut`` between all steps; the mean over branches, or that of one."""
        record = self.record(cut)
        if branch is None:
            return record.trace.similarity
        whole("branch", branch, 0, len(record.branches) - 1)
        return record.branches[branch].similarity

    def matches(self, model: Any, steps: int | None = None) -> bool:
        """Whether a run of ``model`` (the denoiser) in so many steps (None: any) may use policies made from this."""
        return identity(model) == (self.key.model, self.key.config) and steps in (None, self.key.steps)

    def __str__(self) -> str:
        key = self.key
        lines = [f"{key.model} ({key.config}), {key.sampler or 'sampler not known'}, {key.steps} steps, {key.dtype}"]
        for name, record in zip(self.cuts, self.records, strict=True):
            least, most = neighbours(record.trace.similarity)
            lines.append(
                f"  {name}: {record.nbytes / 2**20:.1f} MiB, {record.saved:.1%} of the work saved, "
                f"similarity of neighbours {least:.4f} to {most:.4f}, "
                f"{len(record.branches)} branches"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises CalibrationMismatch when ``text`` is no calibration of this format."""
        again = "make it again with fmecompile.calibrate"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CalibrationMismatch(f"not a calibration: {error}", next_step=again) from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise CalibrationMismatch(f"not a calibration of format {FORMAT}", next_step=again)
        try:
            _has_fields(cls, data)
            made = cls(_key(data["key"]), tuple(map(CutRecord.of, data["records"])))
        except (OptionError, TypeError) as error:
            fact = error.fact if isinstance(error, OptionError) else str(error)
            raise CalibrationMismatch(f"the calibration is damaged: {fact}", next_step=again) from error
        if any(len(trace.moved) != made.key.steps for record in made.records for trace in record.branches):
            raise CalibrationMismatch("the calibration is damaged: records of another number of steps", next_step=again)
        return made

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises CalibrationMismatch when the file holds no calibration of this format."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (CalibrationMismatch, UnicodeDecodeError) as error:
            fact = error.fact if isinstance(error, CalibrationMismatch) else "it is no text"
            said = {"place": str(path), "next_step": "make it again with fmecompile.calibrate"}
            raise CalibrationMismatch(fact, **said) from error

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with a heat map of the similarities of every cut."""
        from fmecompile.reuse.heat_map import page_of

        Path(path).write_text(page_of(self), encoding="utf-8")


def _has_fields(kind: Any, data: Any) -> None:
    if not isinstance(data, dict) or {f.name for f in fields(kind)} != set(data):
        raise OptionError(f"a {kind.__name__} lacks fields or has unknown ones")


def _key(data: Any) -> CalibrationKey:
    _has_fields(CalibrationKey, data)
    if not all(isinstance(data[name], str) for name in ("model", "config", "sampler", "dtype")):
        raise OptionError("its key names no model")
    whole("steps", data["steps"], 1)
    for size in data["shape"]:
        whole("shape", size, 0)
    return CalibrationKey(**data | {"shape": tuple(data["shape"])})
