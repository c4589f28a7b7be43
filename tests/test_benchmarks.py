"""The scripts in benchmarks/, run as a user does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import compare_commits
import graphs
import growth
import model_coverage
import operator_sweep
import pytest
import quality
import quality_variants
import torch
import torch.nn.functional as F
from measure import Spread, interleaved, peak_memory, ratio
from models import make_model
from oracle import compiler
from PIL import Image
from torch import nn
from tqdm import tqdm
from vmap_vs_be import CLASSIC
from zoo import cases

import functorch_ens as fe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


# Runs scripts as `__main__`, each with its own options, in one process, which imports torch once.
_DRIVER = """
import contextlib, io, json, runpy, sys, traceback
folder, *calls = sys.argv[1:]
sys.path[0] = folder
answers = []
for script, *options in map(json.loads, calls):
    sys.argv, code = [script, *options], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(f"{folder}/{script}", run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""

Answer = subprocess.CompletedProcess[str]


def _runs(*calls: list[str], cwd: Path | None = None) -> list[Answer]:
    """The answers to `calls`, each a script and its options, from one process."""
    command = [sys.executable, "-c", _DRIVER, str(BENCHMARKS), *map(json.dumps, calls)]
    whole = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert whole.returncode == 0, whole.stderr
    answers = json.loads(whole.stdout.splitlines()[-1])
    return [Answer(call, *answer) for call, answer in zip(calls, answers, strict=True)]


def _run(*options: str, script: str = "model_coverage.py", cwd: Path | None = None) -> Answer:
    return subprocess.run([sys.executable, BENCHMARKS / script, *options], capture_output=True, text=True, cwd=cwd)


_GROWTH = (["--max-members", "0"], ["--case", "nothing"], ["--json", "nowhere/at/all.json"])
_TIMED = ("vmap_vs_be.py", "notebook_job.py", "quality.py", "lora.py")
_REFUSED = {
    "model_coverage.py": (["--only", "nothing*"], ["--members", "0"], ["--factory", "nowhere:build"], ["--resume"]),
    "operator_sweep.py": (["--members", "0"], ["--json", "nowhere/at/all.json"]),
    "endurance.py": (["--only", "nothing"], ["--scale", "0"]),
    "predict.py": (["--case", "nothing"], ["--rows", "0"], ["--json", "nowhere/at/all.json"]),
    "growth.py": _GROWTH,
    "own_loop.py": (
        *(["--case", "nothing"], ["--threads", "0"], ["--json", "nowhere/at/all.json"]),
        *(["--precision", "tf32"], ["--device", "nothing"]),
    ),
    "graphs.py": (["--network", "nothing"], ["--backend", "nothing"], ["--json", "nowhere/at/all.json"]),
    "compare_commits.py": (
        *(
            ["--case", "nothing"],
            ["--rounds", "0"],
            ["--fail-above", "0.9"],
            ["--json", "nowhere/at/all.json", ".", "."],
        ),
        ["--clock", "sand"],
    ),
    **dict.fromkeys(_TIMED, (["--members", "0"], ["--batch-size", "many"], ["--json", "nowhere/at/all.json"])),
}


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """The answers of all scripts to `--help` and to the options that they refuse."""
    calls = [[script, *options] for script, refused in _REFUSED.items() for options in (["--help"], *refused)]
    return _runs(*calls)


@pytest.mark.parametrize(
    ("script", "documented"),
    [
        ("model_coverage.py", "--family"),
        ("operator_sweep.py", "--samples"),
        ("endurance.py", "--scale"),
        ("predict.py", "--rows"),
        ("growth.py", "--max-members"),
        ("own_loop.py", "--precision"),
        ("graphs.py", "--backend"),
        ("compare_commits.py", "--fail-above"),
        *((script, "--members") for script in _TIMED),
    ],
)
def test_help_and_bad_options(script: str, documented: str, answers: list[Answer]) -> None:
    asked, *refused = (answer for answer in answers if answer.args[0] == script)
    assert asked.returncode == 0 and documented in asked.stdout
    for options, answer in zip(_REFUSED[script], refused, strict=True):
        assert answer.args[1:] == options
        assert answer.returncode == 2 and options[0] in answer.stderr and "Traceback" not in answer.stderr


def test_the_table_and_the_json(tmp_path: Path) -> None:
    out = tmp_path / "model_coverage.json"
    answer = _run("--family", "written", "--only", "mlp", "hooks", "--json", str(out))
    assert answer.returncode == 0, answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model_coverage.json"]
    models = json.loads(out.read_text())["models"]
    assert set(models) == {"written/mlp", "written/hooks"}
    for run in models["written/mlp"].values():
        assert run["by"] == "vmap" and run["ratio"] > 0 and run["error, vmap"] < 1e-10 and run["error, loop"] < 1e-10
    assert {run["by"] for run in models["written/hooks"].values()} == {"loop"}
    totals = answer.stdout.splitlines()[-1].split()
    assert totals[:7] == ["written", "2", "8", "4", "4", "0", "0"]
    assert "second (Linear) has backward hooks" in answer.stdout
    assert (
        models["written/mlp"]["BatchEnsemble eval"]["fast"] == models["written/mlp"]["BatchEnsemble eval"]["rank-1"] > 0
    )


def test_families_of_a_package_that_is_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(cases("transformers")) > 33  # their names need no package
    monkeypatch.setattr(model_coverage, "is_installed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["model_coverage.py", "--family", "transformers"])
    with pytest.raises(SystemExit):
        model_coverage.main()
    assert "pip install transformers" in capsys.readouterr().err


def test_a_loop_of_the_users_own(tmp_path: Path) -> None:
    out = tmp_path / "own_loop.json"
    answer = _run("--case", "small-mlp", "--rounds", "1", "--json", str(out), script="own_loop.py")
    assert answer.returncode == 0, answer.stderr
    names = ["one network, E x B rows", "notebook's module", "torch.compile", "fe.compile", "make_train_step"]
    assert all(name in answer.stdout for name in names)
    assert all(len(times) == 1 for times in json.loads(out.read_text())["seconds"]["small-mlp"].values())


def test_predictions_against_one_network(tmp_path: Path) -> None:
    out = tmp_path / "predict.json"
    answer = _run("--case", "small-mlp", "--rows", "2", "--rounds", "1", "--json", str(out), script="predict.py")
    assert answer.returncode == 0, answer.stderr
    times = json.loads(out.read_text())["seconds"]["small-mlp, 2 rows"]
    assert len(times) == 6 and all(name in answer.stdout for name in times)


def test_lora_against_merged_copies_and_one_network(tmp_path: Path) -> None:
    sizes = {"--members": 2, "--layers": 1, "--width": 16, "--heads": 2, "--tokens": 3, "--rank": 2, "--rounds": 1}
    out = tmp_path / "lora.json"
    answer = _run(*(str(part) for pair in sizes.items() for part in pair), "--json", str(out), script="lora.py")
    assert answer.returncode == 0, answer.stderr
    results = json.loads(out.read_text())["results"]
    assert len(results) == 8 and all(name in answer.stdout for name in results)
    for found in results.values():
        assert all(len(times) == 1 and times[0] > 0 for times in found["seconds"].values()) and found["peak_mb"] > 0
    whole, copies = results["LoRA ensemble, all"], results["E merged copies, vmap"]
    one = results["one network, E·B rows"]["parameters_mb"]
    assert whole["parameters_mb"] == pytest.approx(one + whole["trained_mb"])
    assert copies["parameters_mb"] == copies["trained_mb"] == pytest.approx(2 * one)


def _library(folder: Path, extra: str = "") -> Path:
    """A copy of this library, with more code at the end of forward/forward.py."""
    shutil.copytree(Path(fe.__file__).parent, folder / "functorch_ens", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "functorch_ens" / "forward" / "forward.py").open("a") as file:
        file.write(extra)
    return folder


_SLEEPS = """

_call = Forward.__call__


def _slow(self, *args, **kwargs):
    import time

    time.sleep(0.05)
    return _call(self, *args, **kwargs)


Forward.__call__ = _slow
"""


def test_a_slower_commit_is_found(tmp_path: Path) -> None:
    same, slow = _library(tmp_path / "same"), _library(tmp_path / "slow", _SLEEPS)
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "examples").symlink_to(BENCHMARKS.parent / "examples")
    shutil.copytree(same / "functorch_ens", tmp_path / "functorch_ens")
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    git(["git", "init", "-q"])
    git(["git", "add", "functorch_ens"])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "The library"])
    options = ["--case", "small-mlp", "--kind", "classic", "--phase", "forward", "--starts", "1", "--rounds", "4"]
    command = [sys.executable, str(tmp_path / "benchmarks" / "compare_commits.py"), "HEAD", str(slow), *options]
    out = tmp_path / "out.json"
    answer = subprocess.run([*command, "--fail-above", "1.5", "--json", out], capture_output=True, text=True, cwd=same)
    assert answer.returncode == 1 and "slower by more than 1.5: small-mlp, classic, forward" in answer.stdout, answer
    (row,) = json.loads(out.read_text())["seconds"]
    assert len(row["old"]) == len(row["new"]) == 4 and min(row["new"]) > 0.05
    command[2] = "nothing"
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1 and "expected a commit, or a folder" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_verdict_needs_three_rounds_and_most_of_them() -> None:
    assert compare_commits.verdict([1.2] * 3, [1.0] * 3) == "slower"
    assert compare_commits.verdict([0.8] * 3, [1.0] * 3) == "faster"
    assert compare_commits.verdict([1.2] * 2, [1.0] * 2) == ""
    assert compare_commits.verdict([1.04] * 9, [1.0] * 9) == ""
    assert compare_commits.verdict([0.9, 0.9, 1.2, 1.2, 1.2], [1.0] * 5) == ""


def test_graphs_are_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {graphs.PLAIN: graphs.WAYS[graphs.PLAIN]}
    monkeypatch.setattr(graphs, "WAYS", ways)
    graphs.main(["--network", "mlp"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mlp", *graphs.PLAIN.split(), "3", "32,", "17,", "1"]


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
    calls = [["model_coverage.py", "--factory", f"mine:{name}"] for name in ("build", "restless")]
    good, bad = _runs(*calls, cwd=tmp_path)
    assert good.returncode == 0 and "factory/mine:build" in good.stdout, good.stderr
    assert bad.returncode == 1 and "differs from the loop by" in bad.stdout


@pytest.mark.parametrize("kind", ["threads", "flips", "writers", "interrupts", "kills", "memory"])
def test_nothing_is_lost_however_things_break(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "endurance.json"
    answer = _run("--only", kind, "--scale", "0.02", "--json", str(out), script="endurance.py")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    counts = json.loads(out.read_text())["counts"]
    assert counts and all(name.startswith(kind) for name in counts)
    assert all(found.get("wrong", 0) == 0 and found.get("right", 0) + found.get("told", 0) for found in counts.values())


def test_the_sweep_finds_what_vmap_gets_wrong() -> None:
    """Of operators written as those in torch's table, because its import takes ten seconds."""

    def batched_says_no(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y if x.requires_grad else x + y

    def sample_inputs(*args: Any, **kwargs: Any) -> Iterator[SimpleNamespace]:
        x, y = torch.rand(4, 2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
        yield SimpleNamespace(input=x, args=(y,), kwargs={})

    def find(function: Callable[..., Any], in_place: Callable[..., Any] | None = None) -> dict[str, Any]:
        op = SimpleNamespace(
            name="mine", op=function, inplace_variant=in_place, dtypes={torch.float64}, sample_inputs=sample_inputs
        )
        return operator_sweep.examine(op, E=3, count=2)

    found = find(batched_says_no)
    assert found["runs"] == found["gradients"] == 3
    assert found["vmap is wrong"] == {"all": "outputs", "p0": "outputs"}
    assert not found["loop is wrong"] and not found["loop raises"]
    found = find(torch.add, torch.Tensor.add_)
    assert found["runs"] == 6 and not found["vmap is wrong"] and not found["auto is wrong"] and not found["auto raises"]
    assert found["by"]["vmap"] + found["by"]["loop"] == 6 and set(found["sent to the loop"]) <= {"p1 in place"}
    assert find(lambda x, y: x + torch.rand(2)) == {"left out": "it draws random numbers"}
    assert "in-place" in find(lambda x, y: x.mul_(2))["left out"]
    assert find(lambda x, y: 3.0) == {"left out": "it returns no tensor"}


def test_the_sweep_of_torchs_own_table(tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="torch's table imports it")
    out = tmp_path / "operator_sweep.json"
    some = ["index_select", "add", "cauchy", "nothing*"]
    calls = [["operator_sweep.py", "--only", *some, "--json", str(out)], ["operator_sweep.py", "--only", "nothing*"]]
    answer, nothing = _runs(*calls)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(out.read_text())
    assert found["operators"] == 3 and found["compared"] == 2 and found["runs"] == sum(found["runs by"].values())
    assert found["left out"] == {"it draws random numbers": ["cauchy"]}
    assert not any(found[f"{strategy} is wrong"] for strategy in ("vmap", "auto", "loop"))
    assert "make_forward takes the loop" in answer.stdout and answer.stdout.splitlines()[-1].startswith("... by vmap")
    assert nothing.returncode == 2 and "matches no operator" in nothing.stderr


@pytest.mark.compile
@pytest.mark.skipif(compiler() != "inductor", reason="it times the compiler")
def test_vmap_vs_be(tmp_path: Path) -> None:
    answer = _run(
        *("--case", "small-mlp", "--members", "2", "--batch-size", "4", "--rounds", "2"),
        *("--precision", "bfloat16"),
        script="vmap_vs_be.py",
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vmap_vs_be.json", "vmap_vs_be.png"]
    results = json.loads((tmp_path / "vmap_vs_be.json").read_text())
    assert list(results["cases"]) == ["small-mlp, bfloat16"]
    # Two products forward and three backward, for the data needs no gradient; a multiplication and an addition each.
    assert set(results["flop"].values()) == {2 * 4 * 2 * (2 * 20 * 64 + 3 * 64 * 64 + 3 * 64 * 10)}
    found = results["cases"]["small-mlp, bfloat16"]
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


@pytest.mark.compile
def test_growth(tmp_path: Path) -> None:
    options = ("--case", "members", "--max-members", "4", "--rounds", "1")
    answer = _run(*options, script="growth.py", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "growth.png"]
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width == 800
    points = json.loads((tmp_path / "growth.json").read_text())["points"]["members"]
    assert [point["E"] for point in points] == [1, 4]
    for point in points:
        assert len(point["seconds"]) == len(point["memory"]) == 4 and not point["left_out"]
        assert point["chunk_size"] == {"classic, compiled": None, "BatchEnsemble, compiled": None}
        assert all(len(times) == 1 and times[0] > 0 for times in point["seconds"].values())
    ruler, *lines = answer.stdout.split("\n\n")[1].splitlines()[1:6]
    assert len({len(line) for line in (ruler, *lines)}) == 1, "the table lines up"
    again = _run(*options, "--resume", "--memory", "1", script="growth.py", cwd=tmp_path)
    assert again.returncode == 0 and "step ms" not in again.stdout, "nothing is measured twice"


def test_costs_that_rise_are_told() -> None:
    names = (CLASSIC, growth.AUTO[CLASSIC])

    def point(E: int, *costs: float) -> dict[str, Any]:
        return {
            "E": E,
            "B": 1,
            "seconds": {n: [E * c] for n, c in zip(names, costs, strict=False)},
            "chunk_size": {names[0]: 8},
        }

    points = [point(1, 9.0), point(4, 2.0), point(16, 2.4), point(64, 3.0, 2.2)]
    [line] = growth.rises("members", points)
    assert "E = 64" in line and "1.50 of the lowest" in line and "8 at a time" in line and "1.10 (0.73 round" in line
    large = growth.Point(64, 32, 4096)
    assert growth.estimated(growth.CASES["widths"], large)[CLASSIC] == pytest.approx(64 * 0.348, rel=0.01)


@pytest.mark.compile
def test_notebook_job(tmp_path: Path) -> None:
    answer = _run("--images", "70", "--members", "2", "--workers", "0", script="notebook_job.py", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    results = json.loads((tmp_path / "notebook_job.json").read_text())["results"]
    assert len(results) == 7 and all(0 <= each["accuracy"] <= 1 and each["train"] > 0 for each in results.values())


def test_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ["single", "classic", "r, s", "+ first, last", "split", "own order"]
    quality.main(
        ["--only", *chosen, "--epochs", "2", "--seeds", "2", "--rounds", "2", "--members", "3", "--no-compile"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.json", "quality.png"]
    found = json.loads((tmp_path / "quality.json").read_text())["variants"]
    assert list(found) == ["single", "classic", "r, s", "+ first, last", "own order", "split"]
    mlp, last, first = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10, 128 * 10 + 10, 64 * 128 + 128
    sizes = {"single": mlp, "classic": 3 * mlp, "r, s": mlp + 3 * (64 + 5 * 128 - 128 + 10)}
    sizes["+ first, last"] = mlp + 2 * (first + last) + 3 * (128 + 128)
    assert {name: found[name]["parameters"] for name in sizes} == sizes
    for name, variant in found.items():
        assert len(variant["runs"]) == 2 and variant["step, ms"] > 0
        for run in variant["runs"]:
            assert 0.1 < run["accuracy"] <= 1 and run["nll"] <= run["member nll"] + 1e-9
            assert (run["disagreement"] == 0 and run["distance"] == 0) is (name == "single")
        assert variant["runs"][0] != variant["runs"][1]
    single, classic, be = (mean(run["nll"] for run in found[name]["runs"]) for name in ("single", "classic", "r, s"))
    lines = capsys.readouterr().out.splitlines()
    table = lines[2 : 4 + 2 * len(found)]
    assert len({len(line) for line in table}) == 1, "the columns do not line up"
    assert (
        next(line for line in table if line.startswith("r, s ")).split()[-4]
        == f"{(be - single) / (classic - single):.0%}"
    )


def test_the_same_seed_gives_the_same_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tensors were those of another run before."""
    monkeypatch.chdir(tmp_path)
    options = quality.parse(["--epochs", "1", "--no-compile"])
    task = quality.make_task(options)
    variant = next(variant for variant in quality_variants.variants() if variant.name == "r, s")
    trial = quality.Trial(variant, task, options)
    first, _, again = (trial.run(seed, tqdm(disable=True)) for seed in (3, 4, 3))
    assert first == again


def test_what_members_compute_together() -> None:
    """The gradients of shared norms and of the joint loss, compiled or not, against one pass over all rows."""
    E, x, y = 3, torch.randn(8, 2, 5, 5), torch.arange(8) % 4
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
    params = fe.ensemble_params(model, E)
    pre = [F.conv2d(x, params.stacked["0.weight"][i], params.stacked["0.bias"][i]) for i in range(E)]
    normed = F.batch_norm(torch.cat(pre), None, None, training=True).relu().flatten(1).unflatten(0, (E, 8))
    logits = torch.baddbmm(params.stacked["4.bias"][:, None], normed, params.stacked["4.weight"].mT)
    each = torch.stack([F.cross_entropy(one, y) for one in logits])
    whole = F.nll_loss(logits.softmax(2).mean(0).log(), y)
    (want,) = torch.autograd.grad(0.75 * each.sum() + 0.25 * E * whole, params.stacked["0.weight"])

    trained = torch.optim.SGD(fe.param_groups(params, lr=0.1))
    loss = partial(quality_variants.joint_loss, joint=0.25)
    step = fe.make_train_step(fe.make_forward(quality_variants.share_statistics(model)), loss, trained, compile=False)
    found = step.gradients(params, x, y, buffers=fe.ensemble_buffers(model, E))
    torch.testing.assert_close(found.losses, 0.75 * each.detach() + 0.25 * whole.detach())
    torch.testing.assert_close(found.gradients["0.weight"], want)
    for running in (found.buffers["1.running_mean"], found.buffers["1.running_var"]):
        assert torch.equal(running, running[:1].expand(E, 6))
    torch.testing.assert_close(found.buffers["1.running_mean"][0], 0.1 * torch.cat(pre).mean((0, 2, 3)).detach())


def test_signs_are_turned_while_training(tmp_path: Path) -> None:
    options = quality.parse(["--no-compile"])
    (variant,) = (variant for variant in quality_variants.variants() if variant.name == "0.02 to 0.5")
    trial = quality.Trial(variant, quality.make_task(options), options)
    vectors = {name: r for name, r in trial.params.stacked.items() if name.endswith(("_r", "_s"))}
    signs = []
    for before, share in pairwise([0.0, 0.02, 0.5, 0.02]):
        trial._turn(0, before, share)
        signs.append(torch.cat([vector.detach().flatten() for vector in vectors.values()]))
        assert abs(float((signs[-1] == -1).double().mean()) - share) < 0.03
    assert torch.equal(signs[0], signs[2]) and bool((signs[1] <= signs[0]).all())


def test_norms_may_have_the_signs_of_r() -> None:
    model = make_model("cnn16", (3, 8, 8), 2)
    (variant,) = (variant for variant in quality_variants.variants() if variant.name == "after norms, 0.5")
    params = variant.params(model, 4, torch.Generator().manual_seed(0))
    assert not params.stacked["0.weight_r"].requires_grad and bool((params.stacked["0.weight_r"] == 1).all())
    assert set(params.stacked["1.weight"].unique().tolist()) == {-1, 1} and params.stacked["1.weight"].requires_grad
    assert "1.bias" in params.shared and bool((params.stacked["11.weight_r"] == -1).any())


def test_classes_are_held_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(4):
            folder = tmp_path / split / f"class {number}"
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (10 * number, i, 0)).save(folder / f"{i}.png")
    options = quality.parse(["--data", "folder", "--data-dir", str(tmp_path)])
    task = quality.make_task(options)
    assert task.classes == 2 and task.strange == "images of class 1 and class 3"
    for part in (task.train, task.test):
        assert part.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert part.images[:, 0, 0, 0].tolist() == [0, 0, 0, 20, 20, 20]
    assert sorted(task.outside[:, 0, 0, 0].tolist()) == [10] * 6 + [30] * 6
    model = make_model("cnn", (3, 8, 8), 2)
    assert quality_variants.parts(model) == {
        "first": ["0.weight"],
        "last": ["11.weight", "11.bias"],
        "biases": ["11.bias"],
        "norms": ["1.weight", "1.bias", "4.weight", "4.bias", "7.weight", "7.bias"],
    }
    for size in (4, 33):
        with pytest.raises(quality.Unusable, match=rf"--batch-size: expected at least 5, .* at most 1, .* got {size}"):
            quality.study(quality.parse(["--data", "folder", "--batch-size", str(size)]), task)
    with pytest.raises(quality.Unusable, match=r"--hold-out: expected 1 to 2 of 4, got 3"):
        quality.make_task(quality.parse(["--data", "folder", "--data-dir", str(tmp_path), "--hold-out", "3"]))


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
