"""How good an ensemble's predictions are: proper scores, calibration, abstention, and detection of strange inputs.

Logits are `[E, ..., C]` with labels `[...]`, as in `functorch_ens.uncertainty`; scores are of the mean of the members'
probabilities. Each member's own: `torch.stack([nll(one[None], y) for one in logits])`, or the same by vmap.
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
    """The accuracy on the k most certain inputs, for k = 1 to B."""

    coverage: Tensor
    """`[B]`: the share of inputs that are answered, k / B."""
    accuracy: Tensor
    """`[B]`: the share of those that are right."""


class Bins(NamedTuple):
    """The inputs by the confidence of the ensemble, in bins of equal width from 0 to 1."""

    inputs: Tensor
    """`[bins]`: the number of inputs in the bin."""
    hits: Tensor
    """`[bins]`: how many of them are predicted right."""
    confidence: Tensor
    """`[bins]`: the sum of the probabilities of their predicted classes."""


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """The negative log likelihood of the labels in nats, the mean over the inputs.

    >>> import torch
    >>> logits = torch.tensor([[[0.0, 0.0]], [[0.0, 900.0]]])
    >>> nll(logits, torch.tensor([1]))  # -log((1 / 2 + 1) / 2)
    tensor(0.2877)

    Args:
        logits: of the members, `[E, ..., C]`.
        y: the classes, `[...]`, of any integer dtype.

    Raises:
        TypeError, ValueError: as `check_logits` and `check_labels`.
    """
    log_q = mean_log_probs(logits)
    return -of_label(log_q, check_labels(y, logits)).mean()


def brier(logits: Tensor, y: Tensor) -> Tensor:
    """The Brier score: the squared error of the probabilities, summed over the classes, its mean over the inputs.

    From 0 to 2 (halve it for the convention for two classes that looks at one of them).

    >>> brier(torch.zeros(3, 1, 2), torch.tensor([1]))
    tensor(0.5000)

    Args:
        logits: of the members, `[E, ..., C]`.
        y: the classes, `[...]`, of any integer dtype.

    Raises:
        TypeError, ValueError: as `check_logits` and `check_labels`.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability", eq. 2.
    """
    q = mean_probs(logits)
    right = check_labels(y, logits)[..., None] == torch.arange(q.shape[-1], device=q.device)
    return (q - right.to(q.dtype)).square().sum(-1).mean()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of inputs whose label is the most probable class of the ensemble (the first of equals).

    >>> accuracy(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), torch.tensor([1, 0]))
    tensor(0.5000)

    Args:
        logits: of the members, `[E, ..., C]`.
        y: the classes, `[...]`, of any integer dtype.

    Raises:
        TypeError, ValueError: as `check_logits` and `check_labels`.
    """
    q = mean_probs(logits)
    return (q.argmax(-1) == check_labels(y, logits)).to(q.dtype).mean()


def calibration_error(logits: Tensor, y: Tensor, *, bins: int = 15) -> Tensor:
    """The expected calibration error: how far the confidence in the predicted class is from how often it is right.

    >>> calibration_error(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 1]))  # sure by half, right in a quarter
    tensor(0.2500)

    Args:
        logits: of the members, `[E, ..., C]`.
        y: the classes, `[...]`, of any integer dtype.
        bins: of equal width; each has its lower edge, the last also 1.

    Raises:
        TypeError, ValueError: as `check_logits` and `check_labels`; `bins` is no positive int.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3 (whose bins have their upper edges instead).
    """
    inputs, hits, confidence = confidence_bins(logits, y, bins=bins)
    return (hits - confidence).abs().sum() / inputs.sum()


def confidence_bins(logits: Tensor, y: Tensor, *, bins: int = 15) -> Bins:
    """What `calibration_error` and a reliability diagram are made of; arguments as there.

    >>> confidence_bins(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 1]), bins=2)
    Bins(inputs=tensor([0., 4.]), hits=tensor([0., 1.]), confidence=tensor([0., 2.]))
    """
    bins = check_positive_int(bins, "bins")
    confidence, predicted = mean_probs(logits).flatten(0, -2).max(-1)
    right = (predicted == check_labels(y, logits).flatten()).to(confidence.dtype)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = torch.bucketize(confidence.detach(), edges[1:-1], right=True)
    empty = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    return Bins(*(empty.index_add(0, index, each) for each in (torch.ones_like(right), right, confidence)))


def gaussian_nll(outputs: Tensor, y: Tensor) -> Tensor:
    """The negative log density of `y` under the mixture of the members' Gaussians, the mean over the inputs.

    In nats, with the constant log(2 pi) / 2.

    >>> gaussian_nll(torch.zeros(3, 1, 2), torch.tensor([1.0]))  # (log(2 pi) + 1) / 2
    tensor(1.4189)

    Args:
        outputs: of the members, `[E, B, 2]`: a mean and the logarithm of a variance.
        y: the targets, `[B]`, floating.

    Raises:
        TypeError, ValueError: `outputs` or `y` has another shape, or is not floating and finite.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474, eq. 1 and section 2.4.
    """
    outputs = check_regression(outputs, means_alone=False)
    check_floating(y, "y")
    if y.shape != outputs.shape[1:-1]:
        raise ValueError(
            f"y: expected one target for each input of outputs {list(outputs.shape)}, got shape {list(y.shape)}"
        )
    if shows_values(y) and not bool(y.detach().isfinite().all()):
        raise ValueError("y: expected finite numbers, got nan or inf")
    mean, log_variance = outputs.unbind(-1)
    log_density = -0.5 * ((y - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    return (math.log(len(outputs)) - log_density.logsumexp(0)).mean()


def selective_accuracy(logits: Tensor, y: Tensor, *, score: Tensor | None = None) -> SelectiveAccuracy:
    """The accuracy where the ensemble answers the k inputs that it is most certain of, and no others, for each k.

    Among inputs of one score any order is as good: the accuracy is its mean over all of them.

    >>> logits = torch.tensor([[[0.0, 9.0], [0.0, 1.0], [0.0, 1.0]]])
    >>> selective_accuracy(logits, torch.tensor([1, 0, 1]))
    SelectiveAccuracy(coverage=tensor([0.3333, 0.6667, 1.0000]), accuracy=tensor([1.0000, 0.7500, 0.6667]))

    Args:
        logits: of the members, `[E, ..., C]`; B is the number of all inputs.
        y: the classes, `[...]`, of any integer dtype.
        score: `[...]`, higher where less certain; by default the total uncertainty.

    Raises:
        TypeError, ValueError: as `check_logits` and `check_labels`; `score` is not floating, has another shape than
            `y`, or has NaN.

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
    right = (q.argmax(-1) == y).flatten()
    ordered, order = score.detach().flatten().sort()
    hits = F.pad(right[order].cumsum(0), (1, 0))  # [B + 1]: of the first 0, 1, ... B
    first, last = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    k = torch.arange(1, len(order) + 1, device=q.device)
    share = (hits[last] - hits[first]).to(q.dtype) / (last - first)
    return SelectiveAccuracy(k.to(q.dtype) / len(order), (hits[first] + (k - first) * share) / k)


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """How well a score tells strange inputs: the probability that one of `outside` is above one of `inside`.

    1/2 is chance, and equal scores count as 1/2. Not differentiable.

    >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3]))
    tensor(0.8750)

    Args:
        inside: scores of inputs such as those in training, `[M]`: `classification_uncertainty(logits).epistemic`, say.
        outside: scores of other inputs, `[N]`.

    Raises:
        TypeError, ValueError: one of the two is not floating, not of one axis, empty, or has NaN.
    """
    for scores, argument in ((inside, "inside"), (outside, "outside")):
        _check_score(scores, argument)
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"{argument}: expected scores on one axis, at least one, got shape {list(scores.shape)}")
    dtype = torch.promote_types(torch.promote_types(inside.dtype, outside.dtype), torch.float32)
    ordered, given = inside.detach().to(dtype).sort().values, outside.detach().to(dtype).contiguous()
    ranks = torch.searchsorted(ordered, given) + torch.searchsorted(ordered, given, right=True)
    return ranks.sum().to(dtype) / (2 * len(inside) * len(outside))


def _check_score(score: Tensor, argument: str) -> None:
    check_floating(score, argument)
    if shows_values(score) and bool(score.isnan().any()):
        raise ValueError(f"{argument}: expected numbers, got nan")
