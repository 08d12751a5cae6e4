"""The documentation: its code runs, its links and options exist, and what is generated is up to date.

Blocks fenced ```python run in order, a page in one namespace; blocks fenced ```py need weights or a GPU and are parsed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fmecompile
from docs.generate import operator_name, planned, quick, reference
from fmecompile import config
from fmecompile.backends.dynamo import OPTIONS
from fmecompile.errors import FmeError
from fmecompile.operators import RULES
from fmecompile.pipeline import KERNEL_PASSES, PASSES, pass_name
from fmecompile.report import bytes_text
from fmecompile.reuse import Policy

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("decisions/*.md")])
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
_BLOCK = re.compile(r"^```(python|py)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, fence: str) -> list[tuple[int, str]]:
    """The line number and the text of every block of code."""
    text = page.read_text(encoding="utf-8")
    found = _BLOCK.finditer(text)
    return [(text.count("\n", 0, match.start()) + 1, match[2]) for match in found if match[1] == fence]


def compiled(page: Path, line: int, code: str) -> CodeType:
    """The code with the line numbers of its page."""
    return compile(ast.increment_lineno(ast.parse(code), line), str(page), "exec")


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(DOCS)) for page in pages]


RUNNING = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def pages_alone() -> Iterator[None]:
    """A page that adds a rule, or compiles with Dynamo, does so for itself."""
    before = dict(RULES)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("pages_alone", "one_thread")
@pytest.mark.parametrize("page", RUNNING, ids=ids(RUNNING))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FMECOMPILE_MIN_TRIP_BYTES", raising=False)  # readers have it unset
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.no_grad():
        for line, code in blocks(page, "python"):
            exec(compiled(page, line, code), namespace)


def test_code_that_cannot_run_here_parses() -> None:
    for page in PAGES:
        for line, code in blocks(page, "py"):
            compiled(page, line, code)


def test_generated_files_are_up_to_date() -> None:
    for name, text in quick().items():
        written = (DOCS / name).read_text(encoding="utf-8")
        assert written == text, f"docs/{name} is out of date; next: python -m docs.generate"


def test_every_pass_and_operator_is_in_the_reference() -> None:
    page = reference()
    assert all(f"`{operator_name(target)}`" in page for target in RULES)
    assert all(f"### {pass_name(item)}\n" in page for item in (*PASSES, *KERNEL_PASSES["auto"]))


def test_what_a_page_lists_is_all_there_is() -> None:
    """An option, a policy, an error or a variable of the environment that is new belongs into its table."""
    public = {name: getattr(fmecompile, name) for name in fmecompile.__all__}
    classes = {name: value for name, value in public.items() if isinstance(value, type)}
    listed: dict[str, Sequence[str]] = {
        "torch-compile.md": OPTIONS,
        "step-reuse.md": [name for name, value in classes.items() if issubclass(value, Policy)],
        "debugging.md": [
            name for name, value in classes.items() if issubclass(value, FmeError) and value is not FmeError
        ]
        + re.findall(r'"(FMECOMPILE_\w+)"', inspect.getsource(config)),
    }
    for page, names in listed.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        missing = [name for name in names if f"| `{name}` |" not in text]
        assert names and not missing, f"docs/{page}"


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_pictures_of_a_plan_hold_its_numbers() -> None:
    """Those of a real plan take a minute to make and are not compared."""
    plan = fmecompile.plan(FeedForward().eval(), torch.randn(512, 16))
    drawn = planned(plan)
    assert plan.groups and drawn.keys() == {"pictures/svd-timeline.svg", "pictures/svd-groups.svg"}
    for name, picture in drawn.items():
        ElementTree.fromstring(picture)
        ElementTree.fromstring((DOCS / name).read_text(encoding="utf-8"))
    timeline, bars = drawn.values()
    for nbytes in (plan.eager_peak_bytes, max(plan.timeline), plan.allowed_bytes):
        assert bytes_text(nbytes) in timeline
    for group in plan.groups:
        assert f"{group.trips} trips, {bytes_text(group.whole_bytes)}" in bars
        assert f"{group.trips} trips, {bytes_text(group.peak_bytes)}" in bars


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tests_and_files_that_pages_name_exist() -> None:
    for page in PAGES:
        if page.parent == DOCS:
            named = re.findall(r"`((?:tests|fmecompile|passes)/[\w/.]+\.py)`", page.read_text(encoding="utf-8"))
            assert [name for name in named if not (DOCS.parent / name).exists() and "double_negation" not in name] == []
