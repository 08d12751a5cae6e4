"""Pages in a headless browser: what is in them once scripts have run, what those complain about, how long it took."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_HOOK = """<script>
const seen = {errors: [], told: null};
const tell = () => document.documentElement.setAttribute("data-seen", JSON.stringify(seen));
const fail = (text) => { seen.errors.push(String(text)); tell(); };
addEventListener("error", (event) => fail(event.message));
addEventListener("unhandledrejection", (event) => fail(event.reason));
console.error = (...said) => fail(said.join(" "));
addEventListener("load", () => { seen.ready_ms = performance.now(); tell(); %s; tell(); });
</script>"""


@dataclass(frozen=True)
class Visit:
    """``errors`` of scripts, milliseconds from the begin of loading until scripts had run, and what was ``told``."""

    dom: str
    errors: list[str]
    ready_ms: float
    told: Any


def browser() -> str:
    """A Chromium's path; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the path")
    return found


def visit(page: Path, script: str = "", width: int = 1200) -> Visit:
    """Open a page. ``script`` runs when all is loaded, and may set ``seen.told``."""
    program = browser()
    hooked = page.with_name(f"hooked-{page.name}")
    text = page.read_text(encoding="utf-8")
    hooked.write_text(text.replace("<head>", f"<head>{_HOOK % script}", 1), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},1000"]
    options += [f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [program, *options, hooked.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=240, check=True
    )
    held = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert held is not None, f"the page did not load:\n{done.stderr[-2000:]}"
    seen = json.loads(unescape(held[1]))
    return Visit(done.stdout, seen["errors"], seen["ready_ms"], seen["told"])
