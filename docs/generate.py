"""Writes what the documentation takes from the code: ``reference.md`` and the pictures.

``python -m docs.generate`` writes what is quick, which tests compare with the code; ``python -m docs.generate --plans``
also plans SVD's UNet at its real size, on fake tensors, and draws that plan (a minute, 3 GB).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch

import fmecompile
import fmecompile.passes
from docs import drawing
from fmecompile.graph.plan import Plan
from fmecompile.operators import RULES
from fmecompile.pipeline import KERNEL_PASSES, PASSES, pass_name
from fmecompile.reuse.faster_cache import FasterCache
from fmecompile.reuse.policy import StaticPolicy
from fmecompile.reuse.pyramid_attention import PyramidAttention
from fmecompile.reuse.steps import Steps, to_bits

FOLDER = Path(__file__).parent
STEPS = 25
_HEAD = """# Reference: operator rules and passes

Written by `python -m docs.generate` from `fmecompile/operators/` and `passes/`; a test fails where it is out of date.
"""
_OPERATORS = """
## Operators

{count} operators have a rule. An axis that a rule **keeps** may be sliced; one that it keeps with a **halo** needs some
rows beyond the slice; every other one is needed whole. An operator without a rule is a barrier: nothing is sliced
across it, and `explain` says so. `samples` are the calls that each operator is tested with, by NaN poison and by
chunk-and-compare.
"""
_PASSES = """
## Passes

In the order in which they run: {order}; then {kernels}, which act where kernels run (`FMECOMPILE_KERNELS`); then the
partition, which decides; then `reader-layout`, `write-through`, `chunk-loops` and `fuse-norm`. The partition asks for
`recompute` and `spill` where they help, step reuse for `prologue` and `step-reuse`.
"""


def quick() -> dict[str, str]:
    """Every file that takes no plan, by its path under docs/."""
    return {
        "reference.md": reference(),
        "pictures/policies.svg": drawing.strips("What each of 25 steps does", strips()),
    }


def planned(plan: Plan) -> dict[str, str]:
    """The pictures of one plan."""
    return {
        "pictures/svd-timeline.svg": drawing.timelines(
            "SVD's UNet, 14 frames of 576x1024, fp16: activations during one call", plan
        ),
        "pictures/svd-groups.svg": drawing.groups("SVD's UNet: each group run whole, and in chunks", plan),
    }


# ------------------------------------------------------------------------------------------------------------ reference


def reference() -> str:
    """The page of operators and passes."""
    order, kernels = (_named(listed) for listed in (PASSES, KERNEL_PASSES["auto"]))
    parts = [
        _HEAD,
        _OPERATORS.format(count=len(RULES)),
        *families(),
        _PASSES.format(order=order, kernels=kernels),
        *passes(),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _named(listed: Sequence[object]) -> str:
    return ", ".join(f"`{pass_name(item)}`" for item in listed)


def families() -> Iterable[str]:
    """A table a file of rules, a line a rule."""
    by_module: dict[str, dict[Any, list[Any]]] = {}
    for target, entry in RULES.items():
        by_module.setdefault(entry.rule.__module__, {}).setdefault(entry.rule, []).append(target)
    for name in sorted(by_module):
        title, about = _described(name)
        lines = [f"### {title}", "", about, "", "| operators | rule | samples |", "|---|---|--:|"]
        for rule, targets in by_module[name].items():
            samples = sum(len(RULES[target].samples) for target in targets)
            operators = ", ".join(f"`{operator_name(target)}`" for target in targets)
            lines.append(f"| {operators} | {_cell(_first_line(rule))} | {samples} |")
        yield "\n".join(lines)


def operator_name(target: Any) -> str:
    """``aten.linear.default``, or the name of a function of this project."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def passes() -> Iterable[str]:
    """A section a pass: what its file says of it."""
    for name in sorted(module.name for module in pkgutil.iter_modules(fmecompile.passes.__path__)):
        module = importlib.import_module(f"fmecompile.passes.{name}")
        title, *paragraphs = inspect.cleandoc(module.__doc__ or "").split("\n\n")
        first, _, shown = title.partition("\n")
        name, _, about = first.partition(": ")
        parts = [f"### {name}", about[:1].upper() + about[1:], shown, *paragraphs]
        yield "\n\n".join(map(_paragraph, filter(None, parts)))


def _paragraph(text: str) -> str:
    """Before and after of a rewrite keep their columns."""
    plain = dedent(text)
    return f"```text\n{plain}\n```" if plain.startswith("before ") else text.replace("``", "`").replace("*", "\\*")


def _described(module_name: str) -> tuple[str, str]:
    module = importlib.import_module(module_name)
    return module_name.rpartition(".")[2].capitalize(), (module.__doc__ or "").strip()


def _first_line(function: Any) -> str:
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    """Text in a table: what Markdown would take for markup is text too."""
    return text.replace("``", "`").replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


# ------------------------------------------------------------------------------------------------------------- policies


def strips() -> list[tuple[str, str]]:
    """What policies decide without a calibration: a name, and for each step ``1`` where all is computed."""
    whole: dict[str, StaticPolicy] = {
        "StepRehash(full_steps=13)": fmecompile.StepRehash(full_steps=13),
        "DeepCache(interval=3)": fmecompile.DeepCache(interval=3),
        "TaylorSeer(interval=5)": fmecompile.TaylorSeer(interval=5),
    }
    parts = {"PyramidAttention": PyramidAttention(scale="progress"), "FasterCache": FasterCache()}
    found = [(name, to_bits(policy.plan(Steps(STEPS)))) for name, policy in whole.items()]
    return [*found, *(row for name, policy in parts.items() for row in _parts(name, policy))]


def _parts(name: str, policy: StaticPolicy) -> list[tuple[str, str]]:
    decisions = policy.plan(Steps(STEPS))
    components = sorted(set().union(*decisions))
    return [(f"{name}: {component}", to_bits(decisions, component)) for component in components]


# ------------------------------------------------------------------------------------------------------------- commands


def svd_plan() -> Plan:
    """The default plan of SVD's UNet at its real size."""
    from benchmarks.cases import CASES, fake

    with fake(torch.float16):
        return fmecompile.plan(CASES[0].build(), *CASES[0].inputs(torch.float16))


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        path = FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


def main(arguments: Sequence[str]) -> None:
    write(quick())
    if "--plans" in arguments:
        write(planned(svd_plan()))


if __name__ == "__main__":
    main(sys.argv[1:])
