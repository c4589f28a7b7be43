"""Write the results of compare.py as a table, a plot and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import stdev
from textwrap import fill
from typing import Any

from functorch_ens.files import write_whole
from functorch_ens.tables import aligned

Results = Mapping[str, Mapping[str, Any]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _of(result: Mapping[str, Any], key: str) -> list[float]:
    """The score `key` of every run; of members, their mean."""
    found = [run[key] for run in result["runs"]]
    return [_mean(value) if isinstance(value, list) else value for value in found]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


_SCORES = {
    "accuracy": "accuracy",
    "of a member": "member_accuracy",
    "NLL": "nll",
    "NLL, T": "nll_at_temperature",
    "disagree": "disagreement",
}
_COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "parameters": lambda r: f"{r['parameters']:,}",
    "s/epoch": lambda r: f"{r['epoch_seconds']:.3f}",
    "s predict": lambda r: f"{_mean(_of(r, 'seconds')):.3f}",
    "s compile": lambda r: f"{r['compile_seconds']:.1f}",
}


def table(results: Results) -> str:
    """Format the results as a text table: means over the seeds, with their standard deviation in the row below."""
    rows = [["", *_SCORES, *_COSTS]]
    for name, result in results.items():
        values = [_of(result, key) for key in _SCORES.values()]
        rows.append([name, *(_number(_mean(each)) for each in values), *(cell(result) for cell in _COSTS.values())])
        if len(result["runs"]) > 1:
            rows.append(["", *(f"±{_number(_spread(each))}" for each in values), *("" for _ in _COSTS)])
    note = (
        "NLL, T: half of the test images at the temperature fitted to the other half. s/epoch: of one network on E x "
        "rows, the time of E epochs."
    )
    return f"{aligned(rows)}\n\n{note}"


def in_words(results: Results) -> str:
    """What was gained over one network, and at what cost."""
    one, *others = results.items()
    lines = [f"Against {one[0]}, means and standard deviations over the seeds:"]
    for name, result in others:
        gains = [
            [(a - b) * sign for a, b in zip(_of(result, key), _of(one[1], key), strict=True)]
            for key, sign in (("accuracy", 100), ("nll", -1))
        ]
        points, nats = ([_mean(gain), _spread(gain)] for gain in gains)
        size = result["parameters"] / one[1]["parameters"]
        time = result["epoch_seconds"] / one[1]["epoch_seconds"]
        lines.append(
            f"{name}: {points[0]:+.1f} ± {points[1]:.1f} points of accuracy and {-nats[0]:+.3f} ± {nats[1]:.3f} NLL, "
            f"for {size:.3g} × the parameters and {time:.2g} × the training time."
        )
    return "\n".join(lines)


def draw(results: Results, title: str, path: Path) -> None:
    """Draw accuracy and NLL of every run and their mean, and the parameters beside them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)
    colours = ["0.45", "0.65", "C0", "C1"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), layout="constrained", width_ratios=[3, 3, 2])
    figure.suptitle(fill(title, 110), fontsize=10)
    labels = [name.replace(", E x", ",\nE ×").replace(" ensemble", "\nensemble") for name in names]
    places = list(range(len(names)))[::-1]

    for axis, key, label in (
        (axes[0], "accuracy", "test accuracy, % (more is better)"),
        (axes[1], "nll", "test NLL (less is better)"),
    ):
        for place, name, colour in zip(places, names, colours, strict=True):
            values = [100 * value if key == "accuracy" else value for value in _of(results[name], key)]
            axis.scatter(values, [place] * len(values), color=colour, alpha=0.5, s=36)
            axis.scatter(_mean(values), place, color=colour, marker="D", s=110, edgecolor="black", zorder=3)
            text = f"{_mean(values):.1f}" if key == "accuracy" else f"{_mean(values):.3f}"
            axis.annotate(text, (_mean(values), place), xytext=(0, 11), textcoords="offset points", ha="center")
        axis.set_title(label, fontsize=12)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.12)
    sizes = [results[name]["parameters"] / results[names[0]]["parameters"] for name in names]
    bars = axes[2].barh(places, sizes, color=colours, height=0.55)
    axes[2].bar_label(bars, fmt="%.3g ×", padding=3)
    axes[2].set_title("parameters", fontsize=12)
    axes[2].set_xlim(0, 1.3 * max(sizes))
    for i, axis in enumerate(axes):
        axis.set_yticks(places, labels if i == 0 else [""] * len(labels), fontsize=12)
        axis.set_ylim(-0.5, len(names) - 0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with write_whole(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Write `results` as JSON. Numbers that are not finite become null: JSON has no NaN."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    with write_whole(path) as part:
        part.write_text(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
