"""The plots draw the values of the metrics on the given axes, and change no global state of matplotlib."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from oracle import assert_untouched, snapshot
from torch import Tensor

from functorch_ens import plots
from functorch_ens.metrics import auroc, calibration_error, confidence_bins, selective_accuracy
from functorch_ens.uncertainty.measures import Uncertainty, classification_uncertainty

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def _axes() -> Axes:
    return Figure().subplots()


def _render(ax: Axes) -> None:
    """Render to a PNG: some errors of matplotlib appear only then."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(io.BytesIO())


def _labelled() -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(3, 200, 4)
    return logits, torch.randint(4, (200,))


def _predict(x: Tensor) -> Tensor:
    """Logits of three members, `[3, N, 2]`, which depend on both columns of x in different ways."""
    return torch.stack([torch.stack([x[:, 0] * (i - 1), x[:, 1] * 0.5], -1) for i in range(3)])


def _drawn() -> dict[str, Any]:
    logits, y = _labelled()
    score = classification_uncertainty(logits).total
    return {
        "reliability_diagram": partial(plots.reliability_diagram, logits, y),
        "selective_accuracy_curve": partial(plots.selective_accuracy_curve, {"all": logits, "one": logits[:1]}, y),
        "ood_histograms": partial(plots.ood_histograms, score, score + 0.1),
        "uncertainty_plane": partial(plots.uncertainty_plane, _predict, torch.randn(20, 2), resolution=5),
        "training_curves": partial(plots.training_curves, torch.rand(7, 3)),
    }


@pytest.mark.parametrize("name", _drawn())
def test_draws_on_the_given_axes_or_on_new_ones(name: str) -> None:
    draw = _drawn()[name]
    settings, backend = copy.deepcopy(dict(matplotlib.rcParams)), matplotlib.get_backend()
    ax = _axes()
    assert draw(ax=ax) is ax and not plt.get_fignums()
    new = draw()
    assert isinstance(new, Axes) and new is not ax and plt.get_fignums() == [1]
    assert draw() is not new  # another new figure
    for each in (ax, new):
        _render(each)
        assert each.get_xlabel() and each.get_ylabel()
    assert dict(matplotlib.rcParams) == settings and matplotlib.get_backend() == backend


@pytest.mark.parametrize("name", _drawn())
def test_takes_tensors_with_gradients_in_half_precision_and_leaves_them(name: str) -> None:
    draw = _drawn()[name]
    tensors: list[Tensor] = []

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            tensors.append(value.bfloat16().requires_grad_())
            return tensors[-1]
        return {key: changed(each) for key, each in value.items()} if isinstance(value, dict) else value

    arguments = [changed(value) for value in draw.args]
    before = snapshot(tensors)
    draw.func(*arguments, **draw.keywords, ax=_axes())
    assert_untouched(before, tensors)
    assert tensors and all(tensor.grad is None for tensor in tensors)


@pytest.mark.parametrize("name", _drawn())
def test_without_matplotlib_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install functorch_ens\[plots\]"):
        _drawn()[name]()


def test_the_module_imports_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import functorch_ens.plots"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reliability_diagram_shows_the_bins() -> None:
    logits, y = _labelled()
    ax = plots.reliability_diagram(logits, y, bins=5, ax=_axes())
    inputs, hits, confidence = (each.numpy() for each in confidence_bins(logits, y, bins=5))
    used = np.flatnonzero(inputs)
    assert 0 < len(used) < 5
    wide, gap, narrow = (_bars(container) for container in ax.containers)
    np.testing.assert_allclose(wide[:, 0], used / 5, atol=1e-6)
    np.testing.assert_allclose(wide[:, 3], hits[used] / inputs[used], rtol=1e-6)
    np.testing.assert_allclose(gap[:, 1] + gap[:, 3], confidence[used] / inputs[used], rtol=1e-6)
    np.testing.assert_allclose(narrow[:, 3], inputs / 200, rtol=1e-6)
    np.testing.assert_allclose(narrow[:, 0] + narrow[:, 2] / 2, np.arange(5) / 5 + 0.1, rtol=1e-6)
    assert ax.get_title() == f"ECE {calibration_error(logits, y, bins=5).item():.2%}"


def _bars(container: Any) -> Any:
    """The left edge, bottom, width and height of each bar, `[bars, 4]`."""
    bars: list[Rectangle] = list(container.patches)
    return np.array([[bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()] for bar in bars])


def test_the_selective_curves_are_those_of_the_metric() -> None:
    logits, y = _labelled()
    ax = plots.selective_accuracy_curve({"all": logits, "one": logits[:1]}, y, ax=_axes())
    for line, some, name in zip(ax.lines, (logits, logits[:1]), ("all", "one"), strict=True):
        want = selective_accuracy(some, y)
        np.testing.assert_allclose(np.asarray(line.get_xydata()), torch.stack(want, -1).numpy(), rtol=1e-6)
        assert line.get_label() == f"{name} ({want.accuracy[-1].item():.1%} of all)"


def test_the_histograms_are_of_shares_on_common_bins() -> None:
    inside, outside = torch.randn(100), torch.randn(50) + 1
    ax = plots.ood_histograms(inside, outside, ax=_axes())
    assert ax.get_title() == f"AUROC {auroc(inside, outside).item():.3f}"
    both = torch.cat([inside, outside])
    edges = np.linspace(both.min().item(), both.max().item(), 41)
    patches: Any = ax.patches
    for scores, patch in ((inside, patches[0]), (outside, patches[2])):
        corners = np.asarray(patch.get_xy())
        np.testing.assert_allclose(np.unique(corners[:, 0]), edges, rtol=1e-9)
        share, _ = np.histogram(scores.numpy().astype(float), edges)
        assert corners[:, 1].max() == pytest.approx(share.max() / len(scores))
    _render(plots.ood_histograms(torch.zeros(3), torch.zeros(3), ax=_axes()))


@pytest.mark.parametrize("measure", Uncertainty._fields)
def test_the_plane_shows_the_measure_where_it_is(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    contourf = Axes.contourf

    def recorded(ax: Axes, *args: Any, **kwargs: Any) -> Any:
        drawn.append(args)
        return contourf(ax, *args, **kwargs)

    monkeypatch.setattr(Axes, "contourf", recorded)
    points, labels = torch.tensor([[0.0, 2.0], [4.0, 3.0], [1.0, 2.5]]).double(), torch.tensor([0, 1, 12])
    ax = plots.uncertainty_plane(_predict, points, labels, measure=measure, resolution=7, ax=_axes())
    ((x, z, height),) = drawn
    assert (x.min(), x.max(), z.min(), z.max()) == (-1, 5, 1.75, 3.25)  # a quarter of the extent on each side
    assert height.shape == (7, 7)
    for i, j in ((0, 3), (5, 2), (6, 6)):
        at = torch.tensor([[x[i], z[j]]])
        assert height[j, i] == pytest.approx(getattr(classification_uncertainty(_predict(at)), measure).item())
    scattered: Any = ax.collections[-1]
    np.testing.assert_allclose(np.asarray(scattered.get_offsets()), points.numpy())
    assert ax.figure.axes[-1].get_ylabel() == f"{measure} uncertainty (nats)"
    _render(ax)
    colours = scattered.get_facecolor()
    assert [tuple(colour) for colour in colours] == [to_rgba(f"C{label}") for label in labels.tolist()]


def test_the_plane_of_one_network_and_of_one_point() -> None:
    """Both the range of the uncertainty and that of the points are empty."""
    ax = plots.uncertainty_plane(lambda x: _predict(x)[2:], torch.ones(1, 2), resolution=3, ax=_axes())
    _render(ax)
    assert ax.get_xlim()[0] < 1 < ax.get_xlim()[1]


def test_the_training_curves_are_the_losses_and_their_mean() -> None:
    losses = torch.rand(7, 3)
    ax = plots.training_curves(losses, ax=_axes())
    *members, mean = ax.lines
    assert len(members) == 3
    for i, line in enumerate(members):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), losses[:, i].numpy())
    np.testing.assert_allclose(np.asarray(mean.get_ydata()), losses.mean(1).numpy(), rtol=1e-6)
    assert list(np.asarray(mean.get_xdata())) == list(range(1, 8))


def test_bad_arguments_are_named_and_no_figure_is_opened() -> None:
    logits, y = _labelled()
    points, unfit = torch.randn(5, 2), cast(Any, [1.0])
    for call, error, message in (
        (partial(plots.reliability_diagram, logits[0], y), ValueError, r"logits: .*logits\[None\]"),
        (partial(plots.reliability_diagram, unfit, y), TypeError, "logits: expected a floating tensor, got list"),
        (partial(plots.reliability_diagram, logits, y[1:]), ValueError, r"y: .*\[200\], got \[199\]"),
        (partial(plots.reliability_diagram, logits, y, bins=0), ValueError, "bins: expected a positive int"),
        (partial(plots.selective_accuracy_curve, unfit, y), TypeError, "curves: expected logits by their names, got"),
        (partial(plots.selective_accuracy_curve, {}, y), ValueError, "curves: expected at least one ensemble"),
        (partial(plots.selective_accuracy_curve, {"a": unfit}, y), TypeError, "logits: expected a floating tensor"),
        (partial(plots.ood_histograms, points, points[:, 0]), ValueError, r"inside: .*got shape \[5, 2\]"),
        (partial(plots.uncertainty_plane, _predict, points[:, :1]), ValueError, r"points: expected \[M, 2\].*\[5, 1\]"),
        (partial(plots.uncertainty_plane, _predict, points, y), ValueError, r"labels: .*5 points, got shape \[200\]"),
        (partial(plots.uncertainty_plane, _predict, points, measure="sum"), ValueError, "measure: .*got 'sum'"),
        (partial(plots.uncertainty_plane, _predict, points, resolution=1), ValueError, "resolution: .*, got 1"),
        (
            partial(plots.uncertainty_plane, lambda x: _predict(x)[:, 1:], points, resolution=3),
            ValueError,
            r"predict: expected logits \[E, 9, C\], got shape \[3, 8, 2\]",
        ),
        (partial(plots.uncertainty_plane, lambda x: x, points), ValueError, r"logits: .*got shape \[10000, 2\]"),
        (partial(plots.training_curves, points[0]), ValueError, r"losses: expected \[epochs, E\].*\[2\]"),
        (partial(plots.training_curves, points[:0]), ValueError, r"losses: .*at least one of each, got shape \[0, 2\]"),
        (partial(plots.training_curves, y[None]), TypeError, "losses: expected a floating tensor"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not plt.get_fignums()
