"""Temperature scaling of an ensemble."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_ens.checks import check_bool
from functorch_ens.uncertainty.logits import check_labels, check_logits, of_label
from functorch_ens.uncertainty.measures import mean_log_probs

# The bounds of log T: a hundredth and a hundred. Where all predictions are right the NLL falls for ever as T goes to 0.
_LOG_T = 4.6


def fit_temperature(logits: Tensor, y: Tensor, *, per_member: bool = False) -> Tensor:
    """The temperature T, a scalar, for which the ensemble of `logits / T` has the lowest NLL.

    Fit it on held-out data. It is between 0.01 and 100, where predictions that are all right, or no better than chance,
    would send it on to 0 or to infinity. Not differentiable, and not for use within torch.compile or under vmap.

    >>> import torch, functorch_ens as fe
    >>> logits = torch.tensor([[[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]])
    >>> fe.fit_temperature(logits, torch.tensor([1, 1, 1, 0]))  # 4 / log(3): right in three quarters
    tensor(3.6410)

    Args:
        logits: of the members, `[E, ..., C]`.
        y: the classes, `[...]`, of any integer dtype.
        per_member: instead the T of each member alone, `[E]`, for its own NLL; `rearrange(T, "e -> e 1 1")` divides.

    Raises:
        TypeError, ValueError: as `check_logits` and `check_labels`; a label is a class that all members rule out.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2. Why it is the mean that T is fitted to, and not the
    members: Rahaman & Thiery 2021, arXiv:2007.08792.
    """
    check_bool(per_member, "per_member")
    dtype = logits.dtype
    logits, y = check_logits(logits), check_labels(y, logits)
    if per_member:
        return torch.stack([fit_temperature(one[None], y).to(dtype) for one in logits])
    if bool(_nll(logits, y).isinf()):
        raise ValueError("y: expected classes that are possible, got one whose logits are -inf in all members")
    with torch.inference_mode(False), torch.enable_grad():  # also within the caller's no_grad or inference_mode
        # -inf becomes finite: its gradient in T would be 0 times inf.
        finite = logits.detach().double().clamp(min=torch.finfo(torch.float32).min)
        return _fit(finite, y.clone()).exp().to(dtype)


def _fit(logits: Tensor, y: Tensor) -> Tensor:
    """The log T of `fit_temperature`: the best of a grid, as the NLL of a mean can have several minima, then LBFGS."""
    grid = torch.linspace(-_LOG_T, _LOG_T, 24, dtype=logits.dtype, device=logits.device)
    with torch.no_grad():
        losses = torch.stack([_nll(logits / log_t.exp(), y) for log_t in grid])
    best = int(losses.argmin().clamp(1, len(grid) - 2))  # it can reach its two neighbours, and so the ends
    start, nearby = grid[best], losses[best - 1 : best + 2]
    # torch's LBFGS takes a loss that changes by little to be at its minimum: one of flat logits, or nearly all right.
    rise = (nearby.max() - nearby.min()).clamp(min=1e-12)
    u = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u], max_iter=50, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def log_t() -> Tensor:
        return start + (grid[1] - grid[0]) * u.tanh()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _nll(logits / log_t().exp(), y) / rise
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t().detach()


def _nll(logits: Tensor, y: Tensor) -> Tensor:
    return -of_label(mean_log_probs(logits), y).mean()
