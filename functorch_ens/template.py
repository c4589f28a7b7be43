"""One member of an ensemble as a pure function of its tensors: the structure of a model, without its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.backends.mha
from torch import Tensor, nn
from torch.func import functional_call

from functorch_ens.pure import pure_forward
from functorch_ens.rank1 import Layout, Rank1, Rule, can_be_rank1, layout_of, rank1_names, rule_of
from functorch_ens.structure import buffer_sites, copy_structure, parameter_sites


class Template:
    """The structure of `model`, on the meta device, called with the tensors of one member.

    A weight that comes with its `r` and `s` is `W * (r s^T)` wherever the model's code reads it; a layer with a fast
    rule for its whole forward uses that instead. Everything else is as the model has it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._module = copy_structure(model, _on_meta, _on_meta)
        self._pairs = list(zip(model.modules(), self._module.modules(), strict=True))
        for module in self._module.modules():
            if (forward := pure_forward(module)) is not None:
                module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
        self._aliases = _install_rank1(self._module) | {
            name: [site.name for site in places] for name, places in buffer_sites(self._module).items()
        }
        self._pristine = [_Pristine(module) for module in self._module.modules()]

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output of one member with the parameters `tensors`, and what its `buffers`, written in place, became."""
        given = {alias: tensor for name, tensor in {**tensors, **buffers}.items() for alias in self._aliases[name]}
        try:
            # torch.compile cannot trace the switch of the fast path.
            with nullcontext() if torch.compiler.is_compiling() else _differentiable_attention():
                output = functional_call(self._module, given, args, kwargs, tie_weights=False)
        finally:
            self._restore()
        # functional_call writes what the forward assigned to its buffers back to the dict that it was given.
        return output, {name: given[name] for name in buffers}

    def follow(self) -> None:
        """Take over which modules of the model are in training mode."""
        for module, own in self._pairs:
            if own.training != module.training:
                own.training = module.training

    def _restore(self) -> None:
        """Forget what a call has left on the modules (caches, counters, vmap wrappers)."""
        if torch.compiler.is_compiling():
            for pristine in self._pristine:
                pristine.reassign()
        else:
            for pristine in self._pristine:
                pristine.restore()


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Without the inference fast path of torch's transformer layers, which has no derivative and no batching rule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _install_rank1(template: nn.Module) -> dict[str, list[str]]:
    """Make every weight that can be rank-1 read its `r` and `s`; return all the names each tensor is tied under."""
    sites = parameter_sites(template)
    aliases = {name: [site.name for site in places] for name, places in sites.items()}
    layouts: dict[nn.Module, dict[str, Layout]] = {}
    for name, places in sites.items():
        if not can_be_rank1(places[0].parameter) or not sites.keys().isdisjoint(rank1_names(name)):
            continue
        layout = layout_of(places[0].module)
        for site in places:
            layouts.setdefault(site.module, {})[site.leaf] = layout
            for vector, alias in zip(rank1_names(name), rank1_names(site.name), strict=True):
                aliases.setdefault(vector, []).append(alias)
    for layer, leaves in layouts.items():
        for leaf in leaves:
            layer._parameters.update(dict.fromkeys(rank1_names(leaf)))
        layer.__class__ = _rank1_class(layer, leaves)
    return aliases


def _rank1_class(layer: nn.Module, layouts: Mapping[str, Layout]) -> type[nn.Module]:
    """The class of `layer`, in which the weights named by `layouts` read their `r` and `s` where these are given."""
    cls = type(layer)
    namespace: dict[str, Any] = {leaf: _effective(leaf, layout) for leaf, layout in layouts.items()}
    found = rule_of(layer)
    if found is not None:
        rule, leaves = found
        # A rule reads a weight as its own layer does; one tied to a layer of another layout is multiplied out instead.
        if all(layouts.get(leaf) == layout_of(layer) for leaf in leaves):
            namespace["forward"] = _ruled(cls.forward, rule, leaves, layouts)
    return type(cls.__name__, (cls,), namespace)


def _effective(leaf: str, layout: Layout) -> property:
    """An attribute that reads the parameter `leaf`, multiplied out where its `r` and `s` are given."""

    def read(self: nn.Module) -> Tensor | None:
        rank1 = _given(self, leaf, layout)
        return self._parameters[leaf] if rank1 is None else rank1.materialise()

    return property(read)


def _ruled(
    own: Callable[..., Any], rule: Rule, leaves: frozenset[str], layouts: Mapping[str, Layout]
) -> Callable[..., Any]:
    """A forward by `rule` where the weights `leaves`, and no others, have `r` and `s`; else the layer's own."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights = {leaf: _given(self, leaf, layout) for leaf, layout in layouts.items()}
        weights = {leaf: rank1 for leaf, rank1 in weights.items() if rank1 is not None}
        return rule(self, *args, **weights, **kwargs) if weights.keys() == leaves else own(self, *args, **kwargs)

    return forward


def _given(layer: nn.Module, leaf: str, layout: Layout) -> Rank1 | None:
    """The rank-1 weight `leaf` of `layer`; None where its `r` and `s` are not given, or it is not there itself."""
    weight, (r, s) = layer._parameters[leaf], (layer._parameters[vector] for vector in rank1_names(leaf))
    return None if weight is None or r is None or s is None else Rank1(weight, r, s, layout)


_INTERNAL = frozenset(vars(nn.Module()))
_REGISTERED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class _Pristine:
    """The attributes of a module as they were when this was made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        state = vars(module)
        mutable = [
            name
            for name, value in state.items()
            if name in _REGISTERED or (name not in _INTERNAL and _is_mutable(value))
        ]
        self._fixed = {name: value for name, value in state.items() if name not in mutable}
        self._mutable = {name: _copied(state[name]) for name in mutable}
        self._plain = {name: value for name, value in self._fixed.items() if name not in _INTERNAL}

    def reassign(self) -> None:
        """`restore` as torch.compile can trace it: undoes assigned attributes, but no change inside a list or dict."""
        for name, value in self._plain.items():
            if getattr(self._module, name) is not value:
                setattr(self._module, name, value)

    def restore(self) -> None:
        """Put every attribute back, but for the training mode, which is not a forward's to change."""
        state = vars(self._module)
        training = state["training"]
        state.clear()
        state.update(self._fixed)
        state.update({name: _copied(value) for name, value in self._mutable.items()})
        state["training"] = training


def _is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set | Tensor)


def _copied(value: Any) -> Any:
    """A copy of a plain attribute that no in-place change of the original reaches; modules and parameters are kept."""
    if isinstance(value, Tensor):
        with torch._C._DisableFuncTorch():  # a clone made inside vmap or grad would be one of their wrappers
            return value if value.is_meta else value.clone()
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: _copied(item) for key, item in value.items()})
        return new
    if isinstance(value, list):
        return [_copied(item) for item in value] if type(value) is list else copy.copy(value)
    return copy.copy(value) if isinstance(value, set) else value
