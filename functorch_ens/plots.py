"""Pictures of an ensemble's calibration, abstention, uncertainty and training, each drawn on matplotlib axes.

matplotlib is imported when a picture is drawn; it comes with `pip install functorch_ens[plots]`. Every function draws
on `ax`, or on the axes of a new figure, and returns them. Tensors may be on any device, and have gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_ens.checks import check_option, check_positive_int
from functorch_ens.metrics import auroc, confidence_bins, selective_accuracy
from functorch_ens.uncertainty.logits import check_floating
from functorch_ens.uncertainty.measures import Uncertainty, classification_uncertainty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _DARK = "#4f86c0", "#d9822b", "#222222"


def reliability_diagram(logits: Tensor, y: Tensor, *, bins: int = 15, ax: Axes | None = None) -> Axes:
    """How often the ensemble is right, by how confident it is; a calibrated one is on the diagonal.

    Wide bars are the accuracy of the inputs in a bin, what is between it and their mean confidence is hatched, and the
    narrow bars are the share of all inputs in each bin. The title has the expected calibration error.

    Args:
        logits: of the members, `[E, ..., C]`.
        y: the classes, `[...]`.
        bins: of equal width, as in `calibration_error`.
        ax: where to draw.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: as `calibration_error`.

    Source: Guo et al. 2017, arXiv:1706.04599, figure 1.
    """
    counts = confidence_bins(logits, y, bins=bins)
    inputs, hits, confidence = (_array(each) for each in counts)
    used = inputs > 0
    edges = [i / bins for i in range(bins + 1)]
    left = torch.tensor(edges[:-1]).numpy()[used]
    right, sure = hits[used] / inputs[used], confidence[used] / inputs[used]
    error = abs(hits - confidence).sum() / inputs.sum()
    ax = _axes(ax)
    options: dict[str, Any] = {"width": 1 / bins, "align": "edge"}
    ax.bar(left, right, color=_BLUE, alpha=0.85, edgecolor="white", linewidth=0.8, label="accuracy", **options)
    ax.bar(
        left,
        sure - right,
        bottom=right,
        facecolor="none",
        edgecolor=_ORANGE,
        hatch="////",
        linewidth=0.8,
        label="gap to the confidence",
        **options,
    )
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    centres = [edge + 0.5 / bins for edge in edges[:-1]]
    ax.bar(centres, inputs / inputs.sum(), width=0.3 / bins, color=_DARK, label="share of inputs")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"ECE {error:.2%}")
    ax.set_aspect("equal")
    ax.legend(loc="upper left", fontsize="small")
    return ax


def selective_accuracy_curve(curves: Mapping[str, Tensor], y: Tensor, *, ax: Axes | None = None) -> Axes:
    """The accuracy on the most certain share of the inputs, for every share, a line for each of `curves`.

    Args:
        curves: by the name for the legend, the logits of an ensemble, `[E, ..., C]`; one network's are `logits[None]`.
        y: the classes, `[...]`.
        ax: where to draw.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: `curves` is no mapping or is empty, or as `selective_accuracy`.
    """
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves: expected logits by their names, got {type(curves).__name__}")
    if not curves:
        raise ValueError("curves: expected at least one ensemble, got none")
    found = {name: selective_accuracy(logits, y) for name, logits in curves.items()}
    ax = _axes(ax)
    for name, (coverage, accuracy) in found.items():
        ax.plot(_array(coverage), _array(accuracy), linewidth=1.8, label=f"{name} ({accuracy[-1].item():.1%} of all)")
    ax.set(xlim=(0, 1), xlabel="share of inputs answered, most certain first", ylabel="accuracy on them")
    ax.margins(y=0.08)
    ax.grid(alpha=0.3)
    ax.legend(loc="best", fontsize="small")
    return ax


def ood_histograms(inside: Tensor, outside: Tensor, *, ax: Axes | None = None) -> Axes:
    """A score's histograms over inputs such as in training and over others; the title has the AUROC of telling them.

    Args:
        inside: the scores of inputs such as in training, `[M]`, such as `classification_uncertainty(logits).epistemic`.
        outside: those of other inputs, `[N]`.
        ax: where to draw.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: as `auroc`.
    """
    value = auroc(inside, outside).item()
    both = {"in distribution": (_array(inside), _BLUE), "out of distribution": (_array(outside), _ORANGE)}
    low, high = (end(end(scores) for scores, _ in both.values()) for end in (min, max))
    ax = _axes(ax)
    for name, (scores, colour) in both.items():
        weights = torch.full((len(scores),), 1 / len(scores)).numpy()
        shared: dict[str, Any] = {"bins": 40, "range": (low, high), "weights": weights, "color": colour}
        ax.hist(scores, histtype="stepfilled", alpha=0.35, label=name, **shared)
        ax.hist(scores, histtype="step", linewidth=1.5, **shared)
    # Uncertainties are mostly near 0: what matters is in the thin tails.
    ax.set(xlabel="score", ylabel="share of inputs (log)", yscale="log", title=f"AUROC {value:.3f}")
    ax.legend(fontsize="small")
    return ax


def uncertainty_plane(
    predict: Callable[[Tensor], Tensor],
    points: Tensor,
    labels: Tensor | None = None,
    *,
    measure: str = "epistemic",
    resolution: int = 100,
    ax: Axes | None = None,
) -> Axes:
    """Where in the plane an ensemble is uncertain: a measure of it as colour, around and below `points`.

    Args:
        predict: from inputs `[N, 2]`, with the dtype and device of `points`, to logits `[E, N, C]`.
        points: inputs, such as the training data, `[M, 2]`.
        labels: their classes, `[M]`, shown as colours.
        measure: `"total"`, `"aleatoric"` or `"epistemic"`.
        resolution: the number of inputs along each side.
        ax: where to draw.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: an argument is not as above, or `predict` returns other logits.
    """
    check_option(measure, Uncertainty._fields, "measure")
    if check_positive_int(resolution, "resolution") < 2:
        raise ValueError("resolution: expected at least 2 inputs along a side, got 1")
    check_floating(points, "points")
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points: expected [M, 2], at least one, got shape {list(points.shape)}")
    if labels is not None and labels.shape != points.shape[:1]:
        raise ValueError(f"labels: expected one for each of {len(points)} points, got shape {list(labels.shape)}")
    points = points.detach()
    low, high = points.amin(0), points.amax(0)
    margin = 0.25 * (high - low).clamp(min=1e-3 * high.abs().max().item() + 1e-6)
    sides = [
        torch.linspace(a, b, resolution, dtype=points.dtype, device=points.device)
        for a, b in zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
    ]
    plane = torch.cartesian_prod(*sides)
    with torch.no_grad():
        logits = predict(plane)
    values = getattr(classification_uncertainty(logits), measure)
    if values.shape != plane.shape[:1]:
        raise ValueError(f"predict: expected logits [E, {len(plane)}, C], got shape {list(logits.shape)}")
    ax = _axes(ax)
    x, z = (_array(side) for side in sides)
    height = _array(values).reshape(len(x), len(z)).T
    top = max(height.max(), 1e-6)  # of one network the epistemic uncertainty is 0 everywhere
    levels = torch.linspace(0, top, 21, dtype=torch.float64).tolist()
    filled = ax.contourf(x, z, height, levels=levels, cmap="BuPu")
    ax.figure.colorbar(filled, ax=ax, label=f"{measure} uncertainty (nats)", format="%.2f")
    colours: dict[str, Any] = (
        {"color": "white"} if labels is None else {"c": _array(labels) % 10, "cmap": "tab10", "vmin": 0, "vmax": 9}
    )
    at = _array(points)
    ax.scatter(at[:, 0], at[:, 1], s=16, edgecolors="black", linewidths=0.5, **colours)
    ax.set(xlabel="$x_0$", ylabel="$x_1$")
    return ax


def training_curves(losses: Tensor, *, ax: Axes | None = None) -> Axes:
    """The loss of every member at every epoch, a line for each, and their mean.

    Args:
        losses: `[epochs, E]`, such as the stacked results of a train step.
        ax: where to draw.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: `losses` is not a floating tensor of that shape, or is empty.
    """
    check_floating(losses, "losses")
    if losses.ndim != 2 or not losses.numel():
        raise ValueError(f"losses: expected [epochs, E], at least one of each, got shape {list(losses.shape)}")
    values = _array(losses)
    epochs = range(1, len(values) + 1)
    ax = _axes(ax)
    from matplotlib.ticker import MaxNLocator

    lines = ax.plot(epochs, values, color=_BLUE, alpha=0.45, linewidth=1)
    lines[0].set_label("1 member" if values.shape[1] == 1 else f"{values.shape[1]} members")
    ax.plot(epochs, values.mean(1), color="black", linewidth=2, label="mean")
    ax.set(xlabel="epoch", ylabel="loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    """`ax`, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("matplotlib is missing, which draws the plots: pip install functorch_ens[plots]") from error
    return plt.subplots(layout="constrained")[1]


def _array(tensor: Tensor) -> Any:
    """`tensor` as NumPy's, of float64, which has bfloat16's values too."""
    return tensor.detach().cpu().double().numpy()
