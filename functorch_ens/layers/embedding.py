"""Embedding and EmbeddingBag: `s` and `A` run over the vocabulary, `r` and `B` over the embedding dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import linear
from functorch_ens.layers.registry import register
from functorch_ens.layers.weight import Rank1


def _renormalised(rows: Tensor, layer: Any) -> Tensor:
    """`rows` `[..., D]` shortened to `max_norm`. Torch shortens the parameter in place, without a gradient."""
    norms = rows.norm(layer.norm_type, dim=-1, keepdim=True)
    scale = torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), 1.0)
    return rows + (rows * scale - rows).detach()


def _pure(layer: nn.Embedding, input: Tensor) -> Tensor:
    if layer.max_norm is None:
        return nn.Embedding.forward(layer, input)
    rows = F.embedding(input, layer.weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    return _renormalised(rows, layer)


def _pure_bag(
    layer: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    if layer.max_norm is None:
        return nn.EmbeddingBag.forward(layer, input, offsets, per_sample_weights)
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


def _rule(layer: nn.Embedding, input: Tensor, *, weight: Rank1) -> Tensor:
    rows = F.embedding(input, weight.weight)
    if weight.factors:
        A, B = weight.factors
        rows = rows + linear(F.embedding(input, A.mT), B)
    if weight.r is not None and weight.s is not None:
        rows = rows * F.embedding(input, rearrange(weight.s, "v -> v 1")) * weight.r
    if layer.padding_idx is not None:  # padding has no gradient
        rows = torch.where(rearrange(input == layer.padding_idx, "... -> ... 1"), rows.detach(), rows)
    return rows


def _rule_scaled(layer: Any, input_ids: Tensor, *, weight: Rank1) -> Tensor:
    rows = _rule(layer, input_ids, weight=weight)
    scale = layer.embed_scale
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def _has_plain_rows(layer: Any) -> bool:
    """Whether the rows are those of the weight: `max_norm` shortens them, and the other divides their gradients."""
    return layer.max_norm is None and not layer.scale_grad_by_freq


register(
    nn.Embedding,
    layout=lambda layer: Layout(transposed=True),
    pure={"forward": _pure},
    attributes={"sparse": False},  # the gradient of a stack is dense: torch has no sparse one
    rule=_rule,
    when=_has_plain_rows,
)
# The vocabularies of Gemma, BART and others in transformers are multiplied by a number.
register("transformers.models.*ScaledWordEmbedding", rule=_rule_scaled, when=_has_plain_rows)
register(
    nn.EmbeddingBag,
    layout=lambda layer: Layout(transposed=True),
    pure={"forward": _pure_bag},
    attributes={"sparse": False},
)
