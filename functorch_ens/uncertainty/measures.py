"""The mean prediction of an ensemble, its uncertainty in nats, and the diversity of its members.

All are pure functions of the members' outputs. `logits` are `[E, ..., C]` in any floating dtype, where `...` is B, or
several axes such as B, H, W. Half precision is computed, and returned, in float32. A logit of -inf gives its class
probability 0.

Bad logits raise TypeError (no tensor, not floating) or ValueError (fewer than three axes; no member or input; fewer
than two classes; NaN, +inf, or -inf for every class of an input). Values are not checked inside torch.compile and vmap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from functorch_ens.uncertainty.logits import check_logits, check_regression


class Uncertainty(NamedTuple):
    """The uncertainty of each input, split by its source. Each tensor is `[...]`, one number per input."""

    total: Tensor
    """The entropy, or the variance, of the ensemble's prediction: `aleatoric + epistemic`."""
    aleatoric: Tensor
    """The mean of the members' own entropies or variances: noise in the data, which more data does not reduce."""
    epistemic: Tensor
    """The part due to differences between members: high far from the training data, and lower with more data."""


def mean_log_probs(logits: Tensor) -> Tensor:
    """The logarithm of the mean of the members' probabilities, exact even where a probability underflows.

    >>> import torch, functorch_ens as fe
    >>> logits = torch.tensor([[[0.0, 200.0]], [[0.0, 400.0]]])
    >>> mean_log_probs(logits)
    tensor([[-200.6931,    0.0000]])

    Args:
        logits: `[E, ..., C]`.

    Returns: `[..., C]`; -inf where every member gives the class probability 0.

    Raises:
        TypeError, ValueError: bad `logits`; see the module.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474, section 2.4.
    """
    mean = _log_mean(_log_probs(check_logits(logits)))
    return mean.masked_fill(mean < _floor(mean) / 2, -math.inf)


def mean_probs(logits: Tensor) -> Tensor:
    """The ensemble's prediction: the mean of the members' probabilities.

    >>> mean_probs(torch.tensor([[[0.0, 200.0]], [[0.0, -200.0]]]))
    tensor([[0.5000, 0.5000]])

    Args:
        logits: `[E, ..., C]`.

    Returns: probabilities, `[..., C]`; the last axis sums to 1.

    Raises:
        TypeError, ValueError: bad `logits`; see the module.
    """
    return reduce(check_logits(logits).softmax(-1), "e ... c -> ... c", "mean")


def classification_uncertainty(logits: Tensor) -> Uncertainty:
    """The uncertainty of each input in nats, split into an aleatoric and an epistemic part.

    `total` is the entropy of the mean of the members' probabilities. `aleatoric` is the mean of their entropies.
    `epistemic` is the difference, the mutual information of prediction and member.

    >>> agree = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]])
    >>> classification_uncertainty(agree)
    Uncertainty(total=tensor([0.6931]), aleatoric=tensor([0.6931]), epistemic=tensor([0.]))
    >>> differ = torch.tensor([[[0.0, 200.0]], [[200.0, 0.0]]])
    >>> classification_uncertainty(differ)
    Uncertainty(total=tensor([0.6931]), aleatoric=tensor([0.]), epistemic=tensor([0.6931]))

    Args:
        logits: `[E, ..., C]`.

    Returns: three tensors `[...]`, differentiable, with `0 <= epistemic <= total <= log C`, the last up to rounding.

    Raises:
        TypeError, ValueError: bad `logits`; see the module.

    Source: Houlsby et al. 2011, arXiv:1112.5745, eq. 2; Depeweg et al. 2018, arXiv:1710.07283, section 3.1.
    """
    log_p = _log_probs(check_logits(logits))
    log_q = _log_mean(log_p)
    aleatoric = reduce(log_p.exp() * -log_p, "e ... c -> ... c", "mean").sum(-1)
    # Compute the mean of KL(p || q): a difference of entropies would lose a small result to rounding. With
    # p = q e^gap, a term p log(p / q) is q gap e^gap. Subtracting p - q, which sums to 0 over the classes, makes each
    # term small and >= 0.
    gap = log_p - log_q
    each = reduce(gap * gap.exp() - gap.expm1(), "e ... c -> ... c", "mean")
    epistemic = (log_q.exp() * each).sum(-1).clamp(min=0)  # exp and expm1 may round differently on a device
    return Uncertainty(aleatoric + epistemic, aleatoric, epistemic)


def regression_uncertainty(outputs: Tensor) -> tuple[Tensor, Uncertainty]:
    """The mean prediction of a regression ensemble and its variance, by the law of total variance.

    `aleatoric` is the mean of the members' variances, `epistemic` the variance of their means, divided by E and not by
    E - 1. `total` is their sum, the variance of the mixture of the members' distributions.

    >>> outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])  # 2 members, 1 input, mean and log variance
    >>> regression_uncertainty(outputs)
    (tensor([2.]), Uncertainty(total=tensor([2.]), aleatoric=tensor([1.]), epistemic=tensor([1.])))

    Args:
        outputs: `[E, B, 2]`, a mean and the logarithm of a variance; or `[E, B]`, a mean alone, with variance 0.

    Returns: the mean, `[B]`, and the three variances, each `[B]`.

    Raises:
        TypeError: `outputs` is not a floating tensor.
        ValueError: `outputs` has another shape, no member or input, or NaN or inf.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474, section 2.4; Depeweg et al. 2018,
    arXiv:1710.07283, section 3.2.
    """
    outputs = check_regression(outputs, means_alone=True)
    means = outputs if outputs.ndim == 2 else outputs[..., 0]
    mean = reduce(means, "e b -> b", "mean")
    epistemic = reduce((means - mean).square(), "e b -> b", "mean")
    if outputs.ndim == 2:
        return mean, Uncertainty(epistemic, torch.zeros_like(epistemic), epistemic)
    aleatoric = reduce(outputs[..., 1].exp(), "e b -> b", "mean")
    return mean, Uncertainty(aleatoric + epistemic, aleatoric, epistemic)


def disagreement(logits: Tensor) -> Tensor:
    """The share of pairs of members that predict different classes, for each input.

    >>> votes = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]], [[0.0, 9.0]]])
    >>> disagreement(votes)
    tensor([0.6667])

    Args:
        logits: `[E, ..., C]`. A member predicts the class of its largest logit, the first of several.

    Returns: `[...]`, from 0 to 1; 0 for one member. It is not differentiable.

    Raises:
        TypeError, ValueError: bad `logits`; see the module.
    """
    logits = check_logits(logits)
    E, C = logits.shape[0], logits.shape[-1]
    votes = rearrange(logits.argmax(-1), "e ... -> e ... 1") == torch.arange(C, device=logits.device)
    same_pairs = votes.sum(0).square().sum(-1)  # counts ordered pairs, and each member with itself
    return (E * E - same_pairs).to(logits.dtype) / max(E * (E - 1), 1)


def pairwise_kl(logits: Tensor) -> Tensor:
    """The divergence KL(member i || member j) of every two members, in nats, averaged over all inputs.

    >>> pairwise_kl(torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]]))
    tensor([[0.0000, 0.4338],
            [0.3278, 0.0000]])

    Args:
        logits: `[E, ..., C]`.

    Returns: `[E, E]`, with i on axis 0 and 0 on the diagonal; inf where j rules out a class that i does not.

    Raises:
        TypeError, ValueError: bad `logits`; see the module.
    """
    logits = check_logits(logits)
    inputs = logits[0, ..., 0].numel()
    log_p = rearrange(_log_probs(logits), "e ... c -> e (... c)")
    possible = rearrange(logits > -math.inf, "e ... c -> e (... c)")
    rows = []
    for log_p_i, possible_i in zip(log_p, possible, strict=True):
        # The logarithms are subtracted before the sum. Equal members then have a KL of exactly 0, and nearly equal ones
        # lose no digits; a difference of two matrix products, whose sums run in different orders, has neither.
        kl = (log_p_i.exp() * (log_p_i - log_p)).sum(-1).clamp(min=0) / inputs
        rows.append(kl.masked_fill((possible_i & ~possible).any(-1), math.inf))
    return torch.stack(rows)


def _log_probs(logits: Tensor) -> Tensor:
    """Log probabilities with a finite floor instead of -inf: 0 * inf is NaN, in a product or in its gradient."""
    return logits.log_softmax(-1).clamp(min=_floor(logits))


def _log_mean(log_p: Tensor) -> Tensor:
    """The logarithm of the mean of the members' probabilities, `[E, ..., C]` -> `[..., C]`."""
    return log_p.logsumexp(0) - math.log(log_p.shape[0])


def _floor(tensor: Tensor) -> float:
    """The floor of log probabilities; an eighth of the lowest number, so that sums of several do not overflow."""
    return torch.finfo(tensor.dtype).min / 8
