"""What a model is made of: its parameters under every name they have, and copies of it without its tensors."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
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
    model: nn.Module,
    parameter: Callable[[Tensor], Tensor],
    buffer: Callable[[Tensor], Tensor],
    memo: dict[int, Any] | None = None,
) -> nn.Module:
    """A deep copy of `model` in which `parameter(p)` and `buffer(b)` stand for its parameters and buffers.

    Ties stay ties, and parameters and buffers in their order. Tensors kept in plain attributes (constants, caches) are
    cloned without their autograd history. Where torch.compile has wrapped a module the copy has that module itself.
    `memo` is `copy.deepcopy`'s: afterwards its values are all the objects that the copy does not share with `model`.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for _, value in () if is_compiled(module) else reachable(module):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
    memo.update({id(b): buffer(b) for b in model.buffers()})
    memo.update({id(p): nn.Parameter(parameter(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()})
    try:
        for module in reversed(list(model.modules())):  # the innermost first
            if is_compiled(module):
                memo[id(module)] = copy.deepcopy(module._modules["_orig_mod"], memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        error.add_note(f"functorch_ens: {type(model).__name__} could not be copied; copy.deepcopy(model) must work")
        raise


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile` has made of another."""
    return "_orig_mod" in module._modules and "dynamo_ctx" in vars(module)


# What holds attributes, but is not part of the state of the module that refers to it.
_OPAQUE = (nn.Module, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.Generator, Tensor)
INTERNAL = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def contents(value: Any) -> list[Any]:
    """What a container, a plain object or a `functools.partial` holds directly."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | deque):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, _OPAQUE):
        return []
    return list(getattr(value, "__dict__", {}).values())


def reachable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that the plain attributes of `module` hold, at any depth, each with the name of the attribute."""
    seen: set[int] = set()
    for name, attribute in vars(module).items():
        if name in INTERNAL:
            continue
        pending = [attribute]
        while pending:
            value = pending.pop()
            if id(value) not in seen:
                seen.add(id(value))
                yield name, value
                pending += contents(value)


def check_replaceable(model: nn.Module) -> None:
    """ValueError where the parameters of `model` cannot be replaced for a call.

    That is where a module is TorchScript, or reads a parameter past the place where it is registered.
    """
    tensors = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for prefix, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {prefix!r} is a {type(module).__name__}, whose parameters are part of its compiled code; give "
                "the module that it was made from, and compile the forward instead"
            )
        if is_compiled(module):
            continue
        for name, value in reachable(module):
            cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != CellType()]
            inside = [cell for cell in cells if isinstance(cell, nn.Module) and any(True for _ in cell.parameters())]
            if isinstance(module, nn.RNNBase) and name == "_flat_weights":  # which it makes anew when they are replaced
                continue
            if inside or id(value) in tensors or any(id(cell) in tensors for cell in cells):
                raise ValueError(
                    f"model: {type(module).__name__} {prefix!r} keeps parameters or buffers of the model in its "
                    f"attribute {name!r}, besides where they are registered; members could not have their own there. "
                    "Read them from the module that owns them, in a method."
                )
