"""Random modules as Python text: what eager runs is what is compiled, and a failing one can be read and run again.

A module is written line by line. A line stays when it runs, gives finite numbers of moderate size, and does not blow up
a small change of the inputs: so whatever the compiled module computes otherwise is its own mistake, not rounding.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

MOST_NUMEL, LARGEST = 3000, 1e4
NUDGE, SENSITIVE = 1e-13, 1e-11
"""Inputs are changed by so much, relatively, and results may change by so much."""
SIZES = (1, 2, 2, 3, 4, 4, 5, 6, 8)

_numbers = count()


@dataclass
class Layout:
    """How an input lies in memory: its axes in this order, taken out of ``within`` rows more, expanded along some."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    gap: int = 0
    expanded: tuple[int, ...] = ()

    def tensor(self, seed: int) -> torch.Tensor:
        shape = [1 if d in self.expanded else size for d, size in enumerate(self.shape)]
        dense = [shape[d] + (self.gap if k == 0 else 0) for k, d in enumerate(self.order)]
        made = torch.randn(dense, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        back = [self.order.index(d) for d in range(len(shape))]
        made = made.permute(back)
        for d, size in enumerate(shape):
            made = made.narrow(d, 0, size)
        return made.expand(self.shape)


@dataclass
class Written:
    """A random module: its source, weights by name and shape, inputs, and what is returned."""

    seed: int
    lines: list[str] = field(default_factory=list)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: list[Layout] = field(default_factory=list)
    returned: str = ""
    tolerance: float = 1e-10

    @property
    def source(self) -> str:
        names = ", ".join(f"x{k}" for k in range(len(self.inputs)))
        body = "\n".join(f"    {line}" for line in [*self.lines, f"return {self.returned or 'locals()'}"])
        return f"def forward(self, {names}):\n{body}\n"

    def module(self) -> nn.Module:
        return Random_(self).eval()

    def arguments(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        return tuple(layout.tensor(1000 * seed + 31 * k + 7) for k, layout in enumerate(self.inputs))

    def __str__(self) -> str:
        inputs = "\n".join(f"# x{k}: {layout}" for k, layout in enumerate(self.inputs))
        weights = "\n".join(f"# self.{name}: {shape}" for name, shape in self.weights.items())
        return f"# seed {self.seed}\n{inputs}\n{weights}\n{self.source}"


class Random_(nn.Module):  # noqa: N801
    """A written module."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(written.seed)
        for name, shape in written.weights.items():
            fan = math.sqrt(max(math.prod(shape[1:]), 1))
            value = torch.randn(shape, generator=generator, dtype=torch.float64) / fan
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.forward = function_of(written.source).__get__(self)  # type: ignore[method-assign]


def function_of(source: str) -> Callable[..., Any]:
    """The function, with lines that tracebacks can show."""
    name = f"<random module {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
    exec(compile(source, name, "exec"), scope)
    return scope["forward"]


def written(rng: Random, seed: int = 0, least: int = 3, most: int = 12) -> Written:
    """A module of ``least`` to ``most`` lines, as far as they can be found."""
    return _Writer(rng, seed).write(rng.randint(least, most))


class _Writer:
    def __init__(self, rng: Random, seed: int) -> None:
        self.rng, self.made = rng, Written(seed)
        self.values: dict[str, torch.Tensor] = {}
        self.fresh = count()

    # ------------------------------------------------------------------------------------------------ the whole module

    def write(self, lines: int) -> Written:
        rng = self.rng
        rank = rng.choice((2, 3, 3, 4, 4, 4, 5))
        shape = self.shape(rank)
        self.made.inputs.append(self.layout(shape))
        for _ in range(rng.choice((0, 0, 1, 2))):
            self.made.inputs.append(self.layout(self.like(shape)))
        self.made.lines.append("y = x0 * 1.5")
        self.run()
        latest = "y"
        for _ in range(4 * lines):
            if len(self.made.lines) > lines:
                break
            x = latest if rng.random() < 0.75 else rng.choice(list(self.values))
            template = rng.choice(TEMPLATES)
            latest = self.accept(template, x) or latest
        self.made.returned = self.outputs(latest)
        return self.made

    def accept(self, template: Template, x: str) -> str | None:
        """Add what the template says of ``x``; the name of the new value, None where it does not fit."""
        weights, tolerance = dict(self.made.weights), self.made.tolerance
        name = f"v{next(self.fresh)}"
        try:
            text = template(self, x)
        except (IndexError, ValueError):  # of a value of another rank than the template is for
            text = None
        if text is None:
            self.made.weights = weights
            return None
        lines = [line.replace("NEW", name) for line in ([text] if isinstance(text, str) else text)]
        if len(lines) == 1 and "NEW" not in (text if isinstance(text, str) else text[0]):
            lines = [f"{name} = {lines[0]}"]
        before = list(self.made.lines)
        self.made.lines += lines
        if self.run():
            return name if name in self.values else None
        self.made.lines, self.made.weights, self.made.tolerance = before, weights, tolerance
        self.run()
        return None

    def run(self) -> bool:
        """Run what is written on inputs and on slightly other ones; whether both agree."""
        arguments = self.made.arguments()
        try:
            with torch.no_grad():
                module = self.made.module()
                values = _tensors(module(*(x.clone() for x in arguments)))
                with _Rounding():
                    nudged = _tensors(module(*(x * (1 + NUDGE * torch.randn_like(x)) for x in arguments)))
        except Exception:
            return False
        if not all(map(_is_fine, values.values())) or set(values) != set(nudged):
            return False
        if not all(_is_near(values[name], nudged[name]) for name in values):
            return False
        self.values = values
        return True

    def outputs(self, latest: str) -> str:
        """One tensor, or several, as tuple, list or dictionary; views, inputs, numbers and None among them."""
        rng = self.rng
        names = [latest, *(rng.choice(list(self.values)) for _ in range(rng.choice((0, 0, 1, 2))))]
        names = [self.view_of(name) if rng.random() < 0.15 else name for name in names]
        kind = rng.choice(("one", "one", "tuple", "list", "dict", "nested"))
        if kind == "one" and len(names) == 1:
            return names[0]
        if kind == "list":
            return f"[{', '.join(names)}]"
        if kind == "dict":
            return "{" + ", ".join(f"'k{k}': {name}" for k, name in enumerate(names)) + "}"
        if kind == "nested":
            return f"({names[0]}, None, [{', '.join(names[1:])}], {{'n': {names[-1]}}})"
        return f"({', '.join(names)},)"

    def view_of(self, name: str) -> str:
        value = self.values[name]
        ways = [f"{name}[...]", f"{name}.unsqueeze(0)", f"{name}.detach()", f"{name}.expand(2, *{name}.shape)"]
        if value.ndim:
            ways += [f"{name}[:1]", f"{name}.transpose(0, -1)", f"{name}.flatten()", f"{name} * 1", f"{name}.unbind(0)"]
        return self.rng.choice(ways)

    # ------------------------------------------------------------------------------------------------ for the templates

    def shape(self, rank: int) -> tuple[int, ...]:
        while True:
            found = tuple(self.rng.choice(SIZES) for _ in range(rank))
            if 8 <= math.prod(found) <= MOST_NUMEL:
                return found

    def like(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``shape``, or what broadcasts to it."""
        cut = self.rng.choice((0, 0, 0, self.rng.randint(0, len(shape))))
        return tuple(1 if self.rng.random() < 0.3 else size for size in shape[cut:])

    def layout(self, shape: tuple[int, ...]) -> Layout:
        rng, order = self.rng, list(range(len(shape)))
        if rng.random() < 0.3:
            rng.shuffle(order)
        if 1 in shape:  # test_found.py: test_single_rows_in_another_order...
            order.sort()
        expanded = tuple(d for d in order if rng.random() < 0.05)
        return Layout(shape, tuple(order), rng.choice((0, 0, 0, 2)), expanded)

    def of(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def dim(self, name: str) -> int:
        """A dimension, counted from either end."""
        rank = len(self.of(name))
        return self.rng.randint(-rank, rank - 1)

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.made.weights)}"
        self.made.weights[name] = tuple(shape)
        return f"self.{name}"

    def other(self, name: str) -> str:
        """A value, a weight, or an input that can be added to ``name``."""
        shape = self.of(name)
        alike = [n for n, v in self.values.items() if _broadcasts(tuple(v.shape), shape)]
        if self.rng.random() < 0.5:
            return self.rng.choice(alike)
        return self.weight(*self.like(shape))

    def same(self, name: str) -> str:
        return self.rng.choice([n for n, v in self.values.items() if tuple(v.shape) == self.of(name)])


class _Rounding(TorchDispatchMode):
    """Other rounding: each call is off by a little, so that nothing hangs on two numbers being equal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = all(value.alias_info is None for value in (*func._schema.returns, *func._schema.arguments))
        if makes and isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            result.mul_(1 + NUDGE * torch.randn_like(result)).add_(0.1 * NUDGE * torch.randn_like(result))
        return result


Template = Callable[[_Writer, str], "str | list[str] | None"]


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, onto)) == onto
    except RuntimeError:
        return False


def _tensors(scope: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in scope.items() if isinstance(value, torch.Tensor)}


def _is_fine(value: torch.Tensor) -> bool:
    if value.numel() > 4 * MOST_NUMEL or value.ndim > 6:
        return False
    return not value.is_floating_point() or bool(value.isfinite().all() and (value.abs() < LARGEST).all())


def _is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = one.abs().max().item() if one.numel() else 0.0
    allowed = SENSITIVE if one.dtype == torch.float64 else 1e-6
    return bool(((one - other).abs() <= allowed * max(scale, 1e-3)).all())


from tests.soak.templates import TEMPLATES  # noqa: E402
