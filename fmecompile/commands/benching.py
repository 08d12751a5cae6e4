"""``fmecompile bench``: the benchmarks of a checkout, each as a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import fmecompile
from fmecompile.commands.console import JsonOption, refusals, require_writable, tell_written, write_json
from fmecompile.errors import OptionError, near


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; without it they are listed.")] = None,
    json: JsonOption = None,
) -> None:
    """Run a benchmark of this project, such as `fmecompile bench peers`; it writes benchmarks/results/NAME.json.

    Takes a checkout of the project: a wheel has no benchmarks. More options go to the benchmark.
    """
    with refusals():
        require_writable(json)
        checkout = _checkout()
        found = _benchmarks(checkout)
        if name is None:
            for known, about in found.items():
                typer.echo(f"{known:<14} {about}")
            return
        if name not in found:
            raise OptionError(
                f"there is no benchmark {name!r}", next_step=near(name, found, f"there are {', '.join(found)}")
            )
    code = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *context.args], cwd=checkout, check=False
    ).returncode
    record = checkout / "benchmarks" / "results" / f"{name.split('.')[0]}.json"
    if json is not None and code == 0 and record.is_file():
        write_json(record.read_text(encoding="utf-8").rstrip(), json)
        tell_written(json)
    raise typer.Exit(code)


def _checkout() -> Path:
    """The folder that holds benchmarks/: of an editable install, or where the command was called."""
    for folder in (Path(fmecompile.__file__).resolve().parents[1], Path.cwd()):
        if (folder / "benchmarks" / "report.py").is_file():
            return folder
    raise OptionError(
        "there are no benchmarks here", next_step="run it in a clone of the project, as `make test` sets up"
    )


def _benchmarks(checkout: Path) -> dict[str, str]:
    """Names of what can be run, and what each says of itself in its first sentence."""
    folder = checkout / "benchmarks"
    runnable = [path for path in sorted(folder.rglob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__main__"): _about(path)
        for path in runnable
    }


def _about(path: Path) -> str:
    """Of a folder that is run, what its ``__init__`` says."""
    source = path.with_name("__init__.py") if path.name == "__main__.py" else path
    sentence = " ".join((ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "").split()).split(". ")[0]
    return sentence.rstrip(".").split("``: ")[-1]
