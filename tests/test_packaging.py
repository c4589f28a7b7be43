"""An sdist and a wheel built from it: what they hold, and that the wheel runs where there is no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import torch
import torch.nn.functional as F
import functorch_ens as fe

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
params = fe.batchensemble_params(model, E=2)
forward = fe.make_forward(model)
x, y = torch.randn(5, 4), torch.randint(3, (5,))
logits = forward(params, x)
optimiser = torch.optim.SGD(torch.utils._pytree.tree_leaves(params), lr=0.1)
fe.make_train_step(forward, F.cross_entropy, optimiser, compile=False)(params, x, y)
print(fe.__file__, tuple(logits.shape), not torch.equal(forward(params, x), logits))
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    answer = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist of a copy of this repository, without network."""
    source, out = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("dist")
    names = (".*", "__pycache__", "*.egg-info", "build", "data", "results")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*names))
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    assert sdist.name.removesuffix(".tar.gz") == wheel.name.removesuffix("-py3-none-any.whl")
    return wheel


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "functorch_ens"
    wanted = {path for pattern in ("*.py", "py.typed", "*.cpp", "*.md") for path in package.rglob(pattern)}
    assert {"__init__.py", "py.typed", "rank1_gradients.cpp"} <= {path.name for path in wanted}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {path.relative_to(ROOT).as_posix() for path in wanted}


def test_the_installed_wheel_makes_and_trains_an_ensemble(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    _run(sys.executable, *install, cwd=elsewhere)
    printed = _run(sys.executable, "-c", PROGRAM, cwd=elsewhere, PYTHONPATH=str(target))
    assert printed == f"{target / 'functorch_ens' / '__init__.py'} (2, 5, 3) True\n"
