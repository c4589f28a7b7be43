"""What a model holds: the values in its attributes, at any depth, and what its functions and classes refer to."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from io import IOBase
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from functorch_ens import _torch

# These have attributes too, but they are not part of the state of the module that refers to them.
_OPAQUE = (
    nn.Module,
    type,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    ModuleType,
    torch.Generator,
    random.Random,
    Tensor,
)
INTERNAL = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def contents(value: Any) -> list[Any]:
    """The values that a container, a plain object, a bound method or a `functools.partial` holds directly."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType | MethodWrapperType):
        return [value.__self__]
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


# --------------------------------------------------------------------------------------------------------------------
# Generators and iterators: what gives another value each time it is asked


class Generator(NamedTuple):
    """A generator of random numbers."""

    source: Any
    read: Callable[[], Any]
    """Its state, which later draws do not change."""
    write: Callable[[Any], Any]
    """Sets a state."""


def same_state(one: Any, other: Any) -> bool:
    """Whether two states of one generator are the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return pickle.dumps(one) == pickle.dumps(other)


def generator(value: Any) -> Generator | None:
    """How to read and set the state of `value`, a generator of torch, Python or NumPy; None where it is none."""
    if isinstance(value, torch.Generator):
        return Generator(value, value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return Generator(value, value.getstate, value.setstate)
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return None
    if isinstance(value, numpy.RandomState):
        return Generator(value, partial(value.get_state, legacy=False), value.set_state)
    if isinstance(value, numpy.Generator):
        value = value.bit_generator
    if isinstance(value, numpy.BitGenerator):
        return Generator(value, partial(getattr, value, "state"), partial(setattr, value, "state"))
    return None


def global_generators() -> Iterator[Generator]:
    """Those of Python and, where it is in use, of NumPy."""
    yield Generator(random, random.getstate, random.setstate)
    if numpy := sys.modules.get("numpy.random"):
        yield Generator(numpy, partial(numpy.get_state, legacy=False), numpy.set_state)


def is_iterator(value: Any) -> bool:
    """Whether `value` is an iterator, no file, whose position is not in attributes, as that of a class in Python is."""
    following = getattr(type(value), "__next__", None)
    return not (following is None or isinstance(following, FunctionType) or isinstance(value, IOBase))


class Replayed:
    """An iterator that can be set back, by setting `position`: it remembers what it has given."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._given: list[Any] = []
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.position == len(self._given):
            self._given.append(next(self._source))
        self.position += 1
        return self._given[self.position - 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_source"], name)


_SIMPLE = (bool, int, float, complex, str, bytes, type(None), Tensor, ModuleType)


def held(model: nn.Module, *, by_code: bool = False) -> Iterator[tuple[str, Any]]:
    """Every value that `copy.deepcopy(model)` copies, with the name of the attribute that leads to it.

    With `by_code`, instead those that it does not copy: what functions and classes of the model refer to in closures,
    defaults, attributes of classes and, of global variables, generators, iterators, functions and classes.
    """
    seen: set[tuple[int, bool]] = set()
    pending: list[tuple[str, Any, bool]] = [("", model, False)]
    while pending:
        name, value, apart = pending.pop()
        if isinstance(value, _SIMPLE) or (id(value), apart) in seen:
            continue
        seen.add((id(value), apart))
        if apart is by_code:
            yield name, value
        if isinstance(value, nn.Module):
            own = dict(value._modules) if _torch.is_compiled(value) else {**vars(value), **value._modules}
            pending += [(f"{name}.{key}" if name else key, item, apart) for key, item in own.items()]
        else:
            pending += [(name, item, apart) for item in contents(value)]
        if by_code:
            pending += [(name, item, True) for item in _referred(value)]


def _referred(value: Any) -> list[Any]:
    """What a function or a class refers to; the class of any other value."""
    if isinstance(value, FunctionType):
        if _is_library(value.__module__):
            return []
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        found = [value.__globals__.get(name) for name in names(value.__code__)]
        own = [each for each in found if generator(each) or is_iterator(each) or isinstance(each, FunctionType | type)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *own]
    if isinstance(value, type):
        classes = [vars(cls) for cls in value.__mro__ if not _is_library(cls.__module__)]
        return [item for own in classes for key, item in own.items() if key not in ("__init__", "__new__")]
    if isinstance(value, BuiltinFunctionType):
        return [value.__self__]
    if isinstance(value, MethodType | staticmethod | classmethod):
        return [value.__func__]
    return [value.fget] if isinstance(value, property) else [type(value)]


_LIBRARIES = {"torch", "numpy", "functorch_ens", *sys.stdlib_module_names}


def _is_library(module: str | None) -> bool:
    """Whether code of this module draws from no generators but those that it is given."""
    return module is None or module.partition(".")[0] in _LIBRARIES


def names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that `code` uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant)
