"""Plots of an ensemble's calibration, selective accuracy, uncertainty and training.

Every function draws on `ax`, or on the axes of a new figure if it is None, and returns the axes. Tensors may be on any
device and may require gradients. matplotlib is imported by the first plot, not by this module; install it with
`pip install functorch_ens[plots]`. Without it a plot on new axes raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_ens.checks import (
    check_callable,
    check_has_values,
    check_mapping,
    check_option,
    check_positive_int,
    check_tensor,
    shown,
)
from functorch_ens.metrics import auroc, confidence_bins, selective_accuracy
from functorch_ens.uncertainty.logits import check_floating
from functorch_ens.uncertainty.measures import Uncertainty, classification_uncertainty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _DARK = "#4f86c0", "#d9822b", "#222222"


def reliability_diagram(logits: Tensor, y: Tensor, *, bins: int = 15, ax: Axes | None = None) -> Axes:
    """Plot accuracy against confidence, in bins; a calibrated ensemble lies on the diagonal.

    A wide bar is the accuracy of the inputs in its bin. The hatched area is the gap to their mean confidence. A narrow
    bar is the share of all inputs in the bin. The title is the expected calibration error.

    Args:
        logits: `[E, ..., C]`.
        y: `[...]`, the labels.
        bins: the number of bins, of equal width, as in `calibration_error`.
        ax: the axes to draw on.

    Returns: the axes.

    Raises:
        TypeError, ValueError: as `calibration_error`.
        ImportError: matplotlib is missing.

    Source: Guo et al. 2017, arXiv:1706.04599, figure 1.
    """
    _check(ax, logits=logits, y=y)
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
    """Plot the accuracy on the most certain inputs against the share of inputs answered, one line per ensemble.

    Args:
        curves: the logits of each ensemble, `[E, ..., C]`, by its name in the legend; `logits[None]` of one network.
        y: `[...]`, the labels.
        ax: the axes to draw on.

    Returns: the axes.

    Raises:
        TypeError: `curves` is not a mapping, or as `selective_accuracy`.
        ValueError: `curves` is empty, or as `selective_accuracy`.
        ImportError: matplotlib is missing.
    """
    check_mapping(curves, "curves", "logits by their names")
    if not curves:
        raise ValueError("curves: expected at least one ensemble, got none")
    _check(ax, y=y, **{f"curves[{name!r}]": logits for name, logits in curves.items()})
    found = {}
    for name, logits in curves.items():
        try:
            found[name] = selective_accuracy(logits, y)
        except (TypeError, ValueError) as error:
            raise type(error)(f"curves[{name!r}], {error}") from error
    ax = _axes(ax)
    for name, (coverage, accuracy) in found.items():
        ax.plot(_array(coverage), _array(accuracy), linewidth=1.8, label=f"{name} ({accuracy[-1].item():.1%} of all)")
    ax.set(xlim=(0, 1), xlabel="share of inputs answered, most certain first", ylabel="accuracy on them")
    ax.margins(y=0.08)
    ax.grid(alpha=0.3)
    ax.legend(loc="best", fontsize="small")
    return ax


def ood_histograms(inside: Tensor, outside: Tensor, *, ax: Axes | None = None) -> Axes:
    """Plot the histograms of a score, in and out of distribution; the title is the AUROC of telling them apart.

    Args:
        inside: `[M]`, the scores of in-distribution inputs, such as `classification_uncertainty(logits).epistemic`.
        outside: `[N]`, the scores of other inputs.
        ax: the axes to draw on.

    Returns: the axes, with a logarithmic share of inputs on the y axis.

    Raises:
        TypeError, ValueError: as `auroc`.
        ImportError: matplotlib is missing.
    """
    _check(ax, inside=inside, outside=outside)
    value = auroc(inside, outside).item()
    both = {"in distribution": (_array(inside), _BLUE), "out of distribution": (_array(outside), _ORANGE)}
    low, high = (end(end(scores) for scores, _ in both.values()) for end in (min, max))
    ax = _axes(ax)
    for name, (scores, colour) in both.items():
        weights = torch.full((len(scores),), 1 / len(scores)).numpy()
        shared: dict[str, Any] = {"bins": 40, "range": (low, high), "weights": weights, "color": colour}
        ax.hist(scores, histtype="stepfilled", alpha=0.35, label=name, **shared)
        ax.hist(scores, histtype="step", linewidth=1.5, **shared)
    # A log scale: most uncertainties are near 0, and the two histograms differ in their thin tails.
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
    """Plot an uncertainty over a plane of inputs as colour, with `points` on top.

    Args:
        predict: maps inputs `[N, 2]`, in the dtype and on the device of `points`, to logits `[E, N, C]`. It runs under
            torch.no_grad.
        points: `[M, 2]`, inputs such as the training data. The plane extends beyond them by a quarter on each side.
        labels: `[M]`, the classes of `points`, integers, drawn as colours.
        measure: `"total"`, `"aleatoric"` or `"epistemic"`, in nats.
        resolution: the number of inputs along each side of the plane, at least 2.
        ax: the axes to draw on.

    Returns: the axes; their figure has a colour bar.

    Raises:
        TypeError, ValueError: an argument is not as above, or `predict` returns bad logits or another number of inputs.
        ImportError: matplotlib is missing.
    """
    check_callable(predict, "predict", "a function from inputs [N, 2] to logits [E, N, C]", ["inputs"])
    _check(ax, points=points, **({} if labels is None else {"labels": labels}))
    check_option(measure, Uncertainty._fields, "measure")
    if check_positive_int(resolution, "resolution") < 2:
        raise ValueError("resolution: expected at least 2 inputs along a side, got 1")
    check_floating(points, "points")
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points: expected [M, 2], at least one, got shape {list(points.shape)}")
    if not bool(points.detach().isfinite().all()):
        raise ValueError("points: expected finite numbers, got nan or inf")
    if labels is not None:
        check_tensor(labels, "labels", "a tensor of classes")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels: expected classes of an integer dtype, got {labels.dtype}")
        if labels.shape != points.shape[:1]:
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
    check_tensor(logits, "predict: what it returns", "logits [E, N, C]")
    values = getattr(classification_uncertainty(logits), measure)
    if values.shape != plane.shape[:1]:
        raise ValueError(f"predict: expected logits [E, {len(plane)}, C], got shape {list(logits.shape)}")
    ax = _axes(ax)
    x, z = (_array(side) for side in sides)
    height = _array(values).reshape(len(x), len(z)).T
    top = max(height.max(), 1e-6)  # the epistemic uncertainty of one network is 0 everywhere
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
    """Plot the loss of every member by epoch, and their mean.

    Args:
        losses: `[epochs, E]`, such as the stacked losses of a train step.
        ax: the axes to draw on.

    Returns: the axes.

    Raises:
        TypeError: `losses` is not a floating tensor.
        ValueError: `losses` has another shape, or is empty.
        ImportError: matplotlib is missing.
    """
    _check(ax, losses=losses)
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


def _check(ax: Any, **tensors: Any) -> None:
    """TypeError if `ax` is neither None nor axes; ValueError where one of `tensors` is on the meta device."""
    # matplotlib is not imported for the check; the array of axes that plt.subplots(1, 2) returns has no method `plot`.
    if ax is not None and (isinstance(ax, type) or not (hasattr(ax, "plot") and hasattr(ax, "set"))):
        raise TypeError(f"ax: expected the axes of a figure or None, got {shown(ax)}")
    for argument, tensor in tensors.items():
        if isinstance(tensor, Tensor):  # the other checks of it come later
            check_has_values(tensor, argument)


def _axes(ax: Axes | None) -> Axes:
    """Return `ax`, or the axes of a new figure if it is None."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("matplotlib is missing, which draws the plots: pip install functorch_ens[plots]") from error
    return plt.subplots(layout="constrained")[1]


def _array(tensor: Tensor) -> Any:
    """Convert `tensor` to a NumPy array of float64: NumPy has no bfloat16."""
    return tensor.detach().cpu().double().numpy()
