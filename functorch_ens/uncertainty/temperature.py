"""Temperature scaling: one scalar that calibrates an ensemble after training."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_ens.checks import check_bool, check_has_values
from functorch_ens.uncertainty.logits import check_floating, check_labels, check_logits, of_label
from functorch_ens.uncertainty.measures import mean_log_probs

# log T is bounded by ±4.6, so T by 0.01 and 100: if every prediction is correct, the NLL falls forever as T goes to 0.
_LOG_T = 4.6


def fit_temperature(logits: Tensor, y: Tensor, *, per_member: bool = False) -> Tensor:
    """Fit the temperature T that minimises the NLL of the ensemble with `logits / T`.

    Use held-out data. T is bounded by 0.01 and 100: predictions that are all correct would send it to 0, and
    predictions no better than chance to infinity. The function does not work inside torch.compile or vmap.

    >>> import torch, functorch_ens as fe
    >>> logits = torch.tensor([[[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]])
    >>> fe.fit_temperature(logits, torch.tensor([1, 1, 1, 0]))  # 4 / log(3): three of four are correct
    tensor(3.6410)

    Args:
        logits: `[E, ..., C]`.
        y: `[...]`, the labels, of any integer dtype.
        per_member: fit one T to the NLL of each member instead. Divide by `rearrange(T, "e -> e 1 1")`.

    Returns: a scalar, or `[E]` if `per_member`, in the dtype of `logits`. It is not differentiable.

    Raises:
        TypeError: `logits` is not floating, `y` not of an integer dtype, or `per_member` not a bool.
        ValueError: a bad shape or value of `logits` or `y`, or every member rules out the label of an input.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2. Rahaman & Thiery 2021, arXiv:2007.08792, show why to fit T
    to the mean prediction and not to the members.
    """
    check_bool(per_member, "per_member")
    check_floating(logits, "logits")
    dtype = logits.dtype
    logits, y = check_logits(logits), check_labels(y, logits)
    check_has_values(logits, "logits")
    if per_member:
        return torch.stack([fit_temperature(one[None], y).to(dtype) for one in logits])
    if bool(_nll(logits, y).isinf()):
        raise ValueError("y: expected classes that are possible, got one whose logits are -inf in all members")
    with torch.inference_mode(False), torch.enable_grad():  # LBFGS needs gradients, whatever the caller's mode
        # Make -inf finite: its gradient in T would be 0 * inf.
        finite = logits.detach().double().clamp(min=torch.finfo(torch.float32).min)
        return _fit(finite, y.clone()).exp().to(dtype)


def _fit(logits: Tensor, y: Tensor) -> Tensor:
    """Fit log T by a grid and then LBFGS: the NLL of a mean of probabilities can have several minima."""
    grid = torch.linspace(-_LOG_T, _LOG_T, 24, dtype=logits.dtype, device=logits.device)
    with torch.no_grad():
        losses = torch.stack([_nll(logits / log_t.exp(), y) for log_t in grid])
    best = int(losses.argmin().clamp(1, len(grid) - 2))  # not an end: LBFGS searches to both neighbours
    start, nearby = grid[best], losses[best - 1 : best + 2]
    # Scale the loss: torch's LBFGS stops when the loss changes by little, and a nearly flat loss always does.
    rise = (nearby.max() - nearby.min()).clamp(min=1e-12)
    u = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u], max_iter=50, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def log_t() -> Tensor:
        """Within one grid step of `start`, for any u."""
        return start + (grid[1] - grid[0]) * u.tanh()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _nll(logits / log_t().exp(), y) / rise
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t().detach()


def _nll(logits: Tensor, y: Tensor) -> Tensor:
    """`functorch_ens.metrics.nll` without its checks, which would run at every step of the fit."""
    return -of_label(mean_log_probs(logits), y).mean()
