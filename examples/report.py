"""Write the results of compare.py as a table, a plot and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from functorch_ens.files import write_whole
from functorch_ens.tables import aligned

Results = Mapping[str, Mapping[str, Any]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "member acc": lambda r: f"{_mean(r['member_accuracy']):.4f}",
    "ensemble acc": lambda r: f"{r['ensemble_accuracy']:.4f}",
    "member NLL": lambda r: _number(_mean(r["member_nll"])),
    "ensemble NLL": lambda r: _number(r["ensemble_nll"]),
    "disagree": lambda r: f"{r['disagreement']:.4f}" if r["members"] > 1 else "-",
    "parameters": lambda r: f"{r['parameters']:,}",
    "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
    "s/epoch": lambda r: f"{r['epoch_seconds']:.3f}",
    "s evaluate": lambda r: f"{r['evaluate_seconds']:.3f}",
    "s compile": lambda r: f"{r['compile_seconds']:.1f}",
}


def table(results: Results) -> str:
    """Format the results as a text table, one row per kind of ensemble."""
    rows = [[name, *(cell(result) for cell in _COLUMNS.values())] for name, result in results.items()]
    return aligned([["", *_COLUMNS], *rows])


def draw(results: Results, title: str, path: Path) -> None:
    """Draw accuracy and NLL of the members and the ensemble, and the costs beside them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)
    colours = [f"C{i}" for i in range(len(names))]
    figure, axes = plt.subplots(1, 5, figsize=(16, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=9)

    for axis, key, title in ((axes[0], "accuracy", "test accuracy"), (axes[1], "nll", "test NLL")):
        for x, (name, colour) in enumerate(zip(names, colours, strict=True)):
            members, ensemble = results[name][f"member_{key}"], results[name][f"ensemble_{key}"]
            axis.scatter([x] * len(members), members, color=colour, alpha=0.5, s=24, label="member" if x == 0 else None)
            axis.scatter(
                [x], [ensemble], color=colour, marker="D", s=64, edgecolor="black", label="ensemble" if x == 0 else None
            )
            axis.annotate(f"{ensemble:.3f}", (x, ensemble), xytext=(9, 0), textcoords="offset points", va="center")
        axis.set_title(f"{title} ({'higher' if key == 'accuracy' else 'lower'} is better)")
        axis.margins(x=0.3, y=0.15)
    axes[0].legend(frameon=False, loc="best")

    bars = {
        "disagreement of members": [results[name]["disagreement"] for name in names],
        "seconds per training epoch": [results[name]["epoch_seconds"] for name in names],
        "parameters and buffers, MB": [results[name]["bytes"] / 1e6 for name in names],
    }
    for axis, (title, values) in zip(axes[2:], bars.items(), strict=True):
        drawn = axis.bar(range(len(names)), values, color=colours)
        axis.bar_label(drawn, fmt="%.3g", padding=2)
        axis.margins(y=0.15)
        axis.set_title(title)
    for axis in axes:
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n").replace("BatchE", "Batch-\nE") for name in names])
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
