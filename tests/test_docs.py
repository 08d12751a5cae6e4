"""The documentation: its code runs, its links and options exist, and what is generated is up to date.

Blocks fenced ```python run in order, a page in one namespace; blocks fenced ```py need weights or a GPU and are parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

from fmecompile.operators import RULES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
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
def rules_as_they_were() -> Iterator[None]:
    """A page that adds a rule adds it for itself."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("rules_as_they_were", "one_thread")
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
