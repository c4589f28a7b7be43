"""What compare.py found, as a table, a plot and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
    """The results as lines of text, a kind each."""
    rows = [
        ["", *_COLUMNS],
        *([name, *(cell(result) for cell in _COLUMNS.values())] for name, result in results.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(results: Results, title: str, path: Path) -> None:
    """The results as a PNG: what is gained on the left, what it costs on the right."""
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
    _write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    plt.close(figure)


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """`results` as JSON, in which a number that is not finite is null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False)
    _write_whole(path, lambda part: part.write_text(text + "\n"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write `path` in one move: it is there whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
