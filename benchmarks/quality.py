"""Compare the predictions of a single network, a classic ensemble and many variants of BatchEnsemble between them.

Every variant is trained from several seeds, with the recipe of the single network: the same epochs, Adam, one learning
rate. It then predicts test images of the training classes, and images from outside that it should be uncertain of.

    python benchmarks/quality.py                                         scikit-learn's digits
    python benchmarks/quality.py --data folder --data-dir DIR --seeds 5  a folder of images; two classes are held out
    python benchmarks/quality.py --data cifar10 --model cnn
    python benchmarks/quality.py --only single 'classic*' 'r, s'         some of the variants
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from measure import Spread, interleaved, machine, megabytes, parsed, peak_memory, positive, ratio, write_json
from quality_variants import SAME_ROWS, Variant, parts, share_statistics, variants
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.files import write_whole
from functorch_ens.tables import aligned

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from data import DataUnavailable, Split, load, normalise
from models import UnknownModel, make_model


class Unusable(Exception):
    """The options do not fit the data; the message says why."""


@dataclass
class Task:
    """Training images, test images of the same classes, and images from outside."""

    train: Split
    test: Split
    outside: Tensor
    classes: int
    strange: str
    """A description of the images from outside."""


def make_task(options: argparse.Namespace) -> Task:
    """Load the data. The images from outside are noise and rotated digits, or SVHN if present, or held-out classes."""
    data = load(options.data, options.data_dir, options.image_size, options.device)
    classes = list(range(len(data.classes)))
    if options.data == "digits":
        source = torch.Generator().manual_seed(0)
        noise = torch.randint(256, data.test.images.shape, generator=source, dtype=torch.uint8).to(options.device)
        turned = torch.rot90(data.test.images, 1, (-2, -1))
        return Task(data.train, data.test, torch.cat([noise, turned]), len(classes), "noise and turned digits")
    if not 0 < options.hold_out < len(classes) - 1:
        raise Unusable(f"--hold-out: expected 1 to {len(classes) - 2} of {len(classes)}, got {options.hold_out}")
    every = len(classes) // options.hold_out
    held = torch.tensor(classes[every - 1 :: every][: options.hold_out], device=options.device)
    number = torch.tensor([-1 if label in held else label for label in classes], device=options.device)
    number[number >= 0] = torch.arange(int((number >= 0).sum()), device=options.device)

    def known(split: Split) -> Split:
        inside = ~torch.isin(split.labels, held)
        return Split(split.images[inside], number[split.labels[inside]])

    outside, name = _svhn(options), "SVHN"
    if outside is None or outside.shape[1:] != data.test.images.shape[1:]:
        outside = torch.cat([split.images[torch.isin(split.labels, held)] for split in (data.test, data.train)])
        name = "images of " + " and ".join(data.classes[label] for label in held.tolist())
    test = known(data.test)
    return Task(known(data.train), test, outside[: 4 * len(test.labels)], len(classes) - len(held), name)


def _svhn(options: argparse.Namespace) -> Tensor | None:
    """Load the test images of SVHN; None if the file is missing."""
    from torchvision.datasets import SVHN

    try:
        return torch.from_numpy(SVHN(options.data_dir, split="test").data).to(options.device)
    except RuntimeError:
        return None


# --------------------------------------------------------------------------------------------------------------------
# One variant


class Trial:
    """One variant on one task. Every seed trains in the same tensors, so that the step is compiled once."""

    def __init__(self, variant: Variant, task: Task, options: argparse.Namespace) -> None:
        self.variant, self.task, self.options = variant, task, options
        self.E = variant.members or options.members
        self.model = self._model(0)
        self.params = self._initial(0)
        self.buffers = fe.ensemble_buffers(self.model, self.E)
        self.forward = fe.make_forward(self.model, member_inputs=variant.sees != "same")
        groups = fe.param_groups(self.params, lr=options.lr, **variant.groups)
        self.optimizer = torch.optim.Adam([g for g in groups if not (variant.fixed and g["name"] == "rank-1")])
        train = task.train
        self.step = fe.make_train_step(
            self.forward,
            variant.loss(),
            self.optimizer,
            prepare=lambda i: (normalise(train.images[i]), train.labels[i]),
            compile=options.compile and not variant.joint,  # compiled code may loop over the members in the loss
        )
        self._index = self.batches(torch.Generator().manual_seed(0))[0]

    def _model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        shape = tuple(self.task.train.images.shape[1:])
        model = make_model(self.options.model, shape, self.task.classes).to(self.options.device).train()
        return share_statistics(model) if self.variant.share_statistics else model

    def _initial(self, seed: int) -> fe.EnsembleParams:
        return self.variant.params(self._model(seed), self.E, torch.Generator().manual_seed(seed))

    def batches(self, source: torch.Generator) -> list[Tensor]:
        """The index batches of one epoch."""
        rows, size = len(self.task.train.labels), self.options.batch_size
        if self.variant.sees == "split":
            size -= size % self.E
        if self.variant.same_rows:
            size *= self.options.members
        return fe.index_batches(
            rows, size, E=self.E, sees=self.variant.sees, generator=source, device=self.options.device
        )

    def run(self, seed: int, bar: Any) -> dict[str, float]:
        """Train from `seed`, and compute the metrics."""
        with torch.no_grad():
            for mine, new in zip(tree_leaves(self.params), tree_leaves(self._initial(seed)), strict=True):
                mine.copy_(new)
        self.optimizer.state.clear()  # no momentum of the previous seed
        fitted = self._fitted(seed, self.options.epochs * (self.variant.epochs or self.options.members))
        bar.update()
        return self.answers(fitted)

    def _fitted(self, seed: int, epochs: int) -> fe.Fitted:
        source = torch.Generator().manual_seed(seed)
        fit = partial(fe.fit, self.step, self.params, self.batches, generator=source, progress=False)
        if self.variant.turn is None:
            return fit(epochs=epochs, buffers=self.buffers)
        start, end = self.variant.turn
        shares = [start + (end - start) * min(1.0, 2 * epoch / epochs) for epoch in range(epochs)]
        fitted = fe.Fitted(self.params, self.buffers, {}, {})
        for before, share in pairwise([0.0, *shares]):
            self._turn(seed, before, share)
            fitted = fit(epochs=1, buffers=fitted.buffers)
        return fitted

    @torch.no_grad()
    def _turn(self, seed: int, before: float, share: float) -> None:
        """Move from one share of reversed signs to another. The optimiser's state stays.

        Each entry of r and s has a random number in [0, 1), the same at every call. Those below the share are reversed.
        """
        source = torch.Generator().manual_seed(1000 + seed)  # not the numbers that the weights are drawn from
        (vectors,) = (group["params"] for group in self.optimizer.param_groups if group["name"] == "rank-1")
        for vector in vectors:
            number = torch.rand(vector.shape, generator=source).to(vector.device)
            vector.mul_(torch.where((number < before) == (number < share), 1.0, -1.0))

    def answers(self, fitted: fe.Fitted) -> dict[str, float]:
        """Compute the metrics of the trained ensemble on the test images and on those from outside."""

        def predicted(images: Tensor) -> Tensor:
            return fe.predict(self.forward, fitted.params, images, buffers=fitted.buffers, prepare=normalise).double()

        inside, outside, y = predicted(self.task.test.images), predicted(self.task.outside), self.task.test.labels
        known, unknown = fe.classification_uncertainty(inside), fe.classification_uncertainty(outside)
        kl = fe.pairwise_kl(inside)
        pairs = self.E * (self.E - 1)
        found: dict[str, Tensor | float] = {
            "member accuracy": torch.stack([fe.metrics.accuracy(one[None], y) for one in inside]).mean(),
            "member nll": torch.stack([fe.metrics.nll(one[None], y) for one in inside]).mean(),
            "accuracy": fe.metrics.accuracy(inside, y),
            "nll": fe.metrics.nll(inside, y),
            "nll, T fitted": self._calibrated(inside, y),
            "ece": fe.metrics.calibration_error(inside, y),
            "auroc, total": fe.metrics.auroc(known.total, unknown.total),
            "auroc, epistemic": fe.metrics.auroc(known.epistemic, unknown.epistemic),
            "disagreement": fe.disagreement(inside).mean(),
            "pairwise kl": kl.sum() / max(1, pairs),
            "distance": self._distance(fitted.params),
        }
        return {name: float(value) for name, value in found.items()}

    def _calibrated(self, logits: Tensor, y: Tensor) -> Tensor:
        """The cross-validated NLL: each fifth of the test images at the temperature fitted to the other four."""
        fold = torch.arange(len(y), device=y.device) % 5
        values = []
        for i in range(5):
            T = fe.fit_temperature(logits[:, fold != i], y[fold != i])
            values.append(fe.metrics.nll(logits[:, fold == i] / T, y[fold == i]) * (fold == i).sum())
        return torch.stack(values).sum() / len(y)

    def _distance(self, params: fe.EnsembleParams) -> float:
        """The mean distance between two members' weight vectors, divided by the mean norm of one."""
        members = [
            torch.cat([w.detach().flatten().double() for w in fe.member_params(self.model, params, i).values()])
            for i in range(self.E)
        ]
        flat = torch.stack(members)
        return float(torch.pdist(flat).mean() / flat.norm(dim=1).mean()) if self.E > 1 else 0.0

    def one_step(self) -> None:
        """Run one training step, for timing."""
        self.step(self.params, self._index, buffers=self.buffers)


def study(options: argparse.Namespace, task: Task) -> dict[str, dict[str, Any]]:
    """Train and time every chosen variant; return the metrics of each seed and the costs, by variant."""
    chosen = [v for v in variants() if any(fnmatchcase(v.name, pattern) for pattern in options.only)]
    shape = tuple(task.train.images.shape[1:])
    has_norms = bool(parts(make_model(options.model, shape, task.classes))["norms"])
    rows = options.batch_size * options.members
    if rows > len(task.train.labels) or options.batch_size < options.members:
        raise Unusable(
            f"--batch-size: expected at least {options.members}, the number of members, and at most "
            f"{len(task.train.labels) // options.members}, so that E x B images are there, got {options.batch_size}"
        )
    chosen = [variant for variant in chosen if has_norms or not variant.needs_norms]
    trials: dict[str, Trial] = {}
    results: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(chosen) * options.seeds, unit="run", disable=None) as bar:
        for variant in chosen:
            bar.set_description(variant.name)
            trial = trials[variant.name] = Trial(variant, task, options)
            results[variant.name] = {
                "about": variant.about,
                "parameters": sum(leaf.numel() for leaf in tree_leaves(trial.params)),
                "MB": megabytes((trial.params, trial.buffers)),
                "runs": [trial.run(seed, bar) for seed in range(options.seeds)],
            }
            # After each variant, so that a later failure loses none.
            write_json({"settings": settings(options), "variants": results}, options.json)
    calls: dict[str, Callable[[], None]] = {name: trial.one_step for name, trial in trials.items()}
    limit = trials.get(SAME_ROWS.name) or Trial(SAME_ROWS, task, options)
    times = interleaved({**calls, SAME_ROWS.name: limit.one_step}, options.rounds, options.device)
    for name, call in calls.items():
        results[name]["step, ms"] = 1e3 * Spread.of(times[name]).median
        results[name]["time of one network on as many rows"] = ratio(times[name], times[SAME_ROWS.name])._asdict()
        results[name]["peak of a step, MB"] = peak_memory(call, options.device) / 1e6
    return results


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options and the machine that the results depend on."""
    here = {name: value for name, value in vars(options).items() if name not in ("json", "png", "data_dir", "only")}
    plain = {name: value if isinstance(value, int | float) else str(value) for name, value in here.items()}
    return {**plain, "machine": machine(options.device)}


# --------------------------------------------------------------------------------------------------------------------
# Tables and plots

_COLUMNS = {
    "member accuracy": "member acc",
    "accuracy": "accuracy",
    "nll": "NLL",
    "nll, T fitted": "NLL, T",
    "ece": "ECE",
    "auroc, total": "AUROC, tot",
    "auroc, epistemic": "AUROC, epi",
    "disagreement": "disagree",
    "pairwise kl": "KL",
    "distance": "distance",
}

_LEGEND = """Means over the seeds, each with its standard deviation below. NLL, T: each fifth of the test images at the
temperature fitted to the other four. AUROC: images from outside detected by the total and by the epistemic uncertainty.
KL: mean over pairs of members. distance: between the weights of two members, divided by their norm. won: share of the
classic ensemble's gain over the single network. x limit: time of a step divided by that of one network on E x B rows.
peak MB: memory that a step allocates and frees again."""


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the results as a table; `_LEGEND` explains its columns."""
    head = ["", *_COLUMNS.values(), "won acc", "won NLL", "parameters", "x limit", "peak MB"]
    rows = [head]
    for name, result in results.items():
        values = {key: [run[key] for run in result["runs"]] for key in _COLUMNS}
        won = [_won(results, name, key) for key in ("accuracy", "nll")]
        rows.append(
            [
                name,
                *(_number(mean(each)) for each in values.values()),
                *("-" if part is None else f"{part:.0%}" for part in won),
                f"{result['parameters']:,}",
                f"{result['time of one network on as many rows']['median']:.2f}",
                f"{result['peak of a step, MB']:.1f}",
            ]
        )
        rows.append(["", *(f"±{_number(_deviation(each))}" for each in values.values()), "", "", "", "", ""])
    return aligned(rows)


def _won(results: Mapping[str, Mapping[str, Any]], name: str, key: str) -> float | None:
    """The share of the classic ensemble's gain over a single network; None if one is missing or there is no gain."""
    if not {"single", "classic"} <= results.keys() or name in ("single", "classic"):
        return None
    mine, single, classic = (mean(run[key] for run in results[which]["runs"]) for which in (name, "single", "classic"))
    gain = classic - single
    return (mine - single) / gain if (gain > 0) is (key == "accuracy") and gain else None


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:.3g}"


def draw(results: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw accuracy, NLL and the AUROC of epistemic uncertainty against parameters and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 9), layout="constrained")
    figure.suptitle(textwrap.fill(title, 120), fontsize=10)
    axes = figure.subplots(2, 3)
    costs: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "parameters": lambda result: result["parameters"],
        "time of a step / one network on as many rows": lambda r: r["time of one network on as many rows"]["median"],
    }
    qualities = {
        "accuracy": "accuracy (higher is better)",
        "nll": "NLL (lower is better)",
        "auroc, epistemic": "AUROC of epistemic uncertainty (higher is better)",
    }
    markers = "osD^v"
    for row, (cost, of) in zip(axes, costs.items(), strict=True):
        for ax, (key, label) in zip(row, qualities.items(), strict=True):
            taken: Counter[float] = Counter()
            for i, (name, result) in enumerate(results.items()):
                values, at = [run[key] for run in result["runs"]], of(result)
                taken[at] += 1
                ax.errorbar(
                    at * 1.03 ** (taken[at] - 1 if cost == "parameters" else 0),  # shift points of equal size
                    mean(values),
                    _deviation(values),
                    fmt=markers[i // 10],
                    color=f"C{i % 10}",
                    ecolor=(f"C{i % 10}", 0.35),
                    label=name,
                )
            ax.set(xlabel=cost, ylabel=label, xscale="log" if cost == "parameters" else "linear")
            ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    with write_whole(path) as part:
        figure.savefig(part, dpi=110, format="png")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=["digits", "folder", "cifar10"], default="digits", help="the data set (default: digits)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the images (default: data)")
    add("--hold-out", type=positive, default=2, metavar="N", help="classes held out as outside (default: 2)")
    add("--image-size", type=positive, metavar="N", help="resize every image to N x N (default: keep)")
    add(
        "--model",
        default="mlp",
        help="mlp, cnn (cnn16: 16 channels first), or a torchvision model by name (default: mlp)",
    )
    add("--only", nargs="+", metavar="PATTERN", default=["*"], help="names or patterns of variants (default: all)")
    add("--members", type=positive, default=5, metavar="E", help="members per ensemble (default: 5)")
    add("--epochs", type=positive, default=10, metavar="N", help="epochs of the single network (default: 10)")
    add("--batch-size", type=positive, default=32, metavar="B", help="images per step (default: 32)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (default: 1e-3)")
    add("--seeds", type=positive, default=5, metavar="N", help="seeds per variant (default: 5)")
    add("--rounds", type=positive, default=7, metavar="N", help="rounds of timing (default: 7)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device of all computation (default: cpu)")
    add("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    add("--json", type=Path, default=Path("quality.json"), metavar="FILE", help="JSON results (default: %(default)s)")
    add("--png", type=Path, default=Path("quality.png"), metavar="FILE", help="PNG plot (default: %(default)s)")
    options = parsed(parser, argv)
    names = [variant.name for variant in variants()]
    unknown = [p for p in options.only if not any(fnmatchcase(name, p) for name in names)]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} matches none of {names}")
    options.device = torch.device(options.device)
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        task = make_task(options)
        results = study(options, task)
    except (DataUnavailable, UnknownModel, Unusable) as error:
        sys.exit(f"quality.py: {error}")
    title = (
        f"{options.data}, {options.model}: {len(task.train.labels)} training and {len(task.test.labels)} test images "
        f"of {task.classes} classes; outside: {len(task.outside)} {task.strange}; E={options.members}, "
        f"{options.epochs} epochs, batch {options.batch_size}, Adam {options.lr:g}, {options.seeds} seeds; "
        f"{machine(options.device)}"
    )
    print(f"{title}\n\n{report(results)}\n\n{_LEGEND}")
    write_json({"title": title, "settings": settings(options), "variants": results}, options.json)
    draw(results, title, options.png)
    print(f"\nresults: {options.json}\nplot: {options.png}")


if __name__ == "__main__":
    main()
