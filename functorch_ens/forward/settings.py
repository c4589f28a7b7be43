"""What a user can set on a model after its forward was made: constants, hooks, submodules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Set
from functools import partial
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy
from functorch_ens.holds import INTERNAL, attributes, bytes_of, contents, is_array

_SIMPLE = (bool, int, float, complex, str, bytes)
_GONE = object()
_LEFT_OUT = ("training", "_parameters", "_buffers")


class _Place(NamedTuple):
    """Something that holds settings."""

    name: str
    """As in `layer.options`."""
    source: Any
    read: Callable[[Any], dict[Any, Any]]
    """What `source` holds now, by keys."""
    before: dict[Any, Any]
    """What it held at first."""
    named: Callable[[str, Any], str]
    """The name of one key of the place."""


class Difference(NamedTuple):
    """Something that is not as it was."""

    name: str
    group: str
    """The dict that it is in, whose other keys are of the same kind; else its own name."""
    now: Any
    before: Any


class Settings:
    """The attributes of all modules of a model as they are now, and the contents of the containers and objects in them.

    Parameters, buffers and training modes are not among them, for a call has its own; but their names are.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._places: list[_Place] = []
        self._empty: dict[str, Any] = {}
        """The dicts that every module has, of hooks, tensors and submodules, where they are empty."""
        self._unhooked = {}
        """The parameters without hooks on their gradients."""
        self.constants: list[tuple[str, nn.Module, str, Any]] = []
        """The numbers and texts in attributes of modules: the names, the module, the attribute, the value."""
        self.kept: set[str] = set()
        """The tensors that `changed` has last found where none were, and that the model itself does not put there."""
        self._seen = {id(module) for module in anatomy.modules.values()}
        for name, module in anatomy.modules.items():
            self._remember_module(name, module, is_registered=True)
        for name, parameter in anatomy.parameters.items():
            if _torch.hooks_of(parameter):
                self._add(name, parameter, _hooks, _whole)
            else:
                self._unhooked[name] = parameter

    def _add(
        self, name: str, source: Any, read: Callable[[Any], dict[Any, Any]], named: Callable[[str, Any], str]
    ) -> None:
        self._places.append(_Place(name, source, read, dict(read(source)), named))

    def _remember_module(self, name: str, module: nn.Module, *, is_registered: bool) -> None:
        self._add(name or type(module).__name__, module, _class, _whole)
        self._add(name, module, vars if is_registered else _all, _attribute)
        for key, value in vars(module).items():
            place = f"{name}.{key}" if name else key
            if key not in INTERNAL:
                self._remember(place, value)
                if isinstance(value, _SIMPLE):
                    self.constants.append((place, module, key, value))
            elif isinstance(value, dict) and not value:
                self._empty[place] = value
            elif is_registered and key in ("_parameters", "_buffers"):
                self._add(name, value, _presence, _attribute)
            elif isinstance(value, dict):
                self._add(name if key == "_modules" else place, value, dict, _attribute)

    def _remember(self, place: str, value: Any) -> None:
        if value is None or isinstance(value, _SIMPLE) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):  # one that is not registered: all that it has is a constant
            self._remember_module(place, value, is_registered=False)
            of_it = [*_torch.parameters_of(value).items(), *_torch.buffers_of(value).items(), *value.named_children()]
            for key, item in of_it:
                self._remember(f"{place}.{key}", item)
        elif isinstance(value, Tensor):
            self._add(place, value, _version, _whole)
        elif isinstance(value, dict):
            self._add(place, value, dict, _attribute)
        elif isinstance(value, list | deque) or (is_array(value) and value.dtype.hasobject):
            self._add(place, value, _numbered, _whole)
        elif isinstance(value, set):
            self._add(place, value, _itself, _whole)
        elif is_array(value) or isinstance(value, bytearray):
            self._add(place, value, _memory, _whole)
        elif isinstance(value, partial):
            self._add(place, value.keywords, dict, _attribute)
        elif attributes(value) is not None:
            self._add(place, value, _fields, _attribute)
        if isinstance(value, dict | list | set | deque) and attributes(value):  # of a class of the user's own
            self._add(place, value, _fields, _attribute)
        for item in contents(value):
            self._remember(place, item)

    def differences(self) -> Iterator[Difference]:
        """What is not as it was."""
        if any(self._empty.values()):
            yield from (Difference(place, place, values, _GONE) for place, values in self._empty.items() if values)
        if _torch.any_has_hooks(self._unhooked.values()):
            hooks = {name: _torch.hooks_of(parameter) for name, parameter in self._unhooked.items()}
            yield from (Difference(name, name, found, _GONE) for name, found in hooks.items() if found)
        for place, source, read, before, named in self._places:
            now = source if read is dict else read(source)
            if len(now) == len(before) and all(map(is_, now.values(), before.values())):
                continue
            now = dict(now)
            differ = False
            for key in {**before, **now}:
                this, that = now.get(key, _GONE), before.get(key, _GONE)
                if this is that or (read is vars and key in _LEFT_OUT):
                    continue
                if _equal(this, that):
                    before[key] = this  # so that the next look is as fast as before
                else:
                    differ = True
                    name = named(place, key)
                    yield Difference(name, place if read is dict else name, this, that)
            if read is dict and not differ and list(now) != list(before):  # in another order
                yield Difference(place, place, now, before)

    def note_changes(self, written: set[str]) -> None:
        """Add the names of what has changed to `written`; of a dict that has got new keys, that of the whole dict."""
        for name, group, _, before in self.differences():
            written.add(group if before is _GONE else name)

    def changed(self, written: Set[str]) -> str | None:
        """The name of a setting that has changed; None where none has.

        Args:
            written: the names of what the model writes to in its own forward: caches, counters. Each call begins with
                what they were when the forward was made, so they are no settings.
        """
        kept = set()
        for name, group, now, before in self.differences():
            if name in written or group in written:
                continue
            if not isinstance(now, Tensor) or not (before is None or before is _GONE or now.grad_fn is not None):
                return name
            kept.add(name)  # a cache, most likely
        self.kept = kept
        return None


def _equal(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, tuple) and isinstance(before, tuple) and len(now) == len(before):
        return type(now) is type(before) and all(map(_equal, now, before))
    if type(now) is not type(before) or not isinstance(now, _SIMPLE):
        return False
    return repr(now) == repr(before) if isinstance(now, float | complex) else now == before  # nan, and minus zero


# What a place holds, by the kind of its source.


def _class(module: nn.Module) -> dict[Any, Any]:
    return {None: type(module)}


def _presence(registry: dict[str, Any]) -> dict[Any, Any]:
    return {key: tensor is not None for key, tensor in registry.items()}


def _hooks(parameter: Tensor) -> dict[Any, Any]:
    return dict(enumerate(_torch.hooks_of(parameter)))


def _version(tensor: Tensor) -> dict[Any, Any]:
    return {None: _torch.version(tensor)}


def _numbered(items: Any) -> dict[Any, Any]:
    return dict(enumerate(items))


def _itself(items: set[Any]) -> dict[Any, Any]:
    return {item: item for item in items}


def _memory(value: Any) -> dict[Any, Any]:
    return {None: bytes_of(value)}


def _all(module: nn.Module) -> dict[Any, Any]:
    return vars(module)


def _fields(value: Any) -> dict[Any, Any]:
    return attributes(value) or {}


# The name of a key in a place.


def _whole(place: str, key: Any) -> str:
    return place


def _attribute(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)
