"""One member of an ensemble as a pure function of its tensors: the structure of a model, without its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from functorch_ens import _torch
from functorch_ens.anatomy import (
    Anatomy,
    Layout,
    Site,
    check_replaceable,
    copy_structure,
    is_compiled,
    rank1_names,
)
from functorch_ens.forward.snapshot import Snapshot
from functorch_ens.layers.registry import specialise


class Template:
    """The structure of `model`, on the meta device, called with the tensors of one member.

    A weight that comes with its `r` and `s` is `W * (r s^T)` wherever the model's code reads it; a layer with a fast
    rule for its whole forward uses that instead. Everything else is as the model has it.
    """

    def __init__(self, anatomy: Anatomy, side: str = "auto") -> None:
        check_replaceable(anatomy)
        model = anatomy.model
        memo: dict[int, Any] = {}
        self._module = copy_structure(model, _on_meta, _on_meta, memo)
        written = [module for module in model.modules() if not is_compiled(module)]
        self._pairs = list(zip(written, self._module.modules(), strict=True))
        blank = Anatomy(self._module)
        for layer, own in self._pairs:
            specialise(own, layer, blank.layouts_of(own), side)
        self._buffers = anatomy.buffer_sites
        self._aliases = _aliases(anatomy.sites, blank.sites, blank.layouts) | _aliases(
            self._buffers, blank.buffer_sites, {}
        )
        self.kind = anatomy.kind
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
            with nullcontext() if torch.compiler.is_compiling() else _torch.checkpoints_passed_over():
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
        found = {name: places[0].buffer for name, places in self._buffers.items()}
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
