"""Without any one private name of torch: the import, the answer and plain torch.compile stay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import compiler

import functorch_ens
from functorch_ens._torch import PRIVATE

ROW = re.compile(r"^\| `(torch[\w.]*)` \| (?:`([\w.]+)`|(\(module\))) \|", re.MULTILINE)
HERE = Path(__file__).parent


def private_names() -> list[tuple[str, str]]:
    """All pairs (module, name) behind the fence: those of the compiler's README, and those of eager code."""
    text = (Path(functorch_ens.__file__).parent / "_compile" / "README.md").read_text()
    return [*((module, name or whole) for module, name, whole in ROW.findall(text)), *PRIVATE]


def test_the_table_names_all_that_the_fence_imports() -> None:
    """Every `from torch._inductor... import name` in the folder has a row."""
    named = set(private_names())
    folder = Path(functorch_ens.__file__).parent / "_compile"
    imports = re.compile(r"^ *from (torch\._[\w.]+|torch\.fx\.experimental[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)
    for file in folder.glob("*.py"):
        for module, names in imports.findall(file.read_text()):
            for name in names.strip("()").replace("\n", " ").split(","):
                leaf = name.split("#")[0].split(" as ")[0].strip()
                assert not leaf or (module, leaf) in named, f"{file.name}: {module}.{leaf} is not in README.md"


@pytest.mark.compile
@pytest.mark.skipif(compiler() != "inductor" or not hasattr(os, "fork"), reason="it is about inductor, and forks")
def test_without_any_one_name_training_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache"))),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",  # so that every process compiles
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TORCHINDUCTOR_WORKER_START": "fork",
        "TORCH_WARM_POOL": "0",
        "OMP_NUM_THREADS": "1",
    }
    pairs = [("", ""), *private_names()]
    command = [sys.executable, str(HERE / "deletion.py")]
    run = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    answers = {tuple(each["name"]): each for each in map(json.loads, run.stdout.splitlines())}
    assert answers.keys() == set(pairs), run.stderr
    assert answers["", ""]["by"] == "functorch_ens", answers["", ""]
    wrong = []
    for name, found in answers.items():
        if "error" in found:
            if found["torch"]:  # else torch's own optimisers, say, read the name
                wrong.append((name, found))
            continue
        pairs_of_losses = zip(found["eager"], found["compiled"], strict=True)
        same = all(pytest.approx(a, rel=1e-3, abs=1e-5) == b for a, b in pairs_of_losses)
        if not same or (found["by"] == "eager" and found["plain"]):
            wrong.append((name, found))
        elif found["by"] != "functorch_ens":
            told = ("works only without", "goes on without", "is compiled in parts")
            assert any(each in line for each in told for line in found["log"])
    assert not wrong
