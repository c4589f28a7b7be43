"""Draw the pictures of README.md from results/*.json: what an ensemble gains for its size, the time of its steps, what
the share of flipped signs does, and what each kind gains for the time of its steps.

    python benchmarks/readme_picture.py

The files of results are written by quality.py and vmap_vs_be.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

# Okabe and Ito's colours, which colour-blind readers can tell apart; the markers differ too.
GREY, BLUE, ORANGE, GREEN, PURPLE = "#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7"

VARIANTS = {  # name in the results: (label, colour, marker)
    "single": ("one network", GREY, "o"),
    "classic": ("classic ensemble", BLUE, "s"),
    "single, E x rows": ("one network, E × rows", GREEN, "^"),
    "recipe": ("BatchEnsemble", ORANGE, "D"),
}
TASKS = {  # results/quality-dial-*-cpu.json: its title
    "digits-mlp": "digits, MLP",
    "cifar-mlp": "CIFAR-10, MLP",
    "cifar-cnn": "CIFAR-10, CNN",
    "cifar-cnn16": "CIFAR-10, narrow CNN",
}
PRICED = {  # name in the results: (label, colour, marker, colour of its inside)
    "single": ("one network", GREY, "o", GREY),
    "single, E x rows": ("one network, E × rows and epochs", GREEN, "^", GREEN),
    "classic": ("classic ensemble", BLUE, "s", BLUE),
    "own order": ("BatchEnsemble, half of the signs −1", ORANGE, "D", ORANGE),
    "own order, fixed": ("… r and s not trained", ORANGE, "D", "white"),
    "flip 0.1": ("… a tenth", PURPLE, "v", PURPLE),
}
SHARES = {"flip 0": 0, "flip 0.02": 0.02, "flip 0.05": 0.05, "flip 0.1": 0.1, "flip 0.25": 0.25, "own order": 0.5}
CASES = {
    "small-mlp": "small MLP\nE = 32, B = 32",
    "mlp-32": "MLP\nE = 5, B = 32",
    "mlp-256": "MLP\nE = 5, B = 256",
    "mlp-1024": "MLP\nE = 5, B = 1024",
    "wide-mlp": "MLP\nE = 16, B = 128",
    "vit": "vision transformer\nE = 4, B = 8",
    "resnet18": "ResNet-18\nE = 4, B = 16",
    "cnn": "CNN with BatchNorm\nE = 5, B = 32",
}
LOOP = "loop over modules"


def draw(quality: dict[str, Any], speed: dict[str, Any]) -> Figure:
    """The picture: quality against parameters on the left, times of steps on the right."""
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(8, 4), layout="constrained")
        panels: Any = figure.subfigures(1, 2, width_ratios=[1, 1.2])
        left, right = panels
        above, below = left.subplots(2, 1, sharex=True)
        _gain(above, quality["variants"], "accuracy", "accuracy")
        _gain(below, quality["variants"], "nll", "NLL (lower is better)")
        above.set_title("Quality for its size\nMLP, 4,000 CIFAR-10 images, E = 5", fontsize=9)
        below.set_xlabel("parameters, in networks")
        handles, labels = above.get_legend_handles_labels()
        left.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=7.5, columnspacing=1)
        _times(right.subplots(), speed["cases"])
    return figure


def draw_dial(tasks: dict[str, dict[str, Any]]) -> Figure:
    """Accuracy and NLL of a BatchEnsemble by the share of its signs that start at -1, one column for each task."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(9.5, 4), layout="constrained")
        axes: Any = figure.subplots(2, len(tasks), sharex=True, squeeze=False)
        for column, (task, variants) in zip(axes.T, tasks.items(), strict=True):
            column[0].set_title(TASKS[task], fontsize=10)
            for ax, score in zip(column, ("accuracy", "nll"), strict=True):
                _dial(ax, variants, score)
            column[1].set_xlabel("share of −1 in r and s")
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("NLL (lower is better)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _dial(ax: Axes, variants: dict[str, Any], score: str) -> None:
    """The mean `score` over the seeds by the share of flipped signs, with those of other kinds as lines."""

    def score_of(name: str) -> float:
        return mean(run[score] for run in variants[name]["runs"])

    for name, style in (("single", ":"), ("single, E x rows", "-."), ("classic", "--")):
        text, colour, _ = VARIANTS[name]
        ax.axhline(score_of(name), color=colour, linestyle=style, label=text)
    shares = {name: share for name, share in SHARES.items() if name in variants}
    places = range(len(shares))
    ax.plot(places, [score_of(name) for name in shares], "D-", color=ORANGE, label="BatchEnsemble")
    ax.set_xticks(places, [f"{share:g}".lstrip("0") or "0" for share in shares.values()])
    worst = score_of("single, E x rows")
    shown = [score_of(name) for name in (*shares, "single", "classic")]
    low, high = min(shown), max(shown)
    if not low - (high - low) < worst < high + (high - low):  # it would flatten all others
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ax.grid(alpha=0.3)


def draw_cost(tasks: dict[str, dict[str, Any]]) -> Figure:
    """The gain over one network in accuracy and NLL against the time of a step, one column for each task."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(9.5, 4.6), layout="constrained")
        axes: Any = figure.subplots(2, len(tasks), sharex=True, squeeze=False)
        for column, (task, variants) in zip(axes.T, tasks.items(), strict=True):
            column[0].set_title(TASKS[task], fontsize=10)
            _cost(column[0], variants, "accuracy", 1)
            _cost(column[1], variants, "nll", -1)
        axes[0, 0].set_ylabel("accuracy gained")
        axes[1, 0].set_ylabel("NLL saved")
        figure.supxlabel("time of a step / that of one network on as many rows", fontsize=9)
        handles = {
            label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _cost(ax: Axes, variants: dict[str, Any], score: str, sign: int) -> None:
    """The mean gain over one network, with the quartiles of the time. What lies far below is drawn at the edge."""

    def gain_of(name: str) -> float:
        return sign * (mean(run[score] for run in variants[name]["runs"]) - one)

    one = mean(run[score] for run in variants["single"]["runs"])
    gains = {name: gain_of(name) for name in PRICED if name in variants}
    low, high = min(gain for gain in gains.values() if gain > -2 * max(gains.values())), max(gains.values())
    floor = low - 0.3 * (high - low)
    for name, gain in gains.items():
        text, colour, marker, face = PRICED[name]
        time = variants[name]["time of one network on as many rows"]
        ax.errorbar(
            time["median"],
            max(gain, floor),
            xerr=[[time["median"] - time["low"]], [time["high"] - time["median"]]],
            fmt=marker,
            color=colour,
            ecolor=(colour, 0.35),
            markerfacecolor=face,
            markersize=7,
            label=text,
            clip_on=False,
        )
        if gain < floor:
            at = (time["median"], floor)
            ax.annotate(f"↓{gain:.2f}", at, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(xlim=(0, 2), ylim=(floor, high + 0.15 * (high - low)), xticks=(0, 0.5, 1, 1.5, 2))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)


def _gain(ax: Axes, variants: dict[str, Any], score: str, label: str) -> None:
    """The mean `score` over the seeds against the parameters, both of the whole ensemble."""
    one = variants["single"]["parameters"]
    for name, (text, colour, marker) in VARIANTS.items():
        y = mean(run[score] for run in variants[name]["runs"])
        ax.plot(variants[name]["parameters"] / one, y, marker, color=colour, markersize=8, label=text, clip_on=False)
    ax.set(ylabel=label, xlim=(0.5, 5.5), xticks=range(1, 6))
    ax.margins(y=0.2)
    ax.grid(alpha=0.3)


def _times(ax: Axes, cases: dict[str, Any]) -> None:
    """The time of a step over that of the loop over modules, for both kinds of ensemble."""
    for shift, kind, colour in ((-0.2, "classic", BLUE), (0.2, "BatchEnsemble", ORANGE)):
        ratios = []
        for case in CASES:
            loop = cases[case][LOOP]["seconds"]["step"]
            ours = cases[case][f"{kind}, compiled"]["seconds"]["step"]
            ratios.append(median(a / b for a, b in zip(ours, loop, strict=True)))
        places = [row + shift for row in range(len(CASES))]
        name = "classic ensemble" if kind == "classic" else kind
        bars = ax.barh(places, ratios, height=0.38, color=colour, label=name, hatch="" if kind == "classic" else "///")
        for bar in bars:
            bar.set_edgecolor("white")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # covers the dashed line
        ax.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=7, bbox=behind)
    ax.axvline(1, color=GREY, linestyle="--", linewidth=1)
    ax.text(1, -0.62, "loop", ha="center", va="bottom", color=GREY)
    ax.set_yticks(range(len(CASES)), list(CASES.values()))
    ax.set(xlim=(0, 1.35), xlabel="time / that of a loop over modules", ylim=(len(CASES) - 0.4, -0.6))
    ax.set_title("Time of a training step\n2 CPU cores; shorter is better", fontsize=9, pad=16)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), frameon=False, fontsize=7.5, ncols=2)


def main(argv: list[str] | None = None) -> None:
    """Draw the pictures; those of the dial and of the costs are written beside `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "readme.png", metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    quality = {task: json.loads((RESULTS / f"quality-dial-{task}-cpu.json").read_text()) for task in TASKS}
    variants = {task: found["variants"] for task, found in quality.items()}
    speed = json.loads((RESULTS / "vmap_vs_be-cpu.json").read_text())
    for figure, file in (
        (draw(quality["cifar-mlp"], speed), args.out),
        (draw_dial(variants), args.out.with_name("dial.png")),
        (draw_cost(variants), args.out.with_name("cost_gain.png")),
    ):
        figure.savefig(file, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    main()
