"""What the members of an ensemble say together, and how uncertain it is: pure functions of their outputs, in nats.

Logits are `[E, ..., C]`: `[E, B, C]`, or with more axes between, such as the pixels' of `[E, B, H, W, C]`; `...` below
is what is between. Half precision is computed, and returned, in float32. A logit of -inf rules a class out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from functorch_ens.uncertainty.logits import check_logits, check_regression


class Uncertainty(NamedTuple):
    """Uncertainty of every input, by where it comes from; each tensor is `[...]`, one number for an input."""

    total: Tensor
    """The entropy (or variance) of the ensemble's prediction: `aleatoric + epistemic`."""
    aleatoric: Tensor
    """What the members agree on: the noise in the data, which more of it does not take away."""
    epistemic: Tensor
    """What the members differ in: what is not known of the model, high far from the training data."""


def mean_log_probs(logits: Tensor) -> Tensor:
    """The logarithm of the mean of the members' probabilities, `[..., C]`; exact where these underflow.

    >>> import torch, functorch_ens as fe
    >>> logits = torch.tensor([[[0.0, 200.0]], [[0.0, 400.0]]])
    >>> mean_log_probs(logits)
    tensor([[-200.6931,    0.0000]])

    Args:
        logits: of the members, `[E, ..., C]`.

    Raises:
        TypeError, ValueError: as `check_logits`.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, arXiv:1612.01474, section 2.4.
    """
    mean = _log_mean(_log_probs(check_logits(logits)))
    return mean.masked_fill(mean < _floor(mean) / 2, -math.inf)


def mean_probs(logits: Tensor) -> Tensor:
    """The prediction of the ensemble: the mean of the members' probabilities, `[..., C]`.

    >>> mean_probs(torch.tensor([[[0.0, 200.0]], [[0.0, -200.0]]]))
    tensor([[0.5000, 0.5000]])

    Args:
        logits: of the members, `[E, ..., C]`.

    Raises:
        TypeError, ValueError: as `check_logits`.
    """
    return reduce(check_logits(logits).softmax(-1), "e ... c -> ... c", "mean")


def classification_uncertainty(logits: Tensor) -> Uncertainty:
    """How uncertain the ensemble is of each input, and how much of it is that the members differ.

    `total` is the entropy of the mean of the members' probabilities, `aleatoric` the mean of their entropies, and
    `epistemic` the difference: the mutual information of prediction and member. All are nats, differentiable, and
    `0 <= epistemic <= total <= log C`, up to rounding in the last.

    >>> agree = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]])
    >>> classification_uncertainty(agree)
    Uncertainty(total=tensor([0.6931]), aleatoric=tensor([0.6931]), epistemic=tensor([0.]))
    >>> differ = torch.tensor([[[0.0, 200.0]], [[200.0, 0.0]]])
    >>> classification_uncertainty(differ)
    Uncertainty(total=tensor([0.6931]), aleatoric=tensor([0.]), epistemic=tensor([0.6931]))

    Args:
        logits: of the members, `[E, ..., C]`.

    Raises:
        TypeError, ValueError: as `check_logits`.

    Source: Houlsby et al. 2011, arXiv:1112.5745, eq. 2; Depeweg et al. 2018, arXiv:1710.07283, section 3.1.
    """
    log_p = _log_probs(check_logits(logits))
    log_q = _log_mean(log_p)
    aleatoric = reduce(log_p.exp() * -log_p, "e ... c -> ... c", "mean").sum(-1)
    # The mean of KL(p || q), and not a difference of entropies, which loses what is small in their rounding. With
    # p = q e^gap its terms p log(p / q) are q gap e^gap; less p - q, which sum to 0, each is >= 0 and small by itself.
    gap = log_p - log_q
    each = reduce(gap * gap.exp() - gap.expm1(), "e ... c -> ... c", "mean")
    epistemic = (log_q.exp() * each).sum(-1).clamp(min=0)  # should exp and expm1 round apart on some device
    return Uncertainty(aleatoric + epistemic, aleatoric, epistemic)


def regression_uncertainty(outputs: Tensor) -> tuple[Tensor, Uncertainty]:
    """The mean prediction of a regression ensemble, `[B]`, and the variances around it, each `[B]`.

    By the law of total variance: `aleatoric` is the mean of the members' variances, `epistemic` the variance of their
    means, over the E members as a whole population (divided by E, not E - 1), `total` the sum of the two: the variance
    of the mixture of the members' distributions.

    >>> outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])  # 2 members, 1 input, mean and log variance
    >>> regression_uncertainty(outputs)
    (tensor([2.]), Uncertainty(total=tensor([2.]), aleatoric=tensor([1.]), epistemic=tensor([1.])))

    Args:
        outputs: of the members, `[E, B, 2]`: a mean and the logarithm of a variance; or `[E, B]`: a mean alone, whose
            aleatoric variance is 0.

    Raises:
        TypeError, ValueError: `outputs` has another shape, no member or input, or is not floating and finite.

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
    """The share of pairs of two different members that predict different classes, `[...]`; 0 for one member.

    >>> votes = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]], [[0.0, 9.0]]])
    >>> disagreement(votes)
    tensor([0.6667])

    Args:
        logits: of the members, `[E, ..., C]`. The class of a member is that of its largest logit, the first of them.

    Raises:
        TypeError, ValueError: as `check_logits`.
    """
    logits = check_logits(logits)
    E, C = logits.shape[0], logits.shape[-1]
    votes = rearrange(logits.argmax(-1), "e ... -> e ... 1") == torch.arange(C, device=logits.device)
    same_pairs = votes.sum(0).square().sum(-1)  # ordered, and a member with itself
    return (E * E - same_pairs).to(logits.dtype) / max(E * (E - 1), 1)


def pairwise_kl(logits: Tensor) -> Tensor:
    """How far apart every two members are: KL(member i || member j) in nats, the mean over all inputs, `[E, E]`.

    >>> pairwise_kl(torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]]))
    tensor([[0.0000, 0.4338],
            [0.3278, 0.0000]])

    Args:
        logits: of the members, `[E, ..., C]`. Where j rules out a class that i does not, the KL is inf.

    Raises:
        TypeError, ValueError: as `check_logits`.
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
    """Log probabilities, very low instead of -inf: 0 times inf is NaN, in a product or in its gradient."""
    return logits.log_softmax(-1).clamp(min=_floor(logits))


def _log_mean(log_p: Tensor) -> Tensor:
    """The logarithm of the mean of the members' probabilities, `[E, ..., C]` -> `[..., C]`."""
    return log_p.logsumexp(0) - math.log(log_p.shape[0])


def _floor(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).min / 8
