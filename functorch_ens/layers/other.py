"""Layers that have no weights of their own to scale, but a pure form or an obstacle to vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from functorch_ens.layers.registry import register


def _pure_stochastic_depth(layer: Any, input: Tensor) -> Tensor:
    """torchvision's StochasticDepth (Huang et al. 2016, arXiv:1603.09382), without random numbers drawn in place."""
    if not layer.training or layer.p == 0.0:
        return input
    rows = input.shape[0] if layer.mode == "row" else 1
    survival = 1.0 - layer.p
    noise = torch.bernoulli(
        torch.empty(rows, *[1] * (input.ndim - 1), dtype=input.dtype, device=input.device), survival
    )
    return input * (noise / survival if survival > 0.0 else noise)


def _pure_bloom_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """BLOOM's GELU (by tanh) as operators, of which torch knows the gradient; it is an old autograd.Function there."""
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x * x * x)))


register(nn.RReLU, obstacle="aten::rrelu, which vmap has no rule for")
register(nn.CrossMapLRN2d, obstacle="an autograd.Function that torch.func cannot follow")
register(nn.AdaptiveLogSoftmaxWithLoss, obstacle="operations that depend on the values of its target")
register("transformers.models.bloom.modeling_bloom.BloomGelu", pure={"forward": _pure_bloom_gelu})
register("torchvision.ops.stochastic_depth.StochasticDepth", pure={"forward": _pure_stochastic_depth})
