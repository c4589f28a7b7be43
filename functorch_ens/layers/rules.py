"""The fast rules: a layer with `r` and `s` computed so that the shared weight serves all members in one product.

    y_i = (W (x * s_i)) * r_i + b

(Wen, Tran & Ba 2020, arXiv:2002.06715, section 3.1, with the letters as in `rank1`.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from functorch_ens.layers.operators import by_channel, scaled
from functorch_ens.layers.pure import conv_transpose, linear
from functorch_ens.layers.registry import Rank1, rank1_rule


def _enter(x: Tensor, weight: Rank1) -> tuple[Tensor, Tensor]:
    """What enters a layer, `[..., in, *spatial]`, and its weight, one of them times `s`.

    An `x` that does not fit is left as it is: broadcasting it would hide the error that the layer itself has for it.
    """
    channels = x.ndim - 1 - (weight.weight.ndim - 2)
    if channels < 0 or x.shape[channels] != weight.s.shape[0]:
        return x, weight.weight
    return scaled(x, weight)


def _leave(y: Tensor, r: Tensor, bias: Tensor | None, spatial: int = 0) -> Tensor:
    """Scale what leaves a layer, `[..., out, *spatial]`, by `r` and add the bias, in the dtype of `y` (autocast)."""
    y = y * by_channel(r, spatial).to(y.dtype)
    return y if bias is None else y + by_channel(bias, spatial).to(y.dtype)


@rank1_rule(nn.Linear)
def _linear(layer: nn.Linear, input: Tensor, *, weight: Rank1) -> Tensor:
    return _leave(linear(*_enter(input, weight)), weight.r, layer.bias)


@rank1_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(layer: Any, input: Tensor, *, weight: Rank1) -> Tensor:
    # `_conv_forward` also does the padding modes; a scale per channel commutes with all of them.
    y = layer._conv_forward(*_enter(input, weight), None)
    return _leave(y, weight.r, layer.bias, spatial=len(layer.kernel_size))


@rank1_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None, *, weight: Rank1) -> Tensor:
    y = conv_transpose(layer, *_enter(input, weight), None, output_size)
    return _leave(y, weight.r, layer.bias, spatial=len(layer.kernel_size))


# Not where the layer shortens its effective rows, or divides their gradients by how often they were looked up.
@rank1_rule(nn.Embedding, when=lambda layer: layer.max_norm is None and not layer.scale_grad_by_freq)
def _embedding(layer: nn.Embedding, input: Tensor, *, weight: Rank1) -> Tensor:
    rows = F.embedding(input, weight.weight, layer.padding_idx)
    s = F.embedding(input, rearrange(weight.s, "v -> v 1"), layer.padding_idx)
    r = weight.r
    if layer.padding_idx is not None:
        # Padding teaches nothing: F.embedding stops the gradient of W and s there, and this that of r.
        r = torch.where(rearrange(input == layer.padding_idx, "... -> ... 1"), r.detach(), r)
    return rows * s * r


@rank1_rule(
    nn.MultiheadAttention,
    when=lambda layer: layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn,
)
def _attention(
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
        packed = _leave(linear(*_enter(enter(query), in_proj_weight)), in_proj_weight.r, layer.in_proj_bias)
        parts = list(rearrange(packed, "b l (three d) -> three b l d", three=3))
    else:
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        thirds = zip(in_proj_weight.weight.chunk(3), in_proj_weight.r.chunk(3), strict=True)
        weights_of_three = [in_proj_weight._replace(weight=W, r=r) for W, r in thirds]
        pieces = zip((query, key, value), weights_of_three, biases, strict=True)
        parts = [_leave(linear(*_enter(enter(x), third)), third.r, bias) for x, third, bias in pieces]
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
