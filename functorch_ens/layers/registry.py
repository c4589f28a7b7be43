"""What a rank-1 weight means for each kind of layer: its axes, its exact value, and the registry of the fast rules.

A member's effective weight is `W_i = W * (r_i s_i^T)`: `s` scales what enters the layer, `r` what leaves it,

    y_i = (W (x * s_i)) * r_i + b

(Wen, Tran & Ba 2020, arXiv:2002.06715, section 3.1; the paper calls `r` what is `s` here, and the other way round).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from functorch_ens.anatomy import Site, is_numeric


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

    def multiplied(
        self, weight: Tensor, *, r: Tensor | None = None, s: Tensor | None = None, spatial: int = 0
    ) -> Tensor:
        """`weight` times `r` along its output axis and `s` along its input axis, where they are given.

        Its first two axes are followed by `spatial` others. Any of the tensors may have a leading member axis.
        """
        first, second = (s, r) if self.transposed else (r, s)
        axes, ones = "".join(f" k{i}" for i in range(spatial)), " 1" * spatial
        scales = []
        if first is not None:
            scales.append(rearrange(first, f"... (g a) -> ... g a 1{ones}", g=self.groups))
        if second is not None:
            scales.append(rearrange(second, f"... (g b) -> ... g 1 b{ones}", g=self.groups))
        parts = rearrange(weight, f"... (g a) b{axes} -> ... g a b{axes}", g=self.groups)
        return rearrange(parts * prod(scales), f"... g a b{axes} -> ... (g a) b{axes}")


class Rank1(NamedTuple):
    """One member's rank-1 weight: the shared `weight`, with `r` `[out]` and `s` `[in]`."""

    weight: Tensor
    r: Tensor
    s: Tensor
    layout: Layout = Layout()
    side: str = "auto"
    """Where a fast rule multiplies `s` in, one of `products.SIDES`."""

    def materialise(self) -> Tensor:
        """The effective weight `W * (r s^T)`, of the shape of `weight`."""
        return self.layout.multiplied(self.weight, r=self.r, s=self.s, spatial=self.weight.ndim - 2)


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


rank1_layout(nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, layout=lambda layer: Layout())
rank1_layout(nn.Embedding, nn.EmbeddingBag, layout=lambda layer: Layout(transposed=True))
rank1_layout(_ConvNd, layout=lambda layer: Layout(layer.groups))
rank1_layout(_ConvTransposeNd, layout=lambda layer: Layout(layer.groups, transposed=True))
