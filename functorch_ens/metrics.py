"""Metrics of an ensemble's predictions: proper scores, calibration, selective accuracy and out-of-distribution AUROC.

`logits` are the members' outputs, `[E, ..., C]`, in any floating dtype; half precision is computed in float32. Labels
`y` are class indices, `[...]`, in any integer dtype. The metrics are those of the mean of the members' probabilities;
the score of each member is `torch.stack([nll(one[None], y) for one in logits])`, or the same under vmap.

Bad arguments raise TypeError (no tensor, another dtype) or ValueError (another shape; NaN, +inf, or -inf for every
class of an input; a label that is not in 0 to C - 1). Values are not checked inside torch.compile and vmap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_ens.checks import check_positive_int
from functorch_ens.uncertainty.logits import check_floating, check_labels, check_regression, of_label, shows_values
from functorch_ens.uncertainty.measures import classification_uncertainty, mean_log_probs, mean_probs


class SelectiveAccuracy(NamedTuple):
    """The accuracy on the k most certain of B inputs, for k = 1 to B."""

    coverage: Tensor
    """`[B]`: k / B, the share of inputs that the ensemble answers."""
    accuracy: Tensor
    """`[B]`: the share of correct predictions among these k."""


class Bins(NamedTuple):
    """A histogram of the ensemble's confidence, in bins of equal width from 0 to 1."""

    inputs: Tensor
    """`[bins]`: the number of inputs in each bin."""
    hits: Tensor
    """`[bins]`: the number of correct predictions among them."""
    confidence: Tensor
    """`[bins]`: the sum of their confidences. The confidence is the probability of the predicted class."""


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """The negative log likelihood of the labels, in nats per input.

    >>> import torch
    >>> logits = torch.tensor([[[0.0, 0.0]], [[0.0, 900.0]]])
    >>> nll(logits, torch.tensor([1]))  # -log((1 / 2 + 1) / 2)
    tensor(0.2877)

    Args:
        logits: `[E, ..., C]`.
        y: `[...]`, the labels.

    Returns: a scalar >= 0; inf if all members rule out the label of an input.

    Raises:
        TypeError, ValueError: bad `logits` or `y`; see the module.
    """
    log_q = mean_log_probs(logits)
    return -of_label(log_q, check_labels(y, logits)).mean()


def brier(logits: Tensor, y: Tensor) -> Tensor:
    """The Brier score: the squared error of the probabilities, summed over the classes and averaged over the inputs.

    >>> brier(torch.zeros(3, 1, 2), torch.tensor([1]))
    tensor(0.5000)

    Args:
        logits: `[E, ..., C]`.
        y: `[...]`, the labels.

    Returns: a scalar from 0 to 2. With two classes, half of it is the score of one class alone.

    Raises:
        TypeError, ValueError: bad `logits` or `y`; see the module.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability", eq. 2.
    """
    q = mean_probs(logits)
    right = check_labels(y, logits)[..., None] == torch.arange(q.shape[-1], device=q.device)
    return (q - right.to(q.dtype)).square().sum(-1).mean()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of inputs whose label is the ensemble's most probable class, or the first of several.

    >>> accuracy(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), torch.tensor([1, 0]))
    tensor(0.5000)

    Args:
        logits: `[E, ..., C]`.
        y: `[...]`, the labels.

    Returns: a scalar from 0 to 1. It is not differentiable.

    Raises:
        TypeError, ValueError: bad `logits` or `y`; see the module.
    """
    q = mean_probs(logits)
    return (q.argmax(-1) == check_labels(y, logits)).to(q.dtype).mean()


def calibration_error(logits: Tensor, y: Tensor, *, bins: int = 15) -> Tensor:
    """The expected calibration error: the gap between confidence and accuracy in each bin, averaged over the inputs.

    >>> calibration_error(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 1]))  # confidence 1/2, accuracy 1/4
    tensor(0.2500)

    Args:
        logits: `[E, ..., C]`.
        y: `[...]`, the labels.
        bins: the number of bins, of equal width. A bin includes its lower edge; the last one also includes 1.

    Returns: a scalar from 0 to 1.

    Raises:
        TypeError, ValueError: bad `logits` or `y`; `bins` is not a positive int.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3. Bins there include their upper edge instead.
    """
    inputs, hits, confidence = confidence_bins(logits, y, bins=bins)
    return (hits - confidence).abs().sum() / inputs.sum()


def confidence_bins(logits: Tensor, y: Tensor, *, bins: int = 15) -> Bins:
    """Count inputs, correct predictions and confidence by bin, for `calibration_error` and reliability diagrams.

    >>> confidence_bins(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 1]), bins=2)
    Bins(inputs=tensor([0., 4.]), hits=tensor([0., 1.]), confidence=tensor([0., 2.]))

    Args, Raises: as `calibration_error`.

    Returns: counts and sums by bin, each `[bins]`. Only `confidence` is differentiable.
    """
    bins = check_positive_int(bins, "bins")
    confidence, predicted = mean_probs(logits).flatten(0, -2).max(-1)
    right = (predicted == check_labels(y, logits).flatten()).to(confidence.dtype)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = torch.bucketize(confidence.detach(), edges[1:-1], right=True)
    empty = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    return Bins(*(empty.index_add(0, index, each) for each in (torch.ones_like(right), right, confidence)))


def gaussian_nll(outputs: Tensor, y: Tensor) -> Tensor:
    """The negative log density of `y` under the mixture of the members' Gaussians, in nats per input.

    The constant log(2 pi) / 2 is included.

    >>> gaussian_nll(torch.zeros(3, 1, 2), torch.tensor([1.0]))  # (log(2 pi) + 1) / 2
    tensor(1.4189)

    Args:
        outputs: `[E, B, 2]`, a mean and the logarithm of a variance.
        y: `[B]`, the targets, floating.

    Returns: a scalar; inf where the density of an input rounds to 0.

    Raises:
        TypeError: `outputs` or `y` is not a floating tensor.
        ValueError: one of them has another shape, or NaN or inf.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474, eq. 1 and section 2.4.
    """
    outputs = check_regression(outputs, means_alone=False)
    check_floating(y, "y")
    if y.shape != outputs.shape[1:-1]:
        raise ValueError(
            f"y: expected one target for each input of outputs {list(outputs.shape)}, got shape {list(y.shape)}"
        )
    _check_device(y, "y", outputs, "outputs")
    if shows_values(y) and not bool(y.detach().isfinite().all()):
        raise ValueError("y: expected finite numbers, got nan or inf")
    mean, log_variance = outputs.to(torch.promote_types(outputs.dtype, y.dtype)).unbind(-1)
    return (math.log(len(outputs)) - _log_density(mean, log_variance, y).logsumexp(0)).mean()


def _log_density(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """The logarithm of a Gaussian density; -inf, with the gradient 0, where the square of the distance overflows."""
    info = torch.finfo(mean.dtype)
    # Far below the log variance at which the square of the smallest distance overflows.
    lowest = 2 * math.log(info.smallest_normal * info.eps) - math.log(info.max) - 8
    exponent = log_variance.clamp(min=lowest) / -2
    # exp(exponent) overflows long before the square does. So it is two factors, and one of them counts as a constant.
    half = exponent.detach() / 2
    constant, root = half.exp() / 2, (exponent - half).exp()
    distance = y - mean
    far = ~(distance * constant * root).square().isfinite()
    quarter = (distance.masked_fill(far, 0) * constant * root).square()  # 0 first: the gradient would be 0 times inf
    return (-2 * quarter - 0.5 * (log_variance + math.log(2 * math.pi))).masked_fill(far, -math.inf)


def selective_accuracy(logits: Tensor, y: Tensor, *, score: Tensor | None = None) -> SelectiveAccuracy:
    """The accuracy on the k inputs of lowest uncertainty, for every k.

    Inputs of equal score have no order: the accuracy is the mean over all their orders.

    >>> logits = torch.tensor([[[0.0, 9.0], [0.0, 1.0], [0.0, 1.0]]])
    >>> selective_accuracy(logits, torch.tensor([1, 0, 1]))
    SelectiveAccuracy(coverage=tensor([0.3333, 0.6667, 1.0000]), accuracy=tensor([1.0000, 0.7500, 0.6667]))

    Args:
        logits: `[E, ..., C]`, for B inputs in all.
        y: `[...]`, the labels.
        score: `[...]`, the uncertainty of each input; None is `classification_uncertainty(logits).total`.

    Returns: coverage and accuracy, each `[B]`. They are not differentiable.

    Raises:
        TypeError: bad `logits` or `y`, or `score` is not a floating tensor.
        ValueError: bad `logits` or `y`, or `score` has another shape than `y`, or NaN.

    Source: El-Yaniv & Wiener 2010, "On the foundations of noise-free selective classification", JMLR 11.
    """
    q = mean_probs(logits)
    y = check_labels(y, logits)
    if score is None:
        score = classification_uncertainty(logits).total
    else:
        _check_score(score, "score")
        if score.shape != y.shape:
            raise ValueError(f"score: expected the shape of y, {list(y.shape)}, got {list(score.shape)}")
        _check_device(score, "score", logits, "logits")
    right = (q.argmax(-1) == y).flatten()
    ordered, order = score.detach().flatten().sort()
    hits = F.pad(right[order].cumsum(0), (1, 0))  # [B + 1]: among the first 0, 1, ... B
    # Ties: positions first to last - 1 share one score. Within them the number of hits grows linearly on average.
    first, last = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    k = torch.arange(1, len(order) + 1, device=q.device)
    share = (hits[last] - hits[first]).to(q.dtype) / (last - first)
    return SelectiveAccuracy(k.to(q.dtype) / len(order), (hits[first] + (k - first) * share) / k)


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """The area under the ROC curve of a score that detects out-of-distribution inputs.

    It is the probability that a score of `outside` is higher than one of `inside`; a tie counts 1/2.

    >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3]))
    tensor(0.8750)

    Args:
        inside: `[M]`, the scores of in-distribution inputs, such as `classification_uncertainty(logits).epistemic`.
        outside: `[N]`, the scores of other inputs.

    Returns: a scalar from 0 to 1, where 1/2 is chance. It is not differentiable.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: an argument does not have exactly one axis, is empty, or has NaN.
    """
    for scores, argument in ((inside, "inside"), (outside, "outside")):
        _check_score(scores, argument)
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"{argument}: expected scores on one axis, at least one, got shape {list(scores.shape)}")
    _check_device(outside, "outside", inside, "inside")
    dtype = torch.promote_types(torch.promote_types(inside.dtype, outside.dtype), torch.float32)
    ordered, given = inside.detach().to(dtype).sort().values, outside.detach().to(dtype).contiguous()
    ranks = torch.searchsorted(ordered, given) + torch.searchsorted(ordered, given, right=True)
    return ranks.sum().to(dtype) / (2 * len(inside) * len(outside))


def _check_score(score: Tensor, argument: str) -> None:
    """TypeError if `score` is not a floating tensor, ValueError if it has NaN."""
    check_floating(score, argument)
    if shows_values(score) and bool(score.isnan().any()):
        raise ValueError(f"{argument}: expected numbers, got nan")


def _check_device(tensor: Tensor, argument: str, other: Tensor, its: str) -> None:
    """ValueError if two tensors are not on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{argument}: expected the device of {its}, {other.device}, got {tensor.device}")
