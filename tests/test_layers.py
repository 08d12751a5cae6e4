"""Import directions, who may mutate fx nodes, pass names and size bars: checked on the syntax trees, without importing.

Each check takes a ``Source`` and returns violations. It runs twice: on every file of the package, and on a synthetic
source that breaks its rule, so that a check that sees nothing fails here.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From top to bottom, by the first name under fmecompile. A module imports from its own layer and from lower ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__", "api", "bisect", "calibrate", "cli", "commands", "compat", "demo", "difference"),
    ("offline",),
    ("explain", "stages"),
    ("backends",),
    ("pipeline",),
    ("passes", "partition"),
    ("analysis",),
    ("operators", "capture"),
    ("graph",),
    ("kernels",),
    ("runtime",),
    ("reuse",),
    ("report",),
    ("errors", "config", "budget"),
)

# (importing module, imported module): why this one import may go upwards.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("graph.edit", "analysis.facts"): "annotate() computes the specs of nodes, and only this file may write them",
    ("report.plan_page", "graph.plan"): "the type of what it writes; nothing is imported at run time",
    ("report.trace", "graph.plan"): "the type of what it reads; nothing is imported at run time",
    ("report.trace", "runtime.measure"): "the type of what it reads; nothing is imported at run time",
    ("report.peak", "graph.plan"): "the type of what it reads; nothing is imported at run time",
}

# The run-time half works without the compiler half.
RUNTIME_MAY_IMPORT = ("runtime", "reuse", "errors", "config")

# Module or package: why it may mutate fx nodes.
MUTATORS: dict[str, str] = {
    "graph.edit": "the one file that mutates fx nodes",
    "capture": "builds the initial graph, before anyone reads it",
}
MUTATING_CALLS = {
    "erase_node",
    "replace_all_uses_with",
    "replace_input_with",
    "insert_arg",
    "update_arg",
    "update_kwarg",
    "prepend",
    "inserting_before",
    "inserting_after",
    "eliminate_dead_code",
}
NODE_FIELDS = {"args", "kwargs", "target", "meta"}
DICT_WRITES = {"update", "pop", "popitem", "setdefault", "clear"}

FILE_LINES, FUNCTION_LINES = 400, 80

Rule = Callable[["Source"], list[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its name under fmecompile (``graph.edit``, ``graph.__init__``, ``passes.drop_noops``) and its text."""

    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def layer_name(self) -> str:
        return self.module.split(".")[0]

    def at(self, line: int, fact: str) -> str:
        return f"fmecompile.{self.module}:{line}: {fact}"


def sources() -> list[Source]:
    """Every file once: ``os.walk`` does not enter the symlink fmecompile/passes."""
    found = []
    for top, prefix in (("fmecompile", ()), ("passes", ("passes",))):
        for folder, _, names in os.walk(ROOT / top):
            inside = (*prefix, *Path(folder).relative_to(ROOT / top).parts)
            for name in sorted(names):
                if name.endswith(".py"):
                    module = ".".join((*inside, name.removesuffix(".py")))
                    found.append(Source(module, Path(folder, name).read_text(encoding="utf-8")))
    return found


SOURCES = sources()


def layer_of(name: str) -> int | None:
    return next((depth for depth, names in enumerate(LAYERS) if name in names), None)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


# What a file imports


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, module or name under fmecompile) of every import of the package, wherever in the file it stands."""
    for line, name in _imported(source):
        if is_inside(name, "fmecompile"):
            yield line, _under_package(name)


def _imported(source: Source) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{_base(source, node)}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node) in ("import_module", "__import__"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args if isinstance(arg, ast.Constant))


def _base(source: Source, node: ast.ImportFrom) -> str:
    """The absolute name of what stands between ``from`` and ``import``; every leading dot goes up by one."""
    if not node.level:
        return node.module or ""
    package = ["fmecompile", *source.module.split(".")][: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _under_package(name: str) -> str:
    """``fmecompile.graph.edit`` -> ``graph.edit``; a name that is no layer is a name in ``fmecompile/__init__.py``."""
    rest = name.removeprefix("fmecompile").lstrip(".")
    return rest if layer_of(rest.split(".")[0]) is not None else "__init__"


def _called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


# The rules


def unknown_layer(source: Source) -> list[str]:
    if layer_of(source.layer_name) is not None:
        return []
    return [source.at(1, f"{source.layer_name!r} has no layer; next: add it to LAYERS in tests/test_layers.py")]


def upward_imports(source: Source) -> list[str]:
    own = layer_of(source.layer_name)
    if own is None:
        return []
    return [
        source.at(line, f"imports {name}, from a layer above its own")
        for line, name in imports(source)
        if (layer_of(name.split(".")[0]) or 0) < own and _exception(source, name) is None
    ]


def _exception(source: Source, name: str) -> tuple[str, str] | None:
    return next((pair for pair in EXCEPTIONS if source.module == pair[0] and is_inside(name, pair[1])), None)


def runtime_imports_compiler(source: Source) -> list[str]:
    if source.layer_name != "runtime":
        return []
    return [
        source.at(line, f"the run-time half imports {name}; it may import {' and '.join(RUNTIME_MAY_IMPORT)}")
        for line, name in imports(source)
        if name.split(".")[0] not in RUNTIME_MAY_IMPORT
    ]


def passes_by_wrong_name(source: Source) -> list[str]:
    return [
        source.at(line, f"imports {name}; next: import fmecompile.{name}")
        for line, name in _imported(source)
        if is_inside(name, "passes")
    ]


def misnamed_pass(source: Source) -> list[str]:
    """A file in passes/ holds one pass: a public frozen dataclass with ``apply``, named like the file."""
    package, _, name = source.module.partition(".")
    if package != "passes" or name == "__init__":
        return []
    expected = "".join(part.capitalize() for part in name.split("_"))
    classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef) and _is_public_pass(node)]
    if [node.name for node in classes] != [expected]:
        return [source.at(1, f"holds the passes {[node.name for node in classes]}, not just {expected}")]
    if not _is_frozen_dataclass(classes[0]):
        return [source.at(classes[0].lineno, f"{expected} is not a @dataclass(frozen=True)")]
    return []


def _is_public_pass(node: ast.ClassDef) -> bool:
    methods = [item.name for item in node.body if isinstance(item, Function)]
    return not node.name.startswith("_") and "apply" in methods


def _is_frozen_dataclass(node: ast.ClassDef) -> bool:
    calls = [item for item in node.decorator_list if isinstance(item, ast.Call) and _called_name(item) == "dataclass"]
    options = [option for call in calls for option in call.keywords if option.arg == "frozen"]
    return any(isinstance(option.value, ast.Constant) and option.value.value is True for option in options)


def node_mutations(source: Source) -> list[str]:
    if any(is_inside(source.module, allowed) for allowed in MUTATORS):
        return []
    return [
        source.at(line, f"{what} mutates an fx node; next: do it in graph/edit.py") for line, what in _writes(source)
    ]


def _writes(source: Source) -> Iterator[tuple[int, str]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_mutating_call(node.func):
            yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.Attribute | ast.Subscript) and _is_node_write(node):
            yield node.lineno, ast.unparse(node)


def _is_mutating_call(function: ast.Attribute) -> bool:
    return function.attr in MUTATING_CALLS or (function.attr in DICT_WRITES and _is_node_field(function.value))


def _is_node_write(target: ast.Attribute | ast.Subscript) -> bool:
    """Assigned to or deleted: ``n.args`` or ``n.meta[key]``."""
    written = not isinstance(target.ctx, ast.Load)
    return written and _is_node_field(target.value if isinstance(target, ast.Subscript) else target)


def _is_node_field(expression: ast.expr) -> bool:
    """``n.args``, ``n.kwargs``, ``n.target`` or ``n.meta`` of anything but ``self``, which is never a node here."""
    if not isinstance(expression, ast.Attribute) or expression.attr not in NODE_FIELDS:
        return False
    return not (isinstance(expression.value, ast.Name) and expression.value.id == "self")


def oversized(source: Source) -> list[str]:
    found = []
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        found.append(source.at(1, f"has {lines} lines, more than {FILE_LINES}"))
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(source.at(node.lineno, f"{node.name} has {length} lines, more than {FUNCTION_LINES}"))
    return found


RULES = (
    unknown_layer,
    upward_imports,
    runtime_imports_compiler,
    passes_by_wrong_name,
    misnamed_pass,
    node_mutations,
    oversized,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps(rule: Rule) -> None:
    violations = [violation for source in SOURCES for violation in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


def test_every_file_is_seen_once() -> None:
    modules = [source.module for source in SOURCES]
    assert len(modules) == len(set(modules))
    assert {"__init__", "graph.edit", "passes.__init__", "runtime.__init__"} <= set(modules)


def test_every_exception_is_still_used() -> None:
    used = {_exception(source, name) for source in SOURCES for _, name in imports(source)}
    assert set(EXCEPTIONS) <= used, "next: delete the exceptions that nothing needs"
    writing = [source.module for source in SOURCES if any(_writes(source))]
    idle = [allowed for allowed in MUTATORS if not any(is_inside(module, allowed) for module in writing)]
    assert not idle, "next: delete the mutators that mutate nothing"


# The test of the tests

PASS = "@dataclass(frozen=True)\nclass DropNoops:\n    def apply(self): ...\n"
LONG_FUNCTION = "def long():\n" + "    pass\n" * 80

BROKEN = [
    (unknown_layer, "novelty", ""),
    (unknown_layer, "novelty.part", ""),
    (upward_imports, "graph.plan", "import fmecompile"),
    (upward_imports, "graph.plan", "import fmecompile.pipeline as p"),
    (upward_imports, "graph.plan", "from fmecompile import optimize"),
    (upward_imports, "graph.plan", "from fmecompile import api"),
    (upward_imports, "graph.plan", "from ..analysis.axes import propagate"),
    (upward_imports, "graph.__init__", "from .. import capture"),
    (upward_imports, "graph.atoms", "from fmecompile.analysis.facts import FactTable"),
    (upward_imports, "errors", "from . import config, runtime"),
    (upward_imports, "analysis.axes", "from fmecompile.passes import drop_noops"),
    (upward_imports, "passes.drop_noops", "if TYPE_CHECKING:\n    from fmecompile.pipeline import Compilation"),
    (upward_imports, "pipeline", "def late():\n    import importlib\n    importlib.import_module('fmecompile.api')"),
    (runtime_imports_compiler, "runtime.dispatch", "def late():\n    from fmecompile.graph import plan"),
    (
        runtime_imports_compiler,
        "runtime.dispatch",
        "if TYPE_CHECKING:\n    from fmecompile.pipeline import compile_module",
    ),
    (runtime_imports_compiler, "runtime.dispatch", "from fmecompile.graph.plan import Plan"),
    (passes_by_wrong_name, "pipeline", "import passes"),
    (passes_by_wrong_name, "pipeline", "from passes.drop_noops import DropNoops"),
    (misnamed_pass, "passes.drop_noop", PASS),
    (misnamed_pass, "passes.drop_noops", PASS.replace("frozen=True", "frozen=False")),
    (misnamed_pass, "passes.drop_noops", PASS.replace("(frozen=True)", "")),
    (misnamed_pass, "passes.drop_noops", PASS.replace("apply", "run")),
    (misnamed_pass, "passes.drop_noops", PASS + PASS.replace("DropNoops", "DropMore")),
    (node_mutations, "passes.drop_noops", "graph.erase_node(node)"),
    (node_mutations, "passes.drop_noops", "node.replace_all_uses_with(other)"),
    (node_mutations, "partition.build", "user.replace_input_with(a, b)"),
    (node_mutations, "partition.build", "anchor.prepend(node)"),
    (node_mutations, "pipeline", "with graph.inserting_before(node): pass"),
    (node_mutations, "pipeline", "node.args = (a, b)"),
    (node_mutations, "pipeline", "user.args, user.kwargs = a, b"),
    (node_mutations, "pipeline", "user.node.target = f"),
    (node_mutations, "graph.program", "node.meta['key'] = 1"),
    (node_mutations, "graph.program", "del node.meta['key']"),
    (node_mutations, "graph.program", "node.meta.update(key=1)"),
    (node_mutations, "runtime.chunk_loop", "node.kwargs |= {}"),
    (oversized, "graph.plan", "x = 1\n" * 401),
    (oversized, "graph.plan", LONG_FUNCTION),
]

KEPT = [
    (unknown_layer, "graph.plan", ""),
    (unknown_layer, "__init__", ""),
    (upward_imports, "graph.edit", "from fmecompile.analysis import facts"),
    (upward_imports, "graph.group", "from fmecompile.runtime.chunk_loop import LoopSpec\nimport torch.export"),
    (upward_imports, "partition.build", "from fmecompile.passes.fuse_norm import fuse_norms"),
    (upward_imports, "__init__", "from fmecompile.api import optimize"),
    (upward_imports, "runtime.dispatch", "from .executable import Executable\nfrom ..errors import FmeError"),
    (runtime_imports_compiler, "runtime.dispatch", "from .executable import Executable\nfrom ..errors import FmeError"),
    (passes_by_wrong_name, "pipeline", "from fmecompile.passes.drop_noops import DropNoops"),
    (misnamed_pass, "passes.drop_noops", PASS + "class _Part:\n    def apply(self): ...\n"),
    (node_mutations, "capture.export", "graph.erase_node(node)"),
    (node_mutations, "pipeline", "self.args = node.args\ncall(target=1)\nnodes.append(node.meta['key'])"),
    (oversized, "graph.plan", "x = 1\n" * 400),
    (oversized, "graph.plan", LONG_FUNCTION.removesuffix("    pass\n")),
]


@pytest.mark.parametrize(("rule", "module", "text"), BROKEN)
def test_a_broken_rule_is_noticed(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


@pytest.mark.parametrize(("rule", "module", "text"), KEPT)
def test_a_kept_rule_is_quiet(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text)) == []


def test_every_rule_has_a_broken_and_a_kept_case() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
    assert {rule for rule, _, _ in KEPT} == set(RULES)
