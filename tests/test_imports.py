"""Imports run downward only, and importing the package costs nothing."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "compress"

# docs/ARCHITECTURE.md
FLOORS = {
    "main": 8,
    "console": 8,
    "options": 8,
    "proof_commands": 8,
    "pipeline": 7,
    "proof": 7,
    "workspace": 7,
    "recipe": 6,
    "yaml_source": 6,
    "gates": 5,
    "stages": 5,
    "evaluate": 4,
    "prune": 4,
    "quant": 4,
    "report": 4,
    "hf": 3,
    "signals": 3,
    "tokens": 3,
    "checkpoint": 2,
    "codec": 1,
    "_autoload": 0,  # names the quantizer's module as text
    "errors": 0,
    "paths": 0,
    "progress": 0,
    "registry": 0,
    "": 0,  # compress itself: the version, and the verbs by name
}


def room(module: str) -> str:
    """``compress.codec.native`` is of the room ``codec``."""
    return [*module.split("."), ""][1]


def imported(path: Path) -> set[str]:
    """Every module of the package that a file imports, at any depth, except for types only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "compress"}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__"))
    assert own in FLOORS, f"{own} has no floor"
    for name in imported(path):
        target = room(name)
        if target not in FLOORS:  # an attribute of compress itself, such as its version
            assert not (PACKAGE / target).exists(), f"{target} has no floor"
            target = ""
        assert FLOORS[target] <= FLOORS[own], f"{own} imports {name}, which is above it"


OUTSIDE = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *OUTSIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_reaches_into_anothers_insides(path: Path) -> None:
    """Other rooms are imported as ``compress.ROOM``, from there only what it exports."""
    if path in (PACKAGE / "__init__.py", PACKAGE / "main.py"):
        return  # they import one verb at a time, when it is asked for
    own = path.relative_to(ROOT).with_suffix("").parts[1]
    for name in imported(path):
        _, other, *inside = [*name.split("."), ""]
        if other == own and path not in OUTSIDE:
            continue
        inside = [part for part in inside if part]
        assert len(inside) <= 1, f"{name} is inside of {other}"
        if not inside:
            continue
        if (PACKAGE / other).is_dir():
            assert inside[0] in exported(other), f"{other} does not export {inside[0]}"
        assert not inside[0].startswith("_"), f"{inside[0]} is private to {other}"


def exported(room: str) -> list[str]:
    """The names in ``__all__`` of a room."""
    for node in ast.parse((PACKAGE / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


@pytest.mark.parametrize("room", ["checkpoint", "codec", "evaluate", "prune", "signals"])
def test_a_room_opens_without_what_is_heavy(room: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import sys, compress.{room}; assert not {heavy}, {heavy}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_holds_no_python() -> None:
    assert not list((ROOT / "kernels").rglob("*.py"))


@pytest.mark.parametrize("statement", ["import compress", "import compress.main"])
def test_importing_is_quick_and_light(statement: str) -> None:
    # CPU time: the wall clock tells of other processes as well.
    script = (
        "import sys, time; start = time.process_time(); "
        f"{statement}; print(time.process_time() - start); "
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script]
    times = [
        float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
        for _ in range(5)
    ]
    assert min(times) < 0.1


def test_the_verbs_are_found_on_first_use() -> None:
    script = "import compress as c; print(*[getattr(c, verb).__name__ for verb in c.__all__[1:]])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [
        "decompress",
        "inspect",
        "measure",
        "plan",
        "prove",
        "run",
        "skip_sublayers",
        "verify",
    ]


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_its_data_only(tmp_path: Path) -> None:
    import zipfile

    tree = tmp_path / "tree"  # a build leaves traces beside its sources
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, tree], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "compress",
        "_entropress_autoload.py",
    }
    assert "compress/recipes/lossless.yaml" in names
    assert "compress/kernels/codec.cpp" in names
    sources = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert sources <= set(names)
