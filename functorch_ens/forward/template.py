"""One member of an ensemble as a pure function of its tensors: the structure of a model, without its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import checkpoint

from functorch_ens.anatomy import (
    Site,
    buffer_sites,
    check_replaceable,
    copy_structure,
    is_compiled,
    parameter_sites,
)
from functorch_ens.forward.snapshot import Snapshot
from functorch_ens.layers.pure import purify
from functorch_ens.layers.registry import Layout, Rank1, Rule, rank1_layouts, rank1_names, rule_for


class Template:
    """The structure of `model`, on the meta device, called with the tensors of one member.

    A weight that comes with its `r` and `s` is `W * (r s^T)` wherever the model's code reads it; a layer with a fast
    rule for its whole forward uses that instead. Everything else is as the model has it.
    """

    def __init__(self, model: nn.Module, side: str = "auto") -> None:
        check_replaceable(model)
        memo: dict[int, Any] = {}
        self._module = copy_structure(model, _on_meta, _on_meta, memo)
        written = [module for module in model.modules() if not is_compiled(module)]
        self._pairs = list(zip(written, self._module.modules(), strict=True))
        sites = parameter_sites(self._module)
        layouts = rank1_layouts(sites)
        leaves: dict[nn.Module, dict[str, Layout]] = {}  # of each layer, those that can be rank-1
        for name, layout in layouts.items():
            for site in sites[name]:
                leaves.setdefault(site.module, {})[site.leaf] = layout
        for layer, own in self._pairs:
            purify(own)
            if own in leaves:  # a rule stands for the forward of the model's own layer
                rule = None if side == "weight" else rule_for(layer, leaves[own])
                _install_rank1(own, leaves[own], rule, side)
        self._buffers = buffer_sites(model)
        self._aliases = _aliases(parameter_sites(model), sites, layouts) | _aliases(
            self._buffers, buffer_sites(self._module), {}
        )
        self.kind = type(self._pairs[0][0]).__name__
        self._pristine = Snapshot(self._module, {id(value) for value in memo.values()})

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
            with nullcontext() if torch.compiler.is_compiling() else _without_checkpoints():
                output = functional_call(self._module, given, args, kwargs, tie_weights=False)
        finally:
            self._pristine.restore()
        # functional_call writes what the forward assigned to its buffers back to the dict that it was given.
        return output, {name: given[name] for name in buffers}

    @property
    def made(self) -> list[object]:
        """The objects that it has made for itself and never changes; the model's own modules are not among them."""
        return [*self._module.modules(), self._pristine, self._aliases]

    def own_buffers(self) -> dict[str, Tensor]:
        """The model's own, as they are now."""
        found = {name: places[0].module._buffers[places[0].leaf] for name, places in self._buffers.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def modes(self) -> list[bool]:
        """Which modules of the model are in training mode."""
        return [module.training for module, _ in self._pairs]

    @contextmanager
    def mode(self, training: bool | None) -> Iterator[None]:
        """The model in training mode, or not, or (None) as it is; afterwards each module of it as it was."""
        before = self.modes()
        try:
            for module, _ in self._pairs:
                module.training = module.training if training is None else training
            yield
        finally:
            for (module, _), was in zip(self._pairs, before, strict=True):
                module.training = was

    def follow(self, modes: list[bool]) -> None:
        """Take over which modules are in training mode."""
        for (_, own), mode in zip(self._pairs, modes, strict=True):
            own.training = mode  # without a look at what it was, which torch.compile would guard on

    def name_of(self, module: Any) -> str | None:
        """What the model calls the part that `module`, a part of the template, stands for; None where it is no part."""
        return next((name for name, own in self._module.named_modules() if own is module), None)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """`torch.utils.checkpoint` just calls the function that it is given.

    Its second call of it, in the backward pass, would need the tensors of a member that are here for this call alone;
    and torch.func cannot follow it. `chunk_size` is what saves this memory.
    """
    own = {name: getattr(checkpoint, name) for name in _CHECKPOINTS}
    for name, plain in _CHECKPOINTS.items():
        setattr(checkpoint, name, plain)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(checkpoint, name, function)


def _no_hooks(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield  # checkpoint calls the function between the first and the second step


class _NoRecompute:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


_CHECKPOINTS: dict[str, Any] = {
    name: plain
    for name, plain in {
        "_checkpoint_without_reentrant_generator": _no_hooks,  # torch 2.11
        "_checkpoint_without_reentrant_generator_impl": _no_hooks,
        "CheckpointFunction": _NoRecompute,
    }.items()
    if hasattr(checkpoint, name)
}


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _aliases(
    model: Mapping[str, list[Site]], template: Mapping[str, list[Site]], layouts: Mapping[str, Layout]
) -> dict[str, list[str]]:
    """By its name in the model, all the names of each tensor in the template; of the `r` and `s` it can have, too."""
    aliases: dict[str, list[str]] = {}
    for name, (own, places) in zip(model, template.items(), strict=True):
        aliases[name] = [site.name for site in places]
        if own in layouts:
            tied = [rank1_names(site.name) for site in places]
            for vector, names in zip(rank1_names(name), zip(*tied, strict=True), strict=True):
                aliases[vector] = list(names)
    return aliases


def _install_rank1(layer: nn.Module, layouts: Mapping[str, Layout], rule: Rule | None, side: str) -> None:
    """Make the weights of `layer` named in `layouts` read their `r` and `s`, and its forward use its `rule`."""
    for leaf in layouts:
        layer._parameters.update(dict.fromkeys(rank1_names(leaf)))
    kind: Any = type(layer)
    layer.__class__ = _rank1_class(kind, tuple(layouts.items()), rule, side)


@cache  # one class for all layers that are alike: torch.compile then takes templates of one structure for the same
def _rank1_class(cls: Any, layouts: tuple[tuple[str, Layout], ...], rule: Rule | None, side: str) -> type[nn.Module]:
    """A subclass of `cls` in which the weights named in `layouts` read their `r` and `s` where these are given."""

    def effective(leaf: str, layout: Layout) -> property:
        def read(self: nn.Module) -> Tensor | None:
            rank1 = _given(self, leaf, layout)
            return self._parameters[leaf] if rank1 is None else rank1.materialise()

        return property(read)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert rule is not None
        weights = {leaf: _given(self, leaf, layout) for leaf, layout in layouts}
        weights = {leaf: rank1._replace(side=side) for leaf, rank1 in weights.items() if rank1 is not None}
        if weights.keys() != rule.weights:
            return cls.forward(self, *args, **kwargs)
        return rule.forward(self, *args, **weights, **kwargs)

    namespace: dict[str, Any] = {leaf: effective(leaf, layout) for leaf, layout in layouts}
    if rule is not None:
        namespace["forward"] = forward
    return type(cls.__name__, (cls,), namespace)


def _given(layer: nn.Module, leaf: str, layout: Layout) -> Rank1 | None:
    """The rank-1 weight `leaf` of `layer`; None where its `r` and `s` are not given, or it is not there itself."""
    weight, (r, s) = layer._parameters[leaf], (layer._parameters[vector] for vector in rank1_names(leaf))
    return None if weight is None or r is None or s is None else Rank1(weight, r, s, layout)
