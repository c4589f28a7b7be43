"""The table of the kinds of layers: one row for each, written in the file of that kind.

A row has four facts: the layout of the weights (for `r` and `s`), the pure form (methods in place of torch's own, which
torch.func can follow and vmap computes fast), the fast rule for rank-1 weights, and the obstacle to vmap. Users add
layouts and rules by `rank1_layout` and `rank1_rule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import (
    Anatomy,
    Layout,
    Layouts,
    check_layer_types,
    layout_of,
    member_names,
    register_layout,
    rows_of,
)
from functorch_ens.checks import check_bool, check_callable
from functorch_ens.layers.weight import member_weight


class Rule(NamedTuple):
    """A fast forward, the weights that it serves, and the layers that it is for."""

    forward: Callable[..., Any]
    weights: frozenset[str]
    when: Callable[[Any], bool]
    lora: bool
    """Whether it serves low-rank weights too."""

    def serves(self, weights: Set[str], low_rank: bool) -> bool:
        """Whether it serves a layer in which members differ in just these `weights`, some of which are `low_rank`."""
        return weights == self.weights and (self.lora or not low_rank)


@dataclass(frozen=True)
class Kind:
    """The row of one kind of layer. The layout of its weights is in the table of `anatomy`."""

    pure: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """By name, methods with the same outputs, gradients, new buffers and random numbers as the layer's own."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that the pure form sets on the layer."""
    rule: Rule | None = None
    obstacle: str | None = None
    """What the layer calls that vmap cannot serve."""


_kinds: dict[type[nn.Module] | str, Kind] = {}  # a str: a pattern of full names of classes that are not imported


def register(
    *layer_types: type[nn.Module] | str,
    base: type[nn.Module] | None = None,
    layout: Callable[[Any], Layouts] | None = None,
    pure: Mapping[str, Callable[..., Any]] | None = None,
    attributes: Mapping[str, Any] | None = None,
    rule: Callable[..., Any] | None = None,
    when: Callable[[Any], bool] = lambda layer: True,
    obstacle: str | None = None,
) -> None:
    """Add the row of one kind of layer: the classes `layer_types`, given themselves or by patterns of their full names.

    `base`, a common base of them, extends the `layout` to its other subclasses. The fast `rule` serves the layers for
    which `when(layer)` is true, as in `rank1_rule`, and low-rank weights too.
    """
    found = None if rule is None else Rule(rule, _served(rule), when, lora=True)
    for layer_type in layer_types:
        _kinds[layer_type] = Kind(pure=pure or {}, attributes=attributes or {}, rule=found, obstacle=obstacle)
    if layout is not None:
        register_layout(layer_types if base is None else [base], layout)


def rank1_rule(
    *layer_types: type[nn.Module], when: Callable[[Any], bool] = lambda layer: True, lora: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a fast forward for layers with rank-1 weights; used as a decorator.

    The rule is called in place of the layer's own forward, as `rule(layer, *inputs, weight=Rank1(...))`. It is written
    for ONE member, and its keyword-only arguments name the weights that it serves. `weight.scale_input(x)` multiplies
    `s` into the input or into the weight, as `rank1_side` says; `weight.scale_output(y, bias)` multiplies by `r` and
    adds the bias. `weight.linear(x, bias)` is both, around one matrix product, and
    `weight.apply(x, operation, bias)` around another operation. With `lora=True` the rule serves low-rank weights too
    (`lora_params`), as these two methods do; the first two leave them out.

    The exact `(W + B A) * (r s^T)` is used instead where members differ in other weights of the layer than these, where
    a subclass has a forward of its own, where `when(layer)` is false, and with `rank1_side="weight"`.

    >>> import torch, functorch_ens as fe
    >>> class Scaled(torch.nn.Conv1d):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> @fe.rank1_rule(Scaled)
    ... def scaled(layer, x, *, weight):
    ...     x, W = weight.scale_input(x)
    ...     return 2 * weight.scale_output(torch.conv1d(x, W), layer.bias)
    >>> model = Scaled(3, 2, kernel_size=1)
    >>> fe.make_forward(model)(fe.batchensemble_params(model, E=4), torch.ones(5, 3, 8)).shape
    torch.Size([4, 5, 2, 8])

    Raises:
        TypeError: one of `layer_types` is not a module class, `when` is not callable, `lora` is no bool, or the rule
            has no keyword-only argument.
    """
    check_layer_types(layer_types)
    check_bool(lora, "lora")
    check_callable(when, "when", "a predicate on the layer", ["layer"])

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        check_callable(rule, "rule", "a function (layer, x, *, weight)")
        weights = _served(rule)
        if not weights:
            raise TypeError(
                f"rule: {rule!r} must take the weights it serves as keyword-only arguments: (layer, x, *, weight)"
            )
        for layer_type in layer_types:
            _kinds[layer_type] = replace(_kinds.get(layer_type, Kind()), rule=Rule(rule, weights, when, lora))
        return rule

    return decorate


def _served(rule: Callable[..., Any]) -> frozenset[str]:
    """The weights that `rule` serves: its keyword-only arguments."""
    arguments = inspect.signature(rule).parameters.values()
    return frozenset(a.name for a in arguments if a.kind is a.KEYWORD_ONLY and a.default is a.empty)


# --------------------------------------------------------------------------------------------------------------------
# Look-ups


def rule_of(layer: nn.Module) -> Rule | None:
    """The fast rule for `layer`; None where there is none, or where the layer computes otherwise than its rule."""
    rows = rows_of(layer, _kinds)
    # A subclass or an instance that overrides one of these computes something else than the registered class.
    methods = {"forward"}.union(*(kind.pure for _, kind in rows))
    rules: dict[type, Rule] = {}
    for cls, kind in rows:
        if kind.rule:
            rules.setdefault(cls, kind.rule)  # that of the class itself comes before that of a pattern
    if not methods.isdisjoint(vars(layer)):
        return None
    for cls in type(layer).__mro__:
        if rule := rules.get(cls):
            return rule if rule.when(layer) else None
        if not methods.isdisjoint(vars(cls)):
            return None
    return None


def rule_for(layer: nn.Module, layouts: Mapping[str, Layout]) -> Rule | None:
    """The rule for `layer` where its weights have these `layouts`; None where it has no rule that reads them so.

    A rule reads a weight in the layout of its own layer. A weight tied to a layer that reads it the other way round,
    such as an embedding, is turned for it.
    """
    found = rule_of(layer)
    if found is None:
        return None
    for leaf in found.weights:
        own = layout_of(layer, leaf)
        if layouts.get(leaf) not in ((own, own.turned) if own.groups == 1 else (own,)):
            return None
    return found


def obstacle(anatomy: Anatomy) -> str | None:
    """The first module of the model that vmap cannot serve, and why; None where none is known."""
    for name, module in anatomy.modules.items():
        where = f"{name or 'the model'} ({type(module).__name__})"
        for _, kind in rows_of(module, _kinds):
            if kind.obstacle:
                return f"{where} calls {kind.obstacle}"
        if _torch.has_backward_hooks(module):
            return f"{where} has backward hooks, which vmap passes by"
    for name, parameter in anatomy.parameters.items():
        if _torch.hooks_of(parameter):
            return f"{name} has hooks on its gradient, which are for that of one network"
    return None


_TAKE_ANY_SIZE = (
    *(nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.RMSNorm, nn.PReLU),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Softmax, nn.LogSoftmax, nn.Dropout),
)


def takes_any_size(anatomy: Anatomy) -> bool:
    """Whether one graph by vmap serves inputs of all sizes, as far as the layers of torch.nn tell.

    torch's rules of vmap for other layers read the sizes as numbers, so that each new size makes another graph.
    """
    leaves = [module for module in anatomy.modules.values() if not any(True for _ in module.children())]
    return all(isinstance(leaf, _TAKE_ANY_SIZE) or not type(leaf).__module__.startswith("torch.nn") for leaf in leaves)


# --------------------------------------------------------------------------------------------------------------------
# A layer of a template


def specialise(copy: Any, layer: nn.Module, layouts: Mapping[str, Layout], side: str) -> None:
    """Give `copy`, a template's copy of `layer`, its pure form, and the weights in `layouts` what members add to them.

    The copy has a fast rule too, unless `side` is `"weight"`. A rule stands for the forward of the model's own layer.
    """
    rule = None if side == "weight" else rule_for(layer, layouts)
    cls: Any = type(copy)
    rows = rows_of(copy, _kinds)
    pure = tuple((name, new) for base, kind in rows for name, new in kind.pure.items() if _defines(base, copy, name))
    for _, kind in reversed(rows):
        for name, value in kind.attributes.items():
            setattr(copy, name, value)
    for leaf in layouts:
        _torch.parameters_of(copy).update(dict.fromkeys(member_names(leaf)))
    if pure or layouts:
        read_as = {leaf: layout_of(layer, leaf) for leaf in layouts}
        turned = tuple((leaf, own) for leaf, own in read_as.items() if own != layouts[leaf])
        copy.__class__ = _specialised(cls, pure, tuple(layouts.items()), rule, turned, side)


def _defines(cls: type, layer: nn.Module, method: str) -> bool:
    """Whether `layer` has its `method` from `cls`, and nothing nearer to it overrides that."""
    owner = next((base for base in type(layer).__mro__ if method in vars(base)), None)
    return owner is cls and method not in vars(layer)


_made: WeakValueDictionary[Hashable, type[nn.Module]] = WeakValueDictionary()
"""Layers that are alike get the same class, so torch.compile reuses its code for templates of one structure.

A class goes with the last template that has it: torch makes a class of its own for each parametrised layer.
"""


def _specialised(cls: Any, *options: Any) -> type[nn.Module]:
    """`_subclass(cls, *options)`, made once as long as it is in use."""
    key = id(cls), *options  # the subclass keeps cls alive, so nothing else gets its id
    return _made.get(key) or _made.setdefault(key, _subclass(cls, *options))


def _subclass(
    cls: Any,
    pure: tuple[tuple[str, Callable[..., Any]], ...],
    layouts: tuple[tuple[str, Layout], ...],
    rule: Rule | None,
    turned: tuple[tuple[str, Layout], ...],
    side: str,
) -> type[nn.Module]:
    """A subclass of `cls` with the methods `pure`, whose weights in `layouts` are the effective ones of a member.

    The rule reads those in `turned` by the layouts there: a tied weight may be another layer's the other way round.
    """
    methods = dict(pure)
    plain = methods.get("forward", cls.forward)

    def effective(leaf: str, layout: Layout) -> property:
        def read(self: nn.Module) -> Tensor | None:
            own = _torch.parameters_of(self)
            weight = member_weight(own, leaf, layout, side)
            return own[leaf] if weight is None else weight.materialise()

        return property(read)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert rule is not None
        own = _torch.parameters_of(self)
        found = {leaf: member_weight(own, leaf, layout, side) for leaf, layout in layouts}
        weights = {leaf: weight for leaf, weight in found.items() if weight is not None}
        for leaf, layout in turned:
            if leaf in weights:
                weights[leaf] = weights[leaf].read_as(layout)
        if not rule.serves(weights.keys(), any(weight.A is not None for weight in weights.values())):
            return plain(self, *args, **kwargs)
        return rule.forward(self, *args, **weights, **kwargs)

    namespace: dict[str, Any] = methods | {leaf: effective(leaf, layout) for leaf, layout in layouts}
    if rule is not None:
        namespace["forward"] = forward
    return type(cls.__name__, (cls,), namespace)
