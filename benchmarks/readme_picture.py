"""Draw the picture of README.md from results/*.json: what an ensemble gains for its size, and the time of its steps.

    python benchmarks/readme_picture.py

Both files of results are written by quality.py and vmap_vs_be.py.
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
GREY, BLUE, ORANGE, GREEN = "#666666", "#0072B2", "#D55E00", "#009E73"

VARIANTS = {  # name in the results: (label, colour, marker)
    "single": ("one network", GREY, "o"),
    "classic": ("classic ensemble", BLUE, "s"),
    "r, s": ("BatchEnsemble", ORANGE, "^"),
    "own order, fixed": ("BatchEnsemble, README's recipe", GREEN, "D"),
}
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
    """Draw the picture and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "readme.png", metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    quality = json.loads((RESULTS / "quality-cifar-mlp-cpu.json").read_text())
    speed = json.loads((RESULTS / "vmap_vs_be-cpu.json").read_text())
    figure = draw(quality, speed)
    figure.savefig(args.out, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
