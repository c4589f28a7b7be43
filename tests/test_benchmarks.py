"""The scripts in benchmarks/, run as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import Spread, interleaved, peak_memory, ratio
from oracle import compiler

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _run(*options: str, script: str = "coverage.py", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / script, *options], capture_output=True, text=True, cwd=cwd)


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


@pytest.mark.skipif(compiler() != "inductor", reason="it times the compiler")
def test_vmap_vs_be(tmp_path: Path) -> None:
    answer = _run(
        *("--case", "small-mlp", "--members", "2", "--batch-size", "4", "--rounds", "2"),
        script="vmap_vs_be.py",
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vmap_vs_be.json", "vmap_vs_be.png"]
    found = json.loads((tmp_path / "vmap_vs_be.json").read_text())["cases"]["small-mlp"]
    assert {"loop over modules", "classic, compiled", "BatchEnsemble, compiled"} <= found.keys()
    one = 20 * 64 + 64 * 64 + 64 * 10 + 64 + 64 + 10
    vectors = 2 * (20 + 64 + 64 + 64 + 64 + 10)
    sizes = {"one network, compiled": one, "loop over modules": 2 * one, "classic, compiled": 2 * one}
    for name, count in {**sizes, "BatchEnsemble, compiled": one + vectors}.items():
        assert found[name]["parameters_mb"] * 1e6 == 4 * count
        assert found[name]["optimizer_mb"] * 1e6 >= 8 * count
        assert all(len(times) == 2 and min(times) > 0 for times in found[name]["seconds"].values())
    ruler, *lines = answer.stdout.split("\n\n")[2].splitlines()[1:]
    assert len({len(line) for line in (ruler, *lines)}) == 1, "the table lines up"


def test_notebook_job(tmp_path: Path) -> None:
    answer = _run("--images", "70", "--members", "2", "--workers", "0", script="notebook_job.py", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    results = json.loads((tmp_path / "notebook_job.json").read_text())["results"]
    assert len(results) == 4 and all(0 <= each["accuracy"] <= 1 and each["train"] > 0 for each in results.values())


@pytest.mark.parametrize("script", ["vmap_vs_be.py", "notebook_job.py"])
def test_help_and_bad_options_of_the_timed_scripts(script: str) -> None:
    assert "--members" in _run("--help", script=script).stdout
    for options in (["--members", "0"], ["--batch-size", "many"], ["--json", "nowhere/at/all.json"]):
        answer = _run(*options, script=script)
        assert answer.returncode == 2 and options[0] in answer.stderr and "Traceback" not in answer.stderr


def test_times_are_interleaved_and_ratios_taken_round_by_round() -> None:
    called = []
    calls = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    times = interleaved(calls, 3, torch.device("cpu"), seconds=0.0)
    assert "".join(called[-12:]) == "aabb" * 3
    assert [len(each) for each in times.values()] == [3, 3]
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == Spread(3.0, 2.5, 3.5)
    assert ratio([3.0], [2.0]) == Spread(1.5, 1.5, 1.5)


def test_peak_memory_is_that_of_what_is_held_at_once() -> None:
    def hold() -> None:
        first = torch.ones(1000)
        del first
        second, third = torch.ones(500), torch.ones(700)
        del second, third

    assert 4 * 1200 <= peak_memory(hold, torch.device("cpu")) < 4 * 1400
