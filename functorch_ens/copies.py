"""Copies of a model, with other tensors in the place of its own, and the check that a model allows that."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy


def copy_structure(
    model: nn.Module,
    parameter: Callable[[Tensor], Tensor],
    buffer: Callable[[Tensor], Tensor],
    memo: dict[int, Any] | None = None,
) -> nn.Module:
    """A deep copy of `model` with `parameter(p)` and `buffer(b)` in the place of its parameters and buffers.

    Ties and the order of parameters and buffers are kept. Tensors in plain attributes (constants, caches) are cloned
    without their autograd history. A module wrapped by torch.compile is copied without the wrapper. `memo` is
    `copy.deepcopy`'s: afterwards its values are all the objects that the copy does not share with `model`.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for _, value in () if _torch.is_compiled(module) else reachable(module):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
    memo.update({id(b): buffer(b) for b in model.buffers()})
    memo.update({id(p): nn.Parameter(parameter(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()})
    try:
        for module in reversed(list(model.modules())):  # the innermost first
            if _torch.is_compiled(module):
                memo[id(module)] = copy.deepcopy(_torch.compiled_from(module), memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        error.add_note(f"functorch_ens: {type(model).__name__} could not be copied; copy.deepcopy(model) must work")
        raise


# These have attributes too, but they are not part of the state of the module that refers to them.
_OPAQUE = (nn.Module, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.Generator, Tensor)
INTERNAL = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def contents(value: Any) -> list[Any]:
    """The values that a container, a plain object or a `functools.partial` holds directly."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if is_array(value):
        return value.ravel().tolist() if value.dtype.hasobject else []
    return list((attributes(value) or {}).values())


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object, in its `__dict__` and in slots; None for what has neither, or is opaque."""
    slots = slots_of(value)
    if isinstance(value, _OPAQUE) or not (slots or hasattr(value, "__dict__")):
        return None
    return {**getattr(value, "__dict__", {}), **{name: read_slot(slot, value) for name, slot in slots.items()}}


def slots_of(value: Any) -> dict[str, Any]:
    """The descriptors of the slots of an object. They read and write past `__getattr__` and properties of its class."""
    cls: type = type(value)
    bases = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
    return {name: slot for base in bases for name, slot in base.items() if isinstance(slot, MemberDescriptorType)}


UNSET = object()
"""What `read_slot` gives for a slot that is not set."""


def read_slot(slot: Any, value: Any) -> Any:
    """What is in this slot of an object."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return UNSET


_LARGE = 2**20


def is_array(value: Any) -> bool:
    """Whether `value` is an array of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def bytes_of(value: Any) -> Any:
    """Shape, kind and memory of an array that can be written to, for a comparison; None above 1 MB."""
    if not is_array(value):
        return bytes(value)
    if value.nbytes > _LARGE or not value.flags.writeable:
        return None
    return value.shape, str(value.dtype), sys.modules["numpy"].ndarray.tobytes(value)  # past methods of a subclass


def reachable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every value in the plain attributes of `module`, at any depth, each with the name of the attribute."""
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


_OF_RNNS = frozenset(vars(nn.RNN(1, 1, device="meta")))
"""The attributes that every RNN has."""


def check_replaceable(anatomy: Anatomy) -> None:
    """ValueError where functional_call cannot replace the parameters of the model.

    TorchScript compiles them into its code, and a tensor that is also kept in a plain attribute is read from there.
    """
    tensors = {id(tensor) for tensor in [*anatomy.parameters.values(), *anatomy.buffers.values()]}
    for prefix, module in anatomy.modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {prefix!r} is a {type(module).__name__}, whose parameters are part of its compiled code; give "
                "the module that it was made from, and compile the forward instead"
            )
        if _torch.is_compiled(module):
            continue
        for name, value in reachable(module):
            cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != CellType()]
            inside = [cell for cell in cells if isinstance(cell, nn.Module) and any(True for _ in cell.parameters())]
            # An RNN fills its list of flat weights anew whenever its parameters are replaced.
            if isinstance(module, nn.RNNBase) and name in _OF_RNNS:
                continue
            if inside or id(value) in tensors or any(id(cell) in tensors for cell in cells):
                raise ValueError(
                    f"model: {type(module).__name__} {prefix!r} keeps parameters or buffers of the model in its "
                    f"attribute {name!r}, besides where they are registered; members could not have their own there. "
                    "Read them from the module that owns them, in a method."
                )
