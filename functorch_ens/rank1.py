"""What a rank-1 weight means for each kind of layer: its axes, its exact value, and the fast rules.

A member's effective weight is `W_i = W * (r_i s_i^T)`: `s` scales what enters the layer, `r` what leaves it,

    y_i = (W (x * s_i)) * r_i + b

(Wen, Tran & Ba 2020, arXiv:2002.06715, section 3.1; the paper calls `r` what is `s` here, and the other way round).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from functorch_ens.pure import conv_transpose, linear
from functorch_ens.structure import Site, is_numeric


class Layout(NamedTuple):
    """How the axes of a weight are read: axis 0 is the output and axis 1 the input, or the other way round.

    In a grouped layer axis 0 is split in `groups`, each of which has its own part of the other side.
    """

    groups: int = 1
    transposed: bool = False  # axis 0 is the input

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """The lengths (out, in) of `r` and `s` for `weight`."""
        first, second = weight.shape[0], weight.shape[1] * self.groups
        return (second, first) if self.transposed else (first, second)


class Rank1(NamedTuple):
    """One member's rank-1 weight: the shared `weight`, with `r` `[out]` and `s` `[in]`."""

    weight: Tensor
    r: Tensor
    s: Tensor
    layout: Layout = Layout()

    def materialise(self) -> Tensor:
        """The effective weight `W * (r s^T)`, of the shape of `weight`."""
        first, second = (self.s, self.r) if self.layout.transposed else (self.r, self.s)
        groups = self.layout.groups
        scale = rearrange(first, "(g a) -> g a 1", g=groups) * rearrange(second, "(g b) -> g 1 b", g=groups)
        trailing = " 1" * (self.weight.ndim - 2)
        return self.weight * rearrange(scale, f"g a b -> (g a) b{trailing}")


def rank1_names(name: str) -> tuple[str, str]:
    """The names of the `r` and the `s` of the weight called `name`."""
    return f"{name}_r", f"{name}_s"


def can_be_rank1(parameter: Tensor) -> bool:
    """Whether `parameter` has the two axes that `r` and `s` run over, and values to scale."""
    return parameter.ndim >= 2 and is_numeric(parameter)


def rank1_layouts(sites: Mapping[str, list[Site]]) -> dict[str, Layout]:
    """The layout of every parameter that can have `r` and `s`: that of the first layer it is in."""
    return {
        name: layout_of(places[0].module)
        for name, places in sites.items()
        if can_be_rank1(places[0].parameter) and sites.keys().isdisjoint(rank1_names(name))
    }


# --------------------------------------------------------------------------------------------------------------------
# The registry: per layer class, the layout of its weights and, where there is one, a forward faster than materialising.


class Rule(NamedTuple):
    """A fast forward, the weights that it serves, and the layers that it is for."""

    forward: Callable[..., Any]
    weights: frozenset[str]
    when: Callable[[Any], bool]


_layouts: dict[type[nn.Module], Callable[[Any], Layout]] = {}
_rules: dict[type[nn.Module], Rule] = {}


def rank1_layout(*layer_types: type[nn.Module], layout: Callable[[Any], Layout]) -> None:
    """Say how the weights of `layer_types` (and their subclasses) are laid out, as a function of the layer.

    Raises:
        TypeError: one of `layer_types` is not a module class.
    """
    _check_layer_types(layer_types)
    for layer_type in layer_types:
        _layouts[layer_type] = layout


def rank1_rule(
    *layer_types: type[nn.Module], when: Callable[[Any], bool] = lambda layer: True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a fast forward for layers with rank-1 weights; used as a decorator.

    The rule is called in place of the layer's own forward, as `rule(layer, *inputs, weight=Rank1(...))`: it is written
    for ONE member, and its keyword-only arguments name the weights that it serves. Where a layer has other weights with
    `r` and `s` than these, a subclass has a forward of its own, or `when(layer)` is false, the exact `W * (r s^T)` is
    used instead.

    >>> import torch, functorch_ens as fe
    >>> class Scaled(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> @fe.rank1_rule(Scaled)
    ... def scaled(layer, x, *, weight):
    ...     return 2 * (torch.nn.functional.linear(x * weight.s, weight.weight) * weight.r + layer.bias)
    >>> model = Scaled(3, 2)
    >>> params = fe.batchensemble_params(model, E=4)
    >>> fe.make_forward(model)(params, torch.ones(5, 3)).shape
    torch.Size([4, 5, 2])

    Raises:
        TypeError: one of `layer_types` is not a module class, `when` is not callable, or the rule has no keyword-only
            argument.
    """
    _check_layer_types(layer_types)
    if not callable(when):
        raise TypeError(f"when: expected a predicate on the layer, got {when!r}")

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        arguments = inspect.signature(rule).parameters.values()
        weights = frozenset(a.name for a in arguments if a.kind is a.KEYWORD_ONLY and a.default is a.empty)
        if not weights:
            raise TypeError(
                f"rule: {rule!r} must take the weights it serves as keyword-only arguments: (layer, x, *, weight)"
            )
        for layer_type in layer_types:
            _rules[layer_type] = Rule(rule, weights, when)
        return rule

    return register


def _check_layer_types(layer_types: tuple[Any, ...]) -> None:
    for layer_type in layer_types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
            raise TypeError(f"layer_types: expected subclasses of torch.nn.Module, got {layer_type!r}")


def has_layout(layer: nn.Module) -> bool:
    """Whether the class of `layer`, or one above it, is in the registry of layouts."""
    return isinstance(layer, tuple(_layouts))


def layout_of(layer: nn.Module) -> Layout:
    """The layout of the weights of `layer`: that of the nearest class in the registry, or output first, then input."""
    for layer_type in type(layer).__mro__:
        if layer_type in _layouts:
            return _layouts[layer_type](layer)
    return Layout()


def rule_of(layer: nn.Module) -> Rule | None:
    """The fast rule for `layer`; None where there is none, or its forward is not the one that a rule stands for."""
    if "forward" in vars(layer):
        return None
    for layer_type in type(layer).__mro__:
        if layer_type in _rules:
            found = _rules[layer_type]
            return found if found.when(layer) else None
        # A class below the registered one that changes how it computes is another kind of layer.
        if "forward" in vars(layer_type) or "_conv_forward" in vars(layer_type):
            return None
    return None


def rule_for(layer: nn.Module, layouts: Mapping[str, Layout]) -> Rule | None:
    """The rule for `layer` where its weights are read as in `layouts`; None where it has none that reads them so.

    A rule reads a weight as its own layer does; one tied to a layer of another layout is multiplied out instead.
    """
    found = rule_of(layer)
    return found if found and all(layouts.get(leaf) == layout_of(layer) for leaf in found.weights) else None


# --------------------------------------------------------------------------------------------------------------------
# The fast rules: scale the activations, so that the shared weight serves all members in one product.


def _enter(x: Tensor, s: Tensor, spatial: int = 0) -> Tensor:
    """Scale what enters a layer, `[..., in, *spatial]`, by `s`, in the dtype of `x`.

    An `x` that does not fit is left as it is: broadcasting it would hide the error that the layer itself has for it.
    """
    if x.ndim <= spatial or x.shape[-1 - spatial] != s.shape[0]:
        return x
    return x * rearrange(s, "c -> c" + " 1" * spatial).to(x.dtype)


def _leave(y: Tensor, r: Tensor, bias: Tensor | None, spatial: int = 0) -> Tensor:
    """Scale what leaves a layer, `[..., out, *spatial]`, by `r` and add the bias, in the dtype of `y` (autocast)."""
    shape = "c -> c" + " 1" * spatial
    y = y * rearrange(r, shape).to(y.dtype)
    return y if bias is None else y + rearrange(bias, shape).to(y.dtype)


@rank1_rule(nn.Linear)
def _linear(layer: nn.Linear, input: Tensor, *, weight: Rank1) -> Tensor:
    return _leave(linear(_enter(input, weight.s), weight.weight), weight.r, layer.bias)


@rank1_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(layer: Any, input: Tensor, *, weight: Rank1) -> Tensor:
    spatial = len(layer.kernel_size)
    # `_conv_forward` also does the padding modes; a scale per channel commutes with all of them.
    y = layer._conv_forward(_enter(input, weight.s, spatial), weight.weight, None)
    return _leave(y, weight.r, layer.bias, spatial)


@rank1_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None, *, weight: Rank1) -> Tensor:
    spatial = len(layer.kernel_size)
    y = conv_transpose(layer, _enter(input, weight.s, spatial), weight.weight, None, output_size)
    return _leave(y, weight.r, layer.bias, spatial)


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

    weight, r, s = in_proj_weight.weight, in_proj_weight.r, in_proj_weight.s
    if query is key and key is value:
        packed = _leave(linear(_enter(enter(query), s), weight), r, layer.in_proj_bias)
        parts = list(rearrange(packed, "b l (three d) -> three b l d", three=3))
    else:
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        pieces = zip((query, key, value), weight.chunk(3), r.chunk(3), biases, strict=True)
        parts = [_leave(linear(_enter(enter(x), s), W), out, bias) for x, W, out, bias in pieces]
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


rank1_layout(nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, layout=lambda layer: Layout())
rank1_layout(nn.Embedding, nn.EmbeddingBag, layout=lambda layer: Layout(transposed=True))
rank1_layout(_ConvNd, layout=lambda layer: Layout(layer.groups))
rank1_layout(_ConvTransposeNd, layout=lambda layer: Layout(layer.groups, transposed=True))
