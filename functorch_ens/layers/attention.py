"""MultiheadAttention, the inference fast path of TransformerEncoderLayer, and relative attention of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from functorch_ens._torch import has_symbolic_sizes, is_compiling
from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import autocast
from functorch_ens.layers.registry import register
from functorch_ens.layers.weight import Rank1


def _pure(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """MultiheadAttention on contiguous inputs, so that each projection is one matrix product.

    The batch is moved to the second axis, where the layer itself computes with it. There the layer does not take its
    inference fast path. Under torch.func the F.linear of a contiguous [L, B, D] gives a compiler's symbolic sizes the
    values of now, so that each length is compiled anew. Where sizes are symbolic, the inputs lie as [B, L, D].
    """
    turned = layer.batch_first and query.ndim == 3

    def turn(x: Tensor) -> Tensor:
        if x.ndim == 3 and is_compiling() and has_symbolic_sizes([x]):
            return x.contiguous().transpose(0, 1) if turned else x.transpose(0, 1).contiguous().transpose(0, 1)
        return (x.transpose(0, 1) if turned else x).contiguous()

    q = turn(query)  # One tensor stays one tensor: the layer tests whether query, key and value are the same object.
    k = q if key is query else turn(key)
    v = q if value is query else k if value is key else turn(value)
    batch_first, layer.batch_first = layer.batch_first, False
    try:
        output, weights = nn.MultiheadAttention.forward(layer, q, k, v, *args, **kwargs)
    finally:
        layer.batch_first = batch_first
    (output,) = autocast(output)
    return output.transpose(0, 1) if turned else output, weights


def _rule(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    in_proj_weight: Rank1,
) -> tuple[Tensor, Tensor | None]:
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal: expected attn_mask too, of which it is a hint")
    batched, heads = query.ndim == 3, layer.num_heads
    turned = batched and not layer.batch_first

    def enter(x: Tensor) -> Tensor:  # as [B, L, D]
        return x.transpose(0, 1) if turned else x if batched else rearrange(x, "l d -> 1 l d")

    if query is key and key is value:
        packed = in_proj_weight.linear(enter(query), layer.in_proj_bias)
        parts = list(rearrange(packed, "b l (three d) -> three b l d", three=3))
    else:
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        pieces = zip((query, key, value), in_proj_weight.chunk(3), biases, strict=True)
        parts = [third.linear(enter(x), bias) for x, third, bias in pieces]
    q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=heads) for part in parts)

    masks = []
    if attn_mask is not None:
        own = "(b h) l s -> b h l s" if attn_mask.ndim == 3 else "l s -> 1 1 l s"
        masks.append(rearrange(attn_mask, own, **({"h": heads} if attn_mask.ndim == 3 else {})))
    if key_padding_mask is not None:
        masks.append(rearrange(key_padding_mask, "b s -> b 1 1 s" if batched else "s -> 1 1 1 s"))
    mask = None
    for each in masks:
        added = (
            torch.zeros_like(each, dtype=q.dtype).masked_fill(each, -torch.inf) if each.dtype == torch.bool else each
        )
        mask = added if mask is None else mask + added

    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = layer.out_proj(rearrange(y, "b h l d -> b l (h d)"))
    return (y.transpose(0, 1) if turned else y if batched else y[0]), weights


register(
    nn.MultiheadAttention,
    layout=lambda layer: Layout(),
    pure={"forward": _pure},
    rule=_rule,
    when=lambda layer: layer.in_proj_weight is not None and layer.bias_k is None and not layer.add_zero_attn,
)
# The inference fast path has no derivative. The layer takes it only for an activation that it knows, and 0 is none.
register(nn.TransformerEncoderLayer, attributes={"activation_relu_or_gelu": 0})
# Weights [model, heads, size] of transformers, which is not imported for them. XLNet's o maps the heads to the model.
_TO_HEADS, _FROM_HEADS = Layout(transposed=True, axes=(1, 2)), Layout(axes=(1, 2))
register(
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention",
    layout=lambda layer: {**dict.fromkeys("qkvr", _TO_HEADS), "o": _FROM_HEADS},
)
register(
    "transformers.models.funnel.modeling_funnel.FunnelRelMultiheadAttention",
    layout=lambda layer: {"r_kernel": _TO_HEADS},
)
