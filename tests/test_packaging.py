"""The distribution: what is listed, what is built, and what an installed copy can import.

The folder passes/ stands at the top level but is imported only as ``fmecompile.passes``, which takes a symlink and an
explicit package map. Wheel and sdist are built from a copy of the working tree, installed into an empty folder and
imported there by an interpreter that cannot see the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

PROBE = """
import importlib.metadata, importlib.util, json, sys
sys.path[:0] = [sys.argv[1]]
sys.path += json.loads(sys.argv[2])
import fmecompile.passes
import fmecompile.passes.drop_noops
distribution = importlib.metadata.distribution("fmecompile")
print(json.dumps({
    "files": [m.__file__ for m in (fmecompile, fmecompile.passes, fmecompile.passes.drop_noops)],
    "top_level_passes": importlib.util.find_spec("passes") is not None,
    "entry_points": [[e.group, e.name, e.value] for e in distribution.entry_points],
    "version": distribution.version,
}))
"""


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this interpreter; a failure shows what it printed."""
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args[:4]} failed:\n{done.stdout}\n{done.stderr}"
    return done


def packages_on_disk(root: Path) -> set[str]:
    """Every folder with a Python file in it, by import name: a forgotten ``__init__.py`` does not hide one."""
    return {".".join(path.parent.parts) for path in files_on_disk(root) if path.suffix == ".py"}


def files_on_disk(root: Path) -> set[Path]:
    """Every file of the package, by its path when installed (``os.walk`` does not enter the symlink)."""
    found = set()
    for top, installed in (("fmecompile", Path("fmecompile")), ("passes", Path("fmecompile", "passes"))):
        for folder, _, names in os.walk(root / top):
            inside = installed / Path(folder).relative_to(root / top)
            found |= {inside / name for name in names if "__pycache__" not in inside.parts}
    return found


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("tree") / "fmecompile-copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info"))
    for outputs in ("build", "dist"):
        shutil.rmtree(copy / outputs, ignore_errors=True)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, each built straight from the tree."""
    out = tmp_path_factory.mktemp("dist")
    return {"wheel": build("wheel", tree, out), "sdist": build("sdist", tree, out)}


def build(kind: str, tree: Path, out: Path) -> Path:
    """The wheel or sdist of ``tree``, made with the setuptools of this environment."""
    python("-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(tree), cwd=out)
    (archive,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


def shipped(wheel: Path) -> set[Path]:
    """The files of a wheel, less its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name) for name in archive.namelist() if ".dist-info/" not in name}


def install(archive: Path, target: Path) -> Path:
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile")
    python("-m", "pip", "install", *options, "--target", str(target), str(archive), cwd=target.parent)
    return target


def test_listed_packages_are_the_packages_on_disk(project: dict) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk(ROOT)), "next: change `packages` in pyproject.toml"


def test_a_forgotten_package_is_noticed(tmp_path: Path) -> None:
    for name in ("fmecompile/graph/edit.py", "fmecompile/graph/__pycache__/edit.py", "passes/drop_noops.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "fmecompile" / "passes").symlink_to("../passes")
    assert packages_on_disk(tmp_path) == {"fmecompile.graph", "fmecompile.passes"}


def test_the_symlink_is_relative() -> None:
    assert (ROOT / "fmecompile" / "passes").readlink() == Path("../passes")


def test_the_wheel_holds_every_file_of_the_package(tree: Path, built: dict[str, Path]) -> None:
    assert shipped(built["wheel"]) == files_on_disk(tree), "next: change `package-data` in pyproject.toml"


def test_the_wheel_is_the_same_without_the_symlink(tree: Path, tmp_path: Path) -> None:
    """Zip downloads and checkouts without symlinks build too: the package map finds passes/, not the link."""
    plain = tmp_path / "plain"
    shutil.copytree(tree, plain, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (plain / "fmecompile" / "passes").unlink()
    assert shipped(build("wheel", plain, tmp_path)) == files_on_disk(tree)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_copy_imports_its_passes(kind: str, project: dict, built: dict[str, Path], tmp_path: Path) -> None:
    target = install(built[kind], tmp_path / "site")
    # -I -S: neither the working directory nor the .pth file of an editable install can lead back to the repository.
    probe = python("-I", "-S", "-c", PROBE, str(target), json.dumps(SITES), cwd=tmp_path)
    seen = json.loads(probe.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(target) for file in seen["files"]), seen["files"]
    assert not seen["top_level_passes"], "passes/ leaked into site-packages as a package of its own"
    assert seen["version"] == project["project"]["version"]
    assert ["console_scripts", "fmecompile", "fmecompile.cli:main"] in seen["entry_points"]
    backend = ["torch_dynamo_backends", "fmecompile", "fmecompile.backends.dynamo:fmecompile_backend"]
    assert backend in seen["entry_points"]


@pytest.mark.parametrize("statement", ["import passes", "import passes.drop_noops"])
def test_passes_refuses_the_wrong_name(statement: str, tree: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(tree)!r}); {statement}"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: the folder passes/ was imported as 'passes'" in done.stderr
    assert "next: write `from fmecompile.passes." in done.stderr
