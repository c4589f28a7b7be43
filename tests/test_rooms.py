"""The rooms of the package: the map in functorch_ens/README.md, the direction of imports, and a light front door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import functorch_ens
from functorch_ens._torch import PRIVATE

PACKAGE = Path(functorch_ens.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def _rooms() -> dict[str, int]:
    """By file or folder, its place in the list of the README."""
    lines = re.findall(r"^(\d+)\. (.*?):", (PACKAGE / "README.md").read_text(), re.MULTILINE)
    return {name.rstrip("/"): int(number) for number, names in lines for name in re.findall(r"`([^`]+)`", names)}


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def _imports(file: Path) -> Iterator[tuple[Path, bool]]:
    """The files of the package that `file` imports, and whether it does so inside a function."""
    tree = ast.parse(file.read_text())
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("functorch_ens"):
            continue
        folder = PACKAGE.joinpath(*str(node.module).split(".")[1:])
        for name in node.names:
            places = [folder / f"{name.name}.py", folder / name.name / "__init__.py", folder.with_suffix(".py")]
            found = next((place for place in places if place.exists()), folder / "__init__.py")
            yield found, id(node) not in at_once


def test_every_file_has_a_room_on_the_map() -> None:
    rooms = _rooms()
    assert {_room(file) for file in FILES} == rooms.keys()
    assert sorted(set(rooms.values())) == list(range(1, max(rooms.values()) + 1))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_up_the_map(file: Path) -> None:
    rooms = _rooms()
    for other, inside in _imports(file):
        mine, theirs = rooms[_room(file)], rooms[_room(other)]
        assert theirs < mine or _room(other) == _room(file), f"{file.name} imports {other.name}"
        if _room(other) == "_compile" != _room(file):
            assert inside and file.relative_to(PACKAGE).as_posix() in ("compiling.py", "training/step.py")


def test_no_file_imports_itself_at_any_remove() -> None:
    imports = {file: {other for other, _ in _imports(file) if other != file} for file in FILES}
    order: set[Path] = set()
    while len(order) < len(imports):
        ready = {file for file in imports if file not in order and imports[file] <= order}
        assert ready, f"a circle among {sorted(file.name for file in imports if file not in order)}"
        order |= ready


def test_uncertainty_metrics_and_plots_know_nothing_of_models() -> None:
    outer = {"uncertainty", "metrics.py", "plots.py"}
    allowed = outer | {"_torch.py", "checks.py", "trees.py"}
    for file in FILES:
        if _room(file) in outer:
            assert {_room(other) for other, _ in _imports(file)} <= allowed


def test_the_front_door_is_light() -> None:
    """`import functorch_ens` brings in nothing heavy that `import torch` does not."""
    code = """
import sys, torch
before = set(sys.modules)
import functorch_ens
print(*sorted(set(sys.modules) - before))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = answer.stdout.split()
    assert "functorch_ens.training.step" in added
    heavy = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "functorch_ens._compile")
    assert not [name for name in added if name.startswith(heavy)]


def _names(tree: ast.AST) -> Iterator[str]:
    """The attributes that code reads or writes, the names that it imports, and the ends of the modules it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (alias.name for alias in node.names)
            yield from str(node.module).split(".")
        elif isinstance(node, ast.Import):
            yield from (
                part for alias in node.names if alias.name.startswith("torch") for part in alias.name.split(".")
            )


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_private_names_of_torch_are_behind_the_fence() -> None:
    """Outside `_torch.py` and `_compile/` no file uses an underscored name that the package has not defined itself."""
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    own = {name for tree in trees.values() for name in _defined(tree)}
    own |= {"_torch", "_compile", "_replace", "_fields"}  # this package's, and those of named tuples
    # The two vectors that torch's spectral norm keeps, where layers/norm.py does its power iteration.
    own |= {"_u", "_v"}
    for file, tree in trees.items():
        if file.name != "_torch.py" and _room(file) != "_compile":
            strange = {name for name in _names(tree) if re.match(r"_[a-zA-Z]", name)} - own
            assert not strange, f"{file.relative_to(PACKAGE)}: {strange}"


def test_every_private_name_of_eager_code_is_one_that_torch_has() -> None:
    """Else its fallback is in use, and nobody notices that the feature is lost."""
    for module, name in PRIVATE:
        if name != "_checkpoint_without_reentrant_generator":  # of torch 2.11
            assert hasattr(sys.modules[module], name), f"{module}.{name}"


def test_the_list_of_slow_tests_names_tests_that_are_there() -> None:
    tests = Path(__file__).parent
    for line in (tests / "slow.txt").read_text().splitlines():
        if not line.startswith("#"):
            file, _, name = line.partition("::")
            assert f"def {name.partition('[')[0]}(" in (tests.parent / file).read_text(), line
