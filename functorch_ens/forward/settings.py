"""What a user can set on a model after its forward was made: constants, hooks, submodules."""

from __future__ import annotations

from collections import deque
from operator import is_
from typing import Any

from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy
from functorch_ens.copies import INTERNAL, contents

_SIMPLE = (bool, int, float, complex, str, bytes)
_GONE = object()


class Settings:
    """The attributes of all modules of a model as they are now, and the contents of the containers and objects in them.

    Parameters, buffers and training modes are not among them: a call has its own. An attribute that goes from absent or
    None to a tensor, or that is now a tensor with a history, counts as a cache, and is ignored.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._classes = [(name, module, type(module)) for name, module in anatomy.modules.items()]
        self._places: list[tuple[str, Any, Any]] = []
        """Names of a dict or list that the model reads, itself, and a copy of it."""
        self._empty: dict[str, Any] = {}
        """The dicts in which hooks would be."""
        self._tensors: list[tuple[str, Tensor, int]] = []
        self.constants: list[tuple[str, nn.Module, str, Any]] = []
        """The numbers and texts in attributes of modules: the names, the module, the attribute, the value."""
        seen: set[int] = set()
        for name, module in anatomy.modules.items():
            state = vars(module)
            self._places.append((name, state, dict(state)))
            for key, value in state.items():
                place = f"{name}.{key}" if name else key
                if key in INTERNAL and "hooks" in key and not value:
                    self._empty[place] = value
                elif key == "_modules" or (key in INTERNAL and "hooks" in key):
                    self._places.append((place, value, dict(value)))
                elif key not in INTERNAL:
                    self._remember(place, value, seen)
                    if isinstance(value, _SIMPLE):
                        self.constants.append((place, module, key, value))

    def _remember(self, place: str, value: Any, seen: set[int]) -> None:
        if id(value) in seen or isinstance(value, nn.Module):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            self._tensors.append((place, value, _torch.version(value)))
        elif isinstance(value, dict):
            self._places.append((place, value, dict(value)))
        elif isinstance(value, list | deque):
            self._places.append((place, value, list(value)))
        elif hasattr(value, "__dict__") and contents(value):
            self._places.append((place, vars(value), dict(vars(value))))
        for item in contents(value):
            self._remember(place, item, seen)

    def changed(self) -> str | None:
        """The name of something that has changed; None where nothing has."""
        for name, module, cls in self._classes:
            if type(module) is not cls:
                return name or cls.__name__
        if any(self._empty.values()):
            return next(place for place, hooks in self._empty.items() if hooks)
        for place, tensor, version in self._tensors:
            if _torch.version(tensor) != version:
                return place
        for place, now, before in self._places:
            if isinstance(before, list):
                if _apart(list(enumerate(_without_caches(now))), list(enumerate(_without_caches(before)))):
                    return place
            elif not (len(now) == len(before) and all(map(is_, now.values(), before.values()))):
                differ = next(iter(_apart(list(now.items()), list(before.items()))), None)
                if differ is not None:
                    return f"{place}.{differ}" if place else str(differ)
                # So that the next look is as fast as before; caches stay out.
                before.update({key: now[key] for key in before if not isinstance(now[key], Tensor)})
        return None


_LEFT_OUT = ("_parameters", "_buffers")


def _without_caches(items: Any) -> list[Any]:
    return [item for item in items if not isinstance(item, Tensor)]


def _apart(now: list[tuple[Any, Any]], before: list[tuple[Any, Any]]) -> list[Any]:
    """The keys of what differs."""
    these, those = dict(now), dict(before)
    return [
        key
        for key in {**those, **these}
        if key not in ("training", *_LEFT_OUT) and not _alike(these.get(key, _GONE), those.get(key, _GONE))
    ]


def _alike(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, Tensor):
        return before is None or before is _GONE or now.grad_fn is not None
    if isinstance(now, tuple) and isinstance(before, tuple) and len(now) == len(before):
        return type(now) is type(before) and all(map(_alike, now, before))
    return type(now) is type(before) and isinstance(now, _SIMPLE) and (now == before or now != now)
