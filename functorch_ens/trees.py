"""Pytrees of tensors: flatten arguments and outputs, rebuild them, and slice members out of stacked tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from functorch_ens._torch import pytree

Tree = TypeVar("Tree")

# Leaves that an output may hold besides tensors, because they are the same for every member.
_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(...)),
    *(torch.SymInt, torch.SymFloat, torch.SymBool),  # sizes, while torch.export traces
)


def members(tree: Tree, rows: int | slice | list[int]) -> Tree:
    """The members `rows` of every stacked tensor `[E, ...]` in `tree`: views for an int or a slice, else copies."""
    sliced: Tree = pytree.tree_map(lambda stack: stack[rows], tree)
    return sliced


def cut_rows(tree: Any, length: int, size: int, axis: int = 0) -> list[Any]:
    """`tree` in parts of `size` rows: a tensor with `length` rows on `axis` is cut, all else is whole in each part."""
    tensors, form = take_apart(tree)
    parts = [x.split(size, axis) if x.ndim > axis and x.shape[axis] == length else None for x in tensors]
    return [
        form.rebuild(iter([x if cut is None else cut[i] for x, cut in zip(tensors, parts, strict=True)]))
        for i in range(-(-length // size))
    ]


class _Fields(NamedTuple):
    """A dataclass among the leaves: its class, and the form of the dict of its attributes."""

    cls: type[Any]
    form: Form


class Form(NamedTuple):
    """A pytree without its tensors."""

    spec: pytree.TreeSpec
    values: list[Any]
    """The leaves. `...` stands for a tensor and `_Fields` for a dataclass; all others are constants."""

    def rebuild(self, tensors: Iterator[Any]) -> Any:
        """The pytree, with the next of `tensors` in the place of each tensor."""
        leaves = []
        for value in self.values:
            if value is ...:
                leaves.append(next(tensors))
            elif isinstance(value, _Fields):
                leaves.append(_with_fields(value.cls, value.form.rebuild(tensors)))
            else:
                leaves.append(value)
        return pytree.tree_unflatten(leaves, self.spec)


class Static:
    """A value that travels in a pytree without being a leaf, so that vmap and autograd pass it through unchanged."""

    def __init__(self, value: Any) -> None:
        self.value = value


pytree.register_pytree_node(Static, lambda static: ([], static.value), lambda _, value: Static(value))


def take_apart(tree: Any, *, constants_only: bool = False) -> tuple[list[Tensor], Form]:
    """Flatten `tree`, any pytree that may hold dataclasses, into its tensors and its form.

    With `constants_only`, a leaf that is neither a tensor nor a known constant raises TypeError.
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
                f"{type(leaf).__name__}; torch.utils._pytree.register_pytree_node makes a type of output one, or leave "
                "it out (of the models of transformers, a cache: use_cache=False, or register it, as "
                "transformers.integrations.executorch.register_dynamic_cache_export_support does a DynamicCache)"
            )
        else:
            values.append(leaf)
    return tensors, Form(spec, values)


def _with_fields(cls: Any, values: dict[str, Any]) -> Any:
    """A `cls` with these fields. Its constructor is not called, because that may check or derive from one member."""
    made = cls.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)  # also where the dataclass is frozen
    return made


def length_of(batches: Any) -> int | None:
    """The number of batches; None where nobody knows: a DataLoader over an IterableDataset has a len() that raises."""
    try:
        return len(batches)
    except Exception:
        return None
