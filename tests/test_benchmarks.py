"""benchmarks/coverage.py, run as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "coverage.py"


def _run(*options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=cwd)


def test_help_and_bad_options() -> None:
    assert "--family" in _run("--help").stdout
    for options in (["--only", "nothing*"], ["--members", "0"], ["--factory", "nowhere:build"], ["--resume"]):
        answer = _run(*options)
        assert answer.returncode == 2 and options[0] in answer.stderr and "Traceback" not in answer.stderr


def test_the_table_and_the_json(tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    answer = _run("--family", "written", "--only", "mlp", "hooks", "--json", str(out))
    assert answer.returncode == 0, answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["coverage.json"]
    models = json.loads(out.read_text())["models"]
    assert set(models) == {"written/mlp", "written/hooks"}
    for run in models["written/mlp"].values():
        assert run["by"] == "vmap" and run["ratio"] > 0 and run["error, vmap"] < 1e-10 and run["error, loop"] < 1e-10
    assert {run["by"] for run in models["written/hooks"].values()} == {"loop"}
    totals = answer.stdout.splitlines()[-1].split()
    assert totals[:7] == ["written", "2", "8", "4", "4", "0", "0"]
    assert "second (Linear) has backward hooks" in answer.stdout


def test_a_factory_and_a_model_that_is_not_equal_to_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Linear(3, 2), torch.ones(4, 3)\n"
        "class Restless(torch.nn.Linear):\n"
        "    calls = [0]\n"
        "    def forward(self, x):\n"
        "        self.calls[0] += 1\n"
        "        return super().forward(x) * self.calls[0]\n"
        "def restless():\n"
        "    return Restless(3, 2), torch.ones(4, 3)\n"
    )
    good = _run("--factory", "mine:build", cwd=tmp_path)
    assert good.returncode == 0 and "factory/mine:build" in good.stdout, good.stderr
    bad = _run("--factory", "mine:restless", cwd=tmp_path)
    assert bad.returncode == 1 and "differs from the loop by" in bad.stdout
