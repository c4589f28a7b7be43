"""Layers of torch.nn that write to their parameters, or that vmap cannot follow, in a form without either.

Each function stands for the forward of one layer class, with the same outputs, gradients and new buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def pure_forward(layer: nn.Module) -> Callable[..., Any] | None:
    """The pure form of the forward of `layer`; None where its own will do."""
    own = type(layer).forward
    if isinstance(layer, nn.Embedding) and own is nn.Embedding.forward and layer.max_norm is not None:
        return _embedding
    if isinstance(layer, nn.EmbeddingBag) and own is nn.EmbeddingBag.forward and layer.max_norm is not None:
        return _embedding_bag
    if isinstance(layer, _BatchNorm) and own is _BatchNorm.forward and layer.momentum is None:
        return _cumulative_batch_norm if layer.track_running_stats else None
    return None


def _renormalised(rows: Tensor, layer: Any) -> Tensor:
    """`rows` `[..., D]` no longer than `max_norm`. Torch shortens the parameter itself, unseen by its gradient."""
    norms = rows.norm(layer.norm_type, dim=-1, keepdim=True)
    scale = torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), 1.0)
    return rows + (rows * scale - rows).detach()


def _embedding(layer: nn.Embedding, input: Tensor) -> Tensor:
    rows = F.embedding(input, layer.weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    return _renormalised(rows, layer)


def _embedding_bag(
    layer: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    return F.embedding_bag(
        input,
        _renormalised(layer.weight, layer),
        offsets,
        scale_grad_by_freq=layer.scale_grad_by_freq,
        mode=layer.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )


def _cumulative_batch_norm(layer: Any, input: Tensor) -> Tensor:
    """BatchNorm whose running statistics are plain averages; torch's own reads the count of batches from its tensor."""
    layer._check_input_dim(input)
    if not layer.training:
        return F.batch_norm(input, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
    with torch.no_grad():
        layer.num_batches_tracked = layer.num_batches_tracked + 1
        over = [dim for dim in range(input.ndim) if dim != 1]
        var, mean = torch.var_mean(input, over)
        weight = 1.0 / layer.num_batches_tracked.to(mean.dtype)
        layer.running_mean = layer.running_mean + (mean - layer.running_mean) * weight
        layer.running_var = layer.running_var + (var - layer.running_var) * weight
    return F.batch_norm(input, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
