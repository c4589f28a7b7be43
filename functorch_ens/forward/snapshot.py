"""A snapshot of a module tree, which undoes the changes (caches, counters, lists) that a forward makes to it.

Generators of random numbers are not in it: they go on from call to call.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.holds import INTERNAL, UNSET, attributes, bytes_of, contents, is_array, read_slot, slots_of

# An older Dynamo cannot trace the `__dict__` of a module.
TRACES_DICT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)


class Snapshot:
    """The attributes of all modules of `model`, and the contents of the containers, objects and tensors in them.

    Restoring writes in place, so that objects which two modules share stay shared. The snapshot covers only objects
    whose ids are in `owned`, and neither parameters nor buffers.
    """

    def __init__(self, model: nn.Module, owned: set[int]) -> None:
        # Each module, all its attributes, and those among them that not every module has.
        self._modules: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._lists: list[tuple[list[Any] | deque[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._slotted: list[tuple[Any, Any, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        owned = owned - {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        registered = list(model.modules())
        owned -= {id(module) for module in registered}
        for module in registered:
            self._remember_module(module, owned)

    def _remember_module(self, module: nn.Module, owned: set[int]) -> None:
        everything = {name: value for name, value in vars(module).items() if name != "training"}
        own = {name: value for name, value in everything.items() if name not in INTERNAL}
        self._modules.append((module, everything, own))
        for name, value in everything.items():
            if name in _torch.REGISTRIES or name in own:
                self._remember(value, owned)

    def _remember(self, value: Any, owned: set[int]) -> None:
        if id(value) not in owned:
            return
        owned.discard(id(value))
        if isinstance(value, nn.Module):  # one that is not registered
            self._remember_module(value, owned)
        elif isinstance(value, Tensor):
            self._tensors.append((value, value.detach().clone(), _torch.version(value)))
        elif isinstance(value, dict):
            self._dicts.append((value, dict(value)))
        elif isinstance(value, list | deque):
            self._lists.append((value, list(value)))
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif is_array(value):
            if bytes_of(value) is not None:
                self._arrays.append((value, value.copy()))
        elif attributes(value) is not None:
            own = getattr(value, "__dict__", None)
            if own is not None:
                self._dicts.append((own, dict(own)))
                self._objects.append((value, dict(own)))
            self._slotted += [(value, slot, read_slot(slot, value)) for slot in slots_of(value).values()]
        for item in contents(value):
            self._remember(item, owned)

    def restore(self) -> None:
        """Undo every change since the snapshot. Dynamo can trace this."""
        for now, before in self._dicts:
            if len(now) != len(before) or any(key not in now or now[key] is not before[key] for key in before):
                now.clear()
                now.update(before)
        for items, saved in self._lists:
            if len(items) != len(saved) or any(a is not b for a, b in zip(items, saved, strict=True)):
                items.clear()
                items.extend(saved)
        for members, kept in self._sets:
            if members != kept:
                members.clear()
                members.update(kept)
        for holder, slot, value in self._slotted:
            if read_slot(slot, holder) is not value:
                slot.__delete__(holder) if value is UNSET else slot.__set__(holder, value)
        if not _torch.is_compiling():  # Dynamo cannot read a version counter, nor the memory of an array
            for array, saved in self._arrays:
                if array.shape == saved.shape and array.flags.writeable and bytes_of(array) != bytes_of(saved):
                    array[...] = saved
            for tensor, value, version in self._tensors:
                if _torch.version(tensor) != version:
                    _write(tensor, value)
        compiling = _torch.is_compiling()
        if compiling and not TRACES_DICT:
            self._reassign()
            return
        for module, everything, own in self._modules:
            state = module.__dict__
            for name, value in (own if compiling else everything).items():
                if name not in state or state[name] is not value:
                    setattr(module, name, value)
            if len(state) > len(everything) + 1:  # `training` is the one more
                for name in [name for name in state if name not in everything and name != "training"]:
                    delattr(module, name)

    def _reassign(self) -> None:
        """Undo assignments to attributes that the snapshot has. New attributes stay."""
        for holder, own in [*self._objects, *((module, own) for module, _, own in self._modules)]:
            for name, value in own.items():
                if getattr(holder, name) is not value:
                    setattr(holder, name, value)


def _write(tensor: Tensor, value: Tensor) -> None:
    with _torch.outside_transforms(), torch.no_grad():  # else vmap or grad would make a new tensor of the result
        tensor.copy_(value)
