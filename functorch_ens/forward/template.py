"""One member as a pure function of its tensors, by `functional_call` on a copy of the model without memory."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import cached_property, partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy, Layout, Site, member_names
from functorch_ens.checks import first_line
from functorch_ens.copies import check_replaceable, copy_structure
from functorch_ens.forward.settings import Settings
from functorch_ens.forward.snapshot import Snapshot
from functorch_ens.holds import Replayed, generator, held, same_state
from functorch_ens.layers.registry import specialise
from functorch_ens.layers.weight import member_weight

log = logging.getLogger(__name__)

Modes = tuple[bool, ...]
"""Which modules of a model are in training mode, in the order of `Anatomy.written`."""


class Template:
    """A copy of the model on the meta device, which is called with the tensors of one member.

    Where a weight is given with `r` and `s`, or with `A` and `B`, a layer with a fast rule computes by that rule; all
    other code that reads the weight gets `(W + B A) * (r s^T)`.
    """

    def __init__(self, anatomy: Anatomy, side: str = "auto") -> None:
        check_replaceable(anatomy)
        model = anatomy.model
        memo: dict[int, Any] = {}
        self._module = copy_structure(model, _on_meta, _on_meta, memo)
        self.modules = list(self._module.modules())
        blank = Anatomy(self._module)
        for layer, own in zip(anatomy.written, self.modules, strict=True):
            specialise(own, layer, blank.layouts_of(own), side)
        self._aliases = _aliases(anatomy.sites, blank.sites, blank.layouts) | _aliases(
            anatomy.buffer_sites, blank.buffer_sites, {}
        )
        self._layouts = anatomy.layouts
        self._hooks = {name: hooks for name, tensor in anatomy.parameters.items() if (hooks := _torch.hooks_of(tensor))}
        self._pristine = Snapshot(self._module, {id(value) for value in memo.values()})
        self._blank = blank
        holds = list(held(self._module))
        self._generators = [found for _, value in holds if (found := generator(value))]
        self.iterators = {name for name, value in holds if isinstance(value, Replayed)}
        """The attributes in which the model has iterators, which begin anew in every call."""

    def __call__(
        self,
        modes: Modes,
        tensors: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: set[str] | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output of one member, and its new buffers. The forward may write to `buffers` in place.

        The names of what else it writes to (caches, counters) are added to `written`.
        """
        settings = None if written is None else self._settings
        compiling = _torch.is_compiling()
        for own, mode in zip(self.modules, modes, strict=True):
            if compiling or own.training is not mode:  # Dynamo would guard on a value that is read
                own.training = mode
        if self._hooks:
            tensors = self._hooked(tensors)
        given = {alias: tensor for name, tensor in {**tensors, **buffers}.items() for alias in self._aliases[name]}
        try:
            if compiling:
                output = functional_call(self._module, given, args, kwargs, tie_weights=False)
            else:
                output = _torch.past_checkpoints(functional_call, self._module, given, args, kwargs, tie_weights=False)
        finally:
            if settings is not None and written is not None:
                settings.note_changes(written)
            self._pristine.restore()
        # Where the forward assigned a new tensor to a buffer, functional_call has put that into the dict.
        return output, {name: given[name] for name in buffers}

    @property
    def generators(self) -> list[Any]:
        """The states of all generators of random numbers that the model holds, besides torch's global ones."""
        return [each.read() for each in self._generators]

    @generators.setter
    def generators(self, states: list[Any]) -> None:
        for each, state in zip(self._generators, states, strict=True):
            each.write(state)

    def owns(self, source: Any) -> bool:
        """Whether `source` is one of these generators."""
        return any(each.source is source for each in self._generators)

    @cached_property
    def _settings(self) -> Settings:
        """Those of the copy at rest. Only watched calls ask for them, so the template for compilers makes none."""
        return Settings(self._blank)

    def modes(self, training: bool) -> tuple[Modes, list[str]]:
        """The modes after `model.train()` or `model.eval()`, and the names of what else the model sets in it."""
        if any(not {"train", "eval"}.isdisjoint(vars(module)) for module in self.modules):
            raise RuntimeError("train or eval is set on an instance, not in its class")
        settings = self._settings
        try:
            self._module.train() if training else self._module.eval()
            modes = tuple([module.training for module in self.modules])
            return modes, [each.name for each in settings.differences()]
        finally:
            self._pristine.restore()

    def _hooked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one member, with the model's hooks on the gradients of its weights.

        A hook sees the gradient of the effective weight, so a rank-1 or low-rank weight is multiplied out.
        """
        own = dict(tensors)
        for name, hooks in self._hooks.items():
            weight = own[name].view_as(own[name])  # the member's alone, also where the tensor is shared
            if name in self._layouts and (found := member_weight(own, name, self._layouts[name])):
                weight = found.materialise()
            for added in member_names(name):
                own.pop(added, None)
            if weight.requires_grad:
                for hook in hooks:
                    weight.register_hook(hook)
            own[name] = weight
        return own

    def read(self) -> None:
        """Read every tensor of the copy: torch.export(strict=True) cannot clone one that it first sees under vmap."""
        for module in self._module.modules():
            for tensor in (*_torch.parameters_of(module).values(), *_torch.buffers_of(module).values()):
                assert tensor is None or tensor.is_meta

    @property
    def made(self) -> list[object]:
        """The objects that this template has made and never changes. The model's own modules are not among them."""
        return [*self._module.modules(), self._pristine, self._aliases, self._hooks]

    def name_of(self, module: Any) -> str | None:
        """The qualified name of `module`, where it is part of the copy; else None."""
        return next((name for name, own in self._module.named_modules() if own is module), None)


class Templates:
    """The templates of one model: a compiler traces one of them, and each call that is computed borrows another.

    So calls in several threads, and a model that calls its own ensemble, do not meet in one template.
    """

    traced: Template
    """The one that compilers trace. Nothing else uses it, so a call while another thread compiles is not disturbed."""

    def __init__(self, anatomy: Anatomy, side: str) -> None:
        self._make = torch.inference_mode(False)(partial(Template, anatomy, side))  # for calls outside of it too
        self.traced = self._make()
        self.idle: deque[Template] = deque()
        self.generators = self._first = self.traced.generators
        """The states of the generators of a template, where the last call has left them and the next one begins."""
        self._kind = anatomy.kind
        self._told: set[bool] = set()
        late = [name for name, tensor in anatomy.parameters.items() if _torch.has_late_hooks(tensor)]
        if late:
            log.warning("%s: hooks that run after the gradients of %s are accumulated do not run", anatomy.kind, late)

    def go_on_from(self, before: Templates) -> None:
        """Begin where the calls of templates that were made `before` have left the generators of the same model."""
        pairs = list(zip(self._first, before._first, strict=False))
        if len(pairs) == len(self.generators) and all(starmap(same_state, pairs)):  # else the user has set one
            self.generators = before.generators

    def take(self) -> Template:
        """A template for one call alone. It is given back to `idle`, unless the call was interrupted."""
        try:
            return self.idle.pop()
        except IndexError:
            return self._make()

    def modes(self, training: bool) -> Modes:
        """The modes of all modules after `model.train()` or `model.eval()`, which is tried on a template."""
        template, verb = self.take(), "train" if training else "eval"
        told = ""
        try:
            modes, others = template.modes(training)
            if others:
                told = f"also sets {', '.join(others)}, which is left out, for the model is only read; call it yourself"
        except Exception as error:
            modes = (training,) * len(template.modules)
            why = first_line(error)
            told = f"cannot be tried on a copy without memory, so every module is taken to be in that mode: {why}"
        self.idle.append(template)
        if told and training not in self._told:
            self._told.add(training)
            log.warning("%s: its own %s() %s", self._kind, verb, told)
        return modes

    def name_of(self, module: Any) -> str | None:
        """The qualified name of `module`, where it is part of a template that is at rest; else None."""
        found = (template.name_of(module) for template in (self.traced, *self.idle))
        return next((name for name in found if name is not None), None)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _aliases(
    model: Mapping[str, list[Site]], template: Mapping[str, list[Site]], layouts: Mapping[str, Layout]
) -> dict[str, list[str]]:
    """By its first name in the model, every name of a tensor in the copy; also for what members can add to it."""
    aliases: dict[str, list[str]] = {}
    for name, (own, places) in zip(model, template.items(), strict=True):
        aliases[name] = [site.name for site in places]
        if own in layouts:
            tied = [member_names(site.name) for site in places]
            for added, names in zip(member_names(name), zip(*tied, strict=True), strict=True):
                aliases[added] = list(names)
    return aliases
