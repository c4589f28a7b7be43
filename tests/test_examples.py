"""examples/compare.py, run as a user does."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import compare
import data
import finetune
import models
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import functorch_ens as fe

EXAMPLES = Path(__file__).parent.parent / "examples"


def _run(tmp_path: Path, *options: str) -> dict[str, Any]:
    out, png = tmp_path / "out" / "results.json", tmp_path / "plot.png"
    compare.main([*options, "--out", str(out), "--png", str(png), "--device", "cpu"])
    with Image.open(png) as image:
        assert image.format == "PNG" and image.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plot.png"]  # nothing half-written is left
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_the_main_job_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _run(tmp_path, "--epochs", "8", "--members", "3", "--seeds", "2", "--no-compile")
    names = ["one network", "one network, E x rows", "classic ensemble", "BatchEnsemble"]
    assert list(report["results"]) == names
    single, same_cost, classic, be = (report["results"][name] for name in names)
    for result, E in ((single, 1), (same_cost, 1), (classic, 3), (be, 3)):
        assert result["members"] == E and len(result["runs"]) == 2
        for run in result["runs"]:
            assert E == len(run["member_accuracy"]) == len(run["member_nll"])
            assert run["accuracy"] > 0.7 and 0 < run["nll"] < 1 and 0 < run["nll_at_temperature"] < 1
            # Jensen: the mean probability is never worse than the mean of the members' log-probabilities.
            assert run["nll"] <= sum(run["member_nll"]) / E + 1e-9
            assert (run["disagreement"] > 0) is (E > 1) and run["seconds"] > 0
        assert result["runs"][0] != result["runs"][1]
        assert result["epoch_seconds"] > 0 and result["compile_seconds"] == 0
    mlp = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert (single["parameters"], classic["parameters"]) == (mlp, 3 * mlp)
    assert be["parameters"] == mlp + 3 * (64 + 128 + 128 + 128 + 128 + 10)
    assert be["bytes"] == 4 * be["parameters"]
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith((*(f"{name}  " for name in names), " " * 10))]
    assert len(table) == 9 and len({len(line) for line in table}) == 1, "the columns do not line up"
    gain = sum(b["accuracy"] - a["accuracy"] for a, b in zip(single["runs"], be["runs"], strict=True)) / 2
    (said,) = [line for line in lines if line.startswith("BatchEnsemble: ")]
    assert float(said.split()[1]) == pytest.approx(100 * gain, abs=0.06) and "1.07 × the parameters" in said


@pytest.mark.compile
def test_on_digits_the_default_gains_what_a_classic_ensemble_does(tmp_path: Path) -> None:
    results = _run(tmp_path, "--seeds", "3")["results"]

    def mean(name: str, key: str) -> float:
        return sum(run[key] for run in results[name]["runs"]) / 3

    for key in ("nll", "nll_at_temperature"):
        best = min(mean("one network", key), mean("one network, E x rows", key))
        assert mean("BatchEnsemble", key) < best - 0.5 * (best - mean("classic ensemble", key))


@pytest.mark.compile
def test_the_notebook_runs_and_is_kept_with_its_outputs(tmp_path: Path) -> None:
    """From top to bottom, as a user runs it; what is in the repository was run too, and shows the same."""
    notebook = nbformat.read(EXAMPLES / "batchensemble.ipynb", as_version=4)
    kept = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    new = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]

    def kinds(outputs: list[Any]) -> list[list[str]]:
        shown = [[output for output in cell if output.get("name") != "stderr"] for cell in outputs]
        return [sorted(kind for output in cell for kind in (output.get("data") or ["text"])) for cell in shown]

    assert kinds(new) == kinds(kept)
    assert sum("image/png" in cell for cell in kinds(new)) == 6
    for outputs in (kept, new):
        text = "".join(output.text for cell in outputs for output in cell if output.get("name") == "stdout")
        assert "this ensemble" in text and "the same logits: True" in text
        table = re.findall(
            r"^(?:single network|classic ensemble|BatchEnsemble) +(0\.\d+) +(0\.\d+) ", text, re.MULTILINE
        )
        assert len(table) == 3 and all(0.9 < float(accuracy) < 1 for row in table for accuracy in row)


def test_the_same_seed_gives_the_same_result(tmp_path: Path) -> None:
    def accuracies() -> Any:
        results = _run(tmp_path, "--epochs", "1", "--members", "2", "--no-compile", "--seed", "3", "--seeds", "1")[
            "results"
        ]
        return [[(run["member_nll"], run["disagreement"]) for run in result["runs"]] for result in results.values()]

    assert accuracies() == accuracies()


@pytest.mark.parametrize("model", ["cnn", "resnet18"])
def test_other_models_on_a_folder_of_images(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    for split, count in (("train", 6), ("test", 2)):
        for label, colour in (("dark", 40), ("light", 200)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (18, 16 + i), (colour + i, colour, colour)).save(folder / split / label / f"{i}.png")
    options = [
        "--data",
        "folder",
        "--data-dir",
        str(folder),
        "--model",
        model,
        "--epochs",
        "1",
        "--no-compile",
        "--seeds",
        "1",
    ]
    with pytest.raises(SystemExit, match=r"differ in size.*give --image-size N"):
        compare.main(options)
    report = _run(folder.parent / "run", *options, "--image-size", "16", "--members", "2", "--batch-size", "4")
    assert all(
        result["bytes"] > 4 * result["parameters"] for result in report["results"].values()
    )  # BatchNorm's buffers
    assert all(math.isfinite(result["runs"][0]["nll"]) for result in report["results"].values())
    assert "12 training and 4 test images of [3, 16, 16]" in capsys.readouterr().out


def test_digits_are_all_there_and_normalised() -> None:
    digits = data.load("digits", Path("nowhere"), None, torch.device("cpu"))
    assert len(digits.train.labels) + len(digits.test.labels) == 1797
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.shape[1:] == (1, 8, 8)
    x = data.normalise(digits.train.images)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert data.with_channels(digits, 3).test.images.shape == (360, 3, 8, 8)


def test_the_notebooks_mlp() -> None:
    assert sum(parameter.numel() for parameter in models.mlp(3072, 10).parameters()) == 411_146


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "folder", "--data-dir", "nowhere"], r"nowhere is no image folder.*\nNeeded: DIR/train/CLASS"),
        (
            ["--model", "resnet19"],
            "expected mlp, cnn or a torchvision classification model such as resnet18, got resnet19",
        ),
    ],
)
def test_what_cannot_be_had_is_said(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        compare.main(options)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    with pytest.raises(
        SystemExit, match=r"CIFAR-10 is not in .*no network\n.*--data-dir(.|\n)*--data folder(.|\n)*--data digits"
    ):
        compare.main(["--data", "cifar10", "--data-dir", str(tmp_path)])


def test_a_model_that_cannot_take_the_images_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"alexnet cannot be trained on images of \[3, 8, 8\]; try --image-size"):
        compare.main(["--model", "alexnet"])


def test_without_a_compiler_it_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr(compare, "compare", partial(_first_kind, compare.compare))
    compare.main(["--epochs", "1", "--seeds", "1", "--png", str(tmp_path / "plot.png")])
    assert "torch.compile does not work here, so training goes on without it: no C++ compiler" in caplog.text


def _first_kind(own: Any, data: Any, args: Any) -> Any:
    small = data._replace(train=type(data.train)(data.train.images[:64], data.train.labels[:64]))
    return own(small, args)


def test_a_run_that_diverges_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"one network diverges, give a smaller --lr than 1e\+30: "):
        _run(tmp_path, "--epochs", "1", "--members", "2", "--seeds", "1", "--no-compile", "--lr", "1e30")


@pytest.mark.parametrize(
    "option",
    [
        ["--members", "0"],
        ["--lr", "-1"],
        ["--lr", "inf"],
        ["--epochs", "many"],
        ["--flip", "1.5"],
        ["--noise", "loud"],
        ["--seeds", "0"],
        ["--device", "nonsense"],
        ["--seed", "99999999999999999999"],
        ["--png", "."],
        ["--out", "/proc/results.json"],
    ],
)
def test_bad_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(option)
    assert caught.value.code == 2 and option[0] in capsys.readouterr().err


@pytest.mark.compile
def test_help_and_a_compiled_run_from_the_command_line(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, str(EXAMPLES / "compare.py"), *options]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "--members" in run("--help")
    assert "BatchEnsemble" in run("--epochs", "1", "--members", "2", "--seeds", "1")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_fine_tuning_starts_from_the_pretrained_network_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = finetune.Network(10), torch.randn(6, 1, 8, 8)
    for name, (members, _, make) in finetune.kinds(3).items():
        params = make(model, members, torch.Generator().manual_seed(0))
        assert params.stacked["head.weight"].shape == (members, 10, 128)
        trunk = fe.make_forward(model.trunk)
        inner = fe.EnsembleParams(*({k[6:]: v for k, v in part.items() if k.startswith("trunk")} for part in params))
        if inner.stacked and "BatchEnsemble" not in name:  # whose r and s are near 1, not 1
            assert torch.allclose(trunk(inner, x), model.trunk(x).expand(members, -1, -1), atol=1e-5)
    finetune.main(["--seeds", "1", "--epochs", "10"])
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(tuple(finetune.kinds(5)))]
    assert len(table) == 5 and len({len(line) for line in table}) == 1
    assert all(float(re.findall(r" (0\.\d+)", line)[0]) > 0.7 for line in table)
    with pytest.raises(SystemExit):
        finetune.main(["--labels", "0"])
