"""What a model is called with and what it returns, taken apart into tensors and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What an output may hold besides tensors: values that are the same for every member.
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(...))


class _Fields(NamedTuple):
    """A dataclass among the leaves: its class, and the form of the dict of its attributes."""

    cls: type[Any]
    form: Form


class Form(NamedTuple):
    """A pytree without its tensors."""

    spec: pytree.TreeSpec
    values: list[Any]
    """The leaves: `...` stands for a tensor, `_Fields` for a dataclass; the others are as they are."""

    def rebuild(self, tensors: Iterator[Any]) -> Any:
        """The pytree with the next of `tensors` in the place of each of its own."""
        leaves = []
        for value in self.values:
            if value is ...:
                leaves.append(next(tensors))
            elif isinstance(value, _Fields):
                leaves.append(_with_fields(value.cls, value.form.rebuild(tensors)))
            else:
                leaves.append(value)
        return pytree.tree_unflatten(leaves, self.spec)


def take_apart(tree: Any, *, constants_only: bool = False) -> tuple[list[Tensor], Form]:
    """The tensors in `tree`, any pytree that may hold dataclasses, and its form.

    With `constants_only`, TypeError where it holds anything that is neither a tensor nor known to be constant.
    """
    tensors: list[Tensor] = []
    leaves, spec = pytree.tree_flatten(tree)
    values: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            values.append(...)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type | dict | list):
            names = dict.fromkeys([*(field.name for field in dataclasses.fields(leaf)), *getattr(leaf, "__dict__", ())])
            attributes = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
            inner, form = take_apart(attributes, constants_only=constants_only)
            tensors += inner
            values.append(_Fields(type(leaf), form))
        elif constants_only and not isinstance(leaf, _CONSTANTS):
            raise TypeError(
                "output: expected tensors, numbers, text or None in a pytree or a dataclass, got "
                f"{type(leaf).__name__}; torch.utils._pytree.register_pytree_node makes a type of output one"
            )
        else:
            values.append(leaf)
    return tensors, Form(spec, values)


def _with_fields(cls: Any, values: dict[str, Any]) -> Any:
    """A `cls` with these fields, made past its constructor: what that checks or derives is for one member's tensors."""
    made = cls.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)  # also where the dataclass is frozen
    return made
