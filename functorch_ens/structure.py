"""What a model is made of: its parameters under every name they have, and copies of it without its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Site(NamedTuple):
    """One place where a parameter or buffer is registered: `module.<leaf>`, under the qualified name `name`."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """What is registered there, where it is a parameter."""
        parameter = self.module._parameters[self.leaf]  # not getattr: a template computes some of them
        assert parameter is not None
        return parameter


def is_numeric(tensor: Tensor) -> bool:
    """Whether `tensor` can be trained: floating or complex, not integer, bool or quantised."""
    return tensor.is_floating_point() or tensor.is_complex()


def parameter_sites(model: nn.Module) -> dict[str, list[Site]]:
    """Every parameter of `model`, by its name in `model.named_parameters()`, with all the sites it is tied to.

    The first site of each list is the one that gives the parameter its name.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `model` has no parameters, or has lazy ones that no input has given a shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {model!r}")
    sites = _sites(model, "_parameters")
    kind = type(model).__name__
    if not sites:
        raise ValueError(f"model: {kind} has no parameters, so there is nothing to make an ensemble of")
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"model: {kind} has lazy parameters or buffers without a shape yet: {lazy}; "
            "call the model once on an input first"
        )
    return sites


def buffer_sites(model: nn.Module) -> dict[str, list[Site]]:
    """Every buffer of `model`, by its name in `model.named_buffers()`, with all the sites it is tied to."""
    return _sites(model, "_buffers")


def _sites(model: nn.Module, registry: str) -> dict[str, list[Site]]:
    """The sites of every tensor in the `registry` of a module. A module used in two places has one site, not two."""
    found: dict[int, list[Site]] = {}
    for prefix, module in model.named_modules():
        for leaf, tensor in getattr(module, registry).items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(Site(f"{prefix}.{leaf}" if prefix else leaf, module, leaf))
    return {places[0].name: places for places in found.values()}


def copy_structure(
    model: nn.Module, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A deep copy of `model` in which `parameter(p)` and `buffer(b)` stand for its parameters and buffers.

    Ties stay ties. Tensors kept in plain attributes (constants, caches) are cloned without their autograd history.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attribute in vars(module).values():
            memo.update({id(tensor): tensor.detach().clone() for tensor in _tensors(attribute)})
    memo.update({id(b): buffer(b) for b in model.buffers()})
    memo.update({id(p): nn.Parameter(parameter(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        error.add_note(f"functorch_ens: {type(model).__name__} could not be copied; copy.deepcopy(model) must work")
        raise


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a plain attribute, looking into lists, tuples, sets and dicts, not into modules."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
