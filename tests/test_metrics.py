"""The metrics equal those of NumPy, SciPy, scikit-learn and torchmetrics, eager, compiled and under vmap."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
import torch.nn.functional as F
from cases import labelled, randn
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import assert_same, assert_untouched, compile_whole, snapshot
from torch import Tensor
from torch.func import grad, vmap

from functorch_ens.metrics import (
    accuracy,
    auroc,
    brier,
    calibration_error,
    confidence_bins,
    gaussian_nll,
    nll,
    selective_accuracy,
)
from functorch_ens.uncertainty.measures import classification_uncertainty, mean_probs
from functorch_ens.uncertainty.temperature import fit_temperature

OF_LABELS: dict[str, Any] = {
    function.__name__: function for function in (nll, brier, accuracy, calibration_error, selective_accuracy)
}


def _probabilities(logits: Tensor) -> Any:
    """The mean probabilities by SciPy, `[N, C]`."""
    return scipy.special.softmax(logits.numpy(), axis=-1).mean(0).reshape(-1, logits.shape[-1])


def _stacked(results: list[Any]) -> Any:
    """One pytree whose leaves are the stacked leaves of `results`."""
    return torch.utils._pytree.tree_map(lambda *values: torch.stack(values), *results)


def _close(got: Tensor, want: Any) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-10, atol=1e-12)


@given(case=labelled())
def test_nll_brier_and_accuracy_are_numpys(case: tuple[Tensor, Tensor]) -> None:
    logits, y = case
    q, labels = _probabilities(logits), y.numpy().reshape(-1)
    _close(nll(logits, y), -np.log(q[np.arange(len(q)), labels]).mean())
    _close(brier(logits, y), ((q - np.eye(q.shape[1])[labels]) ** 2).sum(-1).mean())
    _close(accuracy(logits, y), sklearn.metrics.accuracy_score(labels, q.argmax(-1)))


@given(case=labelled(), bins=st.integers(1, 20))
def test_the_calibration_error_is_torchmetrics(case: tuple[Tensor, Tensor], bins: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, y = case[0].float(), case[1]  # torchmetrics converts to float32
    q = mean_probs(logits).flatten(0, -2)
    assume((q < 1).all())  # torchmetrics puts a confidence of 1 into one more bin
    want = functional.multiclass_calibration_error(q, y.flatten().long(), q.shape[1], n_bins=bins)
    torch.testing.assert_close(calibration_error(logits, y, bins=bins), want, rtol=0, atol=1e-6)


@given(case=labelled(), bins=st.integers(1, 20))
def test_the_calibration_error_is_that_of_a_loop_over_the_bins(case: tuple[Tensor, Tensor], bins: int) -> None:
    logits, y = case
    q, labels = _probabilities(logits), y.numpy().reshape(-1)
    sure, right = q.max(-1), q.argmax(-1) == labels
    got, error = confidence_bins(logits, y, bins=bins), 0.0
    for i in range(bins):
        inside = (sure >= i / bins) & ((sure < (i + 1) / bins) | (i == bins - 1))
        _close(got.inputs[i], inside.sum())
        _close(got.hits[i], right[inside].sum())
        _close(got.confidence[i], sure[inside].sum())
        error += abs(right[inside].sum() - sure[inside].sum()) / len(q)
    _close(calibration_error(logits, y, bins=bins), error)


def test_an_input_on_an_edge_is_in_the_bin_above_and_a_certain_one_in_the_last() -> None:
    odds = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, 1e4]], dtype=torch.float64)
    inputs = confidence_bins(odds[None], torch.tensor([0, 1, 1]), bins=4).inputs
    assert inputs.tolist() == [0, 0, 1, 2]


@given(E=st.integers(1, 4), B=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_gaussian_nll_is_that_of_scipys_mixture(E: int, B: int, seed: int) -> None:
    torch.manual_seed(seed)
    outputs, y = randn(E, B, 2), randn(B)
    density = scipy.stats.norm.pdf(y.numpy(), outputs[..., 0].numpy(), np.exp(0.5 * outputs[..., 1].numpy()))
    _close(gaussian_nll(outputs, y), -np.log(density.mean(0)).mean())
    one = torch.nn.GaussianNLLLoss(full=True, eps=1e-12)(outputs[0, :, 0], y, outputs[0, :, 1].exp())
    _close(gaussian_nll(outputs[:1], y), one)


@pytest.mark.parametrize("log_variance", [-5000.0, -280.0, -120.0, -89.0, 0.0, 89.0, 120.0, 5000.0])
@pytest.mark.parametrize("distance", [0.0, 1e-45, 1e-30, 1e-15, 0.1, 1e12])
@pytest.mark.parametrize("other", [None, 1.0, -100.0, 100.0])
def test_a_density_in_float32_is_that_of_more_digits(log_variance: float, distance: float, other: float | None) -> None:
    """Far log variances: the exponential of their negative is not finite in float32, and the density often is."""
    log_variances = [log_variance] if other is None else [log_variance, other]
    outputs = torch.tensor([[[0.0, each]] for each in log_variances], requires_grad=True)
    y = torch.tensor([distance])
    got = gaussian_nll(outputs, y)
    slopes = torch.autograd.grad(got, outputs)[0][:, 0]
    assert not slopes.isnan().any()
    # A square of less than 1e-700 or more than 1e700 is 0 or too much, in float32 too.
    logarithm = [2 * math.log(y.item()) - each if y.item() else -math.inf for each in log_variances]
    squares = [math.exp(min(each, 700)) for each in logarithm]
    densities = np.array([-0.5 * (a + b + math.log(2 * math.pi)) for a, b in zip(squares, log_variances, strict=True)])
    want = math.log(len(densities)) - scipy.special.logsumexp(densities)
    if want > 3.4e38:
        assert got.item() == math.inf
        return
    assert got.item() == pytest.approx(want, rel=1e-4)
    weights = scipy.special.softmax(densities)
    assert slopes[:, 1].tolist() == pytest.approx(list(weights * (1 - np.array(squares)) / 2), rel=1e-3, abs=1e-6)
    rates = [math.exp(min(0.5 * (a - b), 700)) for a, b in zip(logarithm, log_variances, strict=True)]
    for got_slope, weight, rate in zip(slopes[:, 0].tolist(), weights, rates, strict=True):
        if weight * rate < 3e38:
            assert got_slope == pytest.approx(-weight * rate, rel=1e-3, abs=1e-6)


def test_scores_of_half_precision_are_of_float32() -> None:
    logits, y = torch.randn(3, 8, 4).bfloat16(), torch.randint(4, (8,))
    for function in OF_LABELS.values():
        assert_same(function(logits, y), function(logits.float(), y), tolerance=0)
    assert_same(gaussian_nll(logits[..., :2], y.half()), gaussian_nll(logits[..., :2].float(), y.float()), tolerance=0)


def test_extreme_logits_are_exact() -> None:
    logits, y = torch.tensor([[[0.0, 1e4]], [[0.0, 2e4]]]), torch.tensor([0])
    assert nll(logits, y).item() == pytest.approx(1e4 + math.log(2), rel=1e-6)
    assert brier(logits, y).item() == 2 and accuracy(logits, y).item() == 0 and calibration_error(logits, y).item() == 1
    assert nll(torch.tensor([[[0.0, -math.inf]]]), torch.tensor([1])).item() == math.inf


@pytest.mark.parametrize("function", [nll, brier])
def test_gradients_are_those_of_the_plain_formulas(function: Any) -> None:
    logits, y = randn(3, 5, 4), torch.randint(4, (5,))

    def plain(logits: Tensor) -> Tensor:
        q = logits.softmax(-1).mean(0)
        if function is nll:
            return F.nll_loss(q.log(), y)
        return (q - F.one_hot(y, 4)).square().sum(-1).mean()

    assert_same(grad(lambda x: function(x, y))(logits), grad(plain)(logits))
    assert torch.autograd.gradcheck(lambda x: function(x, y), logits.requires_grad_())
    outputs, target = randn(3, 5, 2).requires_grad_(), randn(5).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_nll, (outputs, target))


@given(
    scores=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_selective_accuracy_is_the_mean_over_all_orders_of_ties(scores: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    logits, y = randn(2, len(scores), 3), torch.randint(3, (len(scores),))
    right = _probabilities(logits).argmax(-1) == y.numpy()
    curves = [
        np.cumsum(right[list(order)]) / np.arange(1, len(scores) + 1)
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order))
    ]
    got = selective_accuracy(logits, y, score=torch.tensor(scores).double())
    _close(got.accuracy, np.mean(curves, axis=0))
    _close(got.coverage, np.arange(1, len(scores) + 1) / len(scores))
    order = torch.randperm(len(scores))
    again = selective_accuracy(logits[:, order], y[order], score=torch.tensor(scores).double()[order])
    assert_same(again, got)


@given(case=labelled())
def test_selective_accuracy_starts_with_the_most_certain_and_ends_with_all(case: tuple[Tensor, Tensor]) -> None:
    logits, y = case
    got = selective_accuracy(logits, y)
    assert_same(got, selective_accuracy(logits, y, score=classification_uncertainty(logits).total))
    _close(got.accuracy[-1], accuracy(logits, y))
    q = _probabilities(logits)
    entropy = scipy.stats.entropy(q, axis=-1)
    first = entropy.argmin()
    if np.sum(entropy < entropy[first] + 1e-9) == 1:
        assert got.accuracy[0].item() == (q[first].argmax() == y.flatten()[first].item())


@given(
    inside=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    outside=st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_auroc_is_scikit_learns_and_counts_the_pairs(inside: list[int], outside: list[int]) -> None:
    got = auroc(torch.tensor(inside).double(), torch.tensor(outside).double())
    labels = [0] * len(inside) + [1] * len(outside)
    _close(got, sklearn.metrics.roc_auc_score(labels, inside + outside))
    _close(got, np.mean([(b > a) + 0.5 * (b == a) for a in inside for b in outside]))


def test_auroc_of_many_and_of_mixed_dtypes() -> None:
    inside, outside = torch.randn(300_000), torch.randn(200_000, 2).double()[:, 0] + 1
    got = auroc(inside, outside)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(scipy.stats.norm.cdf(1 / math.sqrt(2)), abs=3e-3)
    assert auroc(inside.bfloat16(), inside.bfloat16()).item() == 0.5


@pytest.mark.parametrize("name", OF_LABELS)
def test_compiled_and_by_vmap_as_eager(name: str) -> None:
    function: Any = OF_LABELS[name]
    logits, y = randn(3, 7, 4), torch.randint(4, (7,), dtype=torch.int32)
    assert_same(compile_whole(function)(logits, y), function(logits, y))
    each = [function(one[None], y) for one in logits]
    assert_same(vmap(lambda one: function(one[None], y))(logits), _stacked(each))
    many = torch.randint(4, (3, 7))
    each = [function(one[None], labels) for one, labels in zip(logits, many, strict=True)]
    assert_same(vmap(lambda one, labels: function(one[None], labels))(logits, many), _stacked(each))
    if name in ("nll", "brier"):
        slope: Any = grad(partial(function, y=y))
        assert_same(compile_whole(slope)(logits), slope(logits))


def test_what_takes_no_labels_compiled_and_by_vmap_as_eager() -> None:
    inside, outside = randn(3, 8), randn(3, 9).T.contiguous().T
    want = torch.stack([auroc(a, b) for a, b in zip(inside, outside, strict=True)])
    assert_same(vmap(auroc)(inside, outside), want)
    assert_same(compile_whole(auroc)(inside[0], outside[0]), want[0])
    outputs, y = randn(4, 3, 7, 2), randn(7)
    want = torch.stack([gaussian_nll(one, y) for one in outputs])
    assert_same(vmap(gaussian_nll, in_dims=(0, None))(outputs, y), want)
    assert_same(compile_whole(gaussian_nll)(outputs[0], y), want[0])


def test_arguments_are_untouched() -> None:
    everything = logits, y, score = randn(3, 5, 4), torch.randint(4, (5,), dtype=torch.int16), randn(5)
    before = snapshot(everything)
    for function in OF_LABELS.values():
        function(logits, y)
    selective_accuracy(logits, y, score=score)
    auroc(score, score)
    gaussian_nll(logits[..., :2], score)
    assert_untouched(before, everything)


@pytest.mark.parametrize("name", [*OF_LABELS, "fit_temperature"])
def test_bad_logits_and_labels_are_named(name: str) -> None:
    function = {**OF_LABELS, "fit_temperature": fit_temperature}[name]
    logits, y = torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.long)
    for bad, error, message in (
        (logits[0], ValueError, r"logits: .*logits\[None\]; got shape \[4, 5\]"),
        (logits.long(), TypeError, "logits: expected a floating tensor, got one of torch.int64"),
        (torch.full((3, 4, 5), math.nan), ValueError, r"logits: .*nan in the members \[0, 1, 2\]"),
    ):
        with pytest.raises(error, match=message):
            function(bad, y)
    numbers: Any = [0, 0, 0, 0]
    for bad, error, message in (
        (numbers, TypeError, "y: expected a tensor of classes, got list"),
        (y.float(), TypeError, "y: expected classes of an integer dtype, got torch.float32"),
        (y.bool(), TypeError, "y: expected classes of an integer dtype, got torch.bool"),
        (y[:3], ValueError, r"y: .*logits \[3, 4, 5\], a tensor of shape \[4\], got \[3\]"),
        (torch.zeros(3, 4, dtype=torch.long), ValueError, r"y: .*shape \[4\], got \[3, 4\]"),
        (y + 5, ValueError, "y: expected classes from 0 to 4, of 5, got 5"),
        (y - 100, ValueError, "y: expected classes from 0 to 4, of 5, got -100"),
        (y.to("meta"), ValueError, "y: expected the device of the logits, cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            function(logits, bad)


def test_other_bad_arguments_are_named() -> None:
    half, one = cast(Any, 1.5), cast(Any, 1)
    logits, y, outputs = torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.long), torch.zeros(3, 4, 2)
    target, score = torch.zeros(4), torch.zeros(4)
    strange = torch.tensor([0.0, math.nan])
    for call, error, message in (
        (partial(calibration_error, logits, y, bins=0), ValueError, "bins: expected a positive int, got 0"),
        (partial(calibration_error, logits, y, bins=half), TypeError, "bins: expected a positive int, got 1.5"),
        (partial(gaussian_nll, outputs[..., 0], target), ValueError, r"outputs: expected \[E, B, 2\].*\[3, 4\]"),
        (partial(gaussian_nll, outputs, y), TypeError, "y: expected a floating tensor, got one of torch.int64"),
        (partial(gaussian_nll, outputs, target[:, None]), ValueError, r"y: .*outputs \[3, 4, 2\], got shape \[4, 1\]"),
        (partial(gaussian_nll, outputs, target * math.inf), ValueError, "y: expected finite numbers"),
        (partial(selective_accuracy, logits, y, score=y), TypeError, "score: expected a floating tensor"),
        (partial(selective_accuracy, logits, y, score=score[1:]), ValueError, r"score: .*\[4\], got \[3\]"),
        (
            partial(selective_accuracy, logits, y, score=score * math.nan),
            ValueError,
            "score: expected numbers, got nan",
        ),
        (partial(auroc, score[:0], score), ValueError, r"inside: expected scores on one axis, .*got shape \[0\]"),
        (partial(auroc, score, score[None]), ValueError, r"outside: expected scores .*got shape \[1, 4\]"),
        (partial(auroc, score, strange), ValueError, "outside: expected numbers, got nan"),
        (partial(auroc, y, score), TypeError, "inside: expected a floating tensor, got one of torch.int64"),
        (partial(fit_temperature, logits, y, per_member=one), TypeError, "per_member: expected True or False, got 1"),
    ):
        with pytest.raises(error, match=message):
            call()
