"""Clipping of gradients by their norm: that of each member, or that of the whole ensemble."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def clipped(
    gradients: dict[str, Tensor],
    stacked: Collection[str],
    stopped: Collection[int],
    max_norm: float,
    by: str,
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """The gradients, scaled down where their norm is above `max_norm`, as `torch.nn.utils.clip_grad_norm_` does it.

    `"member"`: the stacked gradients `[i]` of each member have a norm, and the shared ones have one together.
    `"ensemble"`: all have one norm, in which members that have stopped or are not finite do not count.
    """
    own = {name: gradient for name, gradient in gradients.items() if name in stacked}
    squares = [_sum_of_squares(gradient, 1) for gradient in own.values()]  # [E] each
    own_squares = torch.stack(squares).sum(0) if squares else None
    rest = [_sum_of_squares(gradient, 0) for name, gradient in gradients.items() if name not in own]
    shared = torch.stack(rest).sum() if rest else None
    if by == "ensemble":
        parts = [] if shared is None else [shared]
        if own_squares is not None:
            counts = own_squares.isfinite()
            counts[sorted(stopped)] = False
            parts.append(torch.where(counts, own_squares, 0).sum())
        shared = torch.stack(parts).sum()
        own_squares = None if own_squares is None else shared.expand_as(own_squares)

    def scale(square: Tensor) -> Tensor:
        return (max_norm / (square.sqrt() + eps)).clamp(max=1)

    scaled = {}
    for name, gradient in gradients.items():
        if name in own:
            assert own_squares is not None
            factor = scale(own_squares).reshape(-1, *[1] * (gradient.ndim - 1))
        else:
            assert shared is not None
            factor = scale(shared)
        scaled[name] = gradient * factor.to(gradient.dtype)
    return scaled


def _sum_of_squares(tensor: Tensor, keep: int) -> Tensor:
    """The sum over all axes but the first `keep`; in float32 for half precision, in which squares overflow."""
    tensor = tensor.abs()
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()
    return tensor.sum(tuple(range(keep, tensor.ndim))) if tensor.ndim > keep else tensor
