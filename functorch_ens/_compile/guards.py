"""Which guards of Dynamo a compiled function can do without.

Before every call Dynamo looks at everything that it read while it traced the function. For a forward these are
thousands of guards, which take longer than a small step. Most are on objects that never change: those that a forward
has made for itself, and the code of torch and of this package. Their guards are dropped. The guards on the user's
model, its classes and functions, the loss and the arguments are kept, and so is the one on `Forward.identity`, by which
two forwards are told apart.
"""

from __future__ import annotations

import builtins
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from functorch_ens._compile.optional import optional
from functorch_ens.forward.forward import Forward

PACKAGES = frozenset(("builtins", "collections", "contextlib", "einops", "functorch_ens", "torch"))
"""Packages whose modules, classes and functions do not change while a program runs."""

OURS = __name__.partition(".")[0]

_COPIES = itertools.count()

Filter = Callable[[Sequence[Any]], Sequence[bool]]


def with_own_code(method: Callable[..., Any]) -> MethodType:
    """`method` with a copy of its code.

    Dynamo caches what it compiles per code object, and finds the right entry by the guards. Without the dropped guards
    it could not tell two objects apart, so each has code of its own. It remembers by file, line and name of the code
    which sizes have changed, and takes these for symbols. So the copy has a name of its own too: else the batch size of
    one step would make that of the next one a symbol.
    """
    bound: Any = method
    function: FunctionType = bound.__func__
    own = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return MethodType(own, bound.__self__)


def filter_for(function: Callable[..., Any], made: Collection[object] = (), theirs: Filter | None = None) -> Filter:
    """The guard filter, for torch.compile, of a function of the user's, or of a bound method of this package.

    Args:
        function: what is to be compiled.
        made: objects that the object of a bound method holds and never changes.
        theirs: the user's own filter, which drops guards too.
    """
    given: Any = function
    plain: Any = getattr(given, "__func__", given)
    globals_ = getattr(plain, "__globals__", {})
    own = frozenset(name for name in globals_ if not _is_of_dynamo(name)) if _package(plain) == OURS else frozenset()
    bound = {plain.__code__.co_varnames[0]: given.__self__} if made else {}

    def keep(guards: Sequence[Any]) -> Sequence[bool]:
        kept = [True] * len(guards) if theirs is None else list(theirs(guards))
        with optional("fewer guards"):
            values = {guard.name: getattr(guard, "value", None) for guard in guards}
            forwards = {name: value for name, value in values.items() if isinstance(value, Forward)}
            never_changed = [*made, *(each for forward in forwards.values() for each in forward.made)]
            paths = _Paths({**bound, **forwards}, never_changed)
            ours, known = _of_our_classes(values), {**globals_, **_globals_in(values)}
            kept = [
                keep
                and guard.name not in paths
                and not _is_of_packages(guard.name, known, own)
                and not _is_in_class(guard.name, ours)
                for keep, guard in zip(kept, guards, strict=True)
            ]
        return kept

    return keep


class _Paths:
    """The names by which Dynamo reaches given objects from some roots: `name in paths` for them and what they hold.

    The names are found by walking through the attributes and containers of the objects of this package.
    """

    def __init__(self, roots: Mapping[str, object], made: Collection[object]) -> None:
        self._made = {id(each) for each in made}
        self._within: set[str] = set()
        """The names of the objects themselves; all that they hold never changes either."""
        self._ahead: set[str] = set()
        """The names of what holds them; other things that these hold may change."""
        for name, root in roots.items():
            self._seen: set[int] = set()
            self._walk(name, root)

    def _walk(self, name: str, value: object) -> bool:
        """Whether `value` is, or holds, one of the objects."""
        if id(value) in self._made:
            self._within.add(name)
            return True
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        found = [self._walk(name + step, child) for step, child in _children(value)]
        if any(found):
            self._ahead.add(name)
        return any(found)

    def __contains__(self, name: str) -> bool:
        if name in self._ahead:
            return True
        for step in _STEP.finditer(name):
            if name[: step.start()] in self._within:
                return not _OF_FUNCTIONS.search(name, step.start())
        return False


_STEP = re.compile(r"[.\[]|$")

# A template and the user's model share functions, and so all that these refer to.
_OF_FUNCTIONS = re.compile("__(closure|code|defaults|kwdefaults|globals|func|self)__")


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object of this package or a container holds, each with the step that Dynamo's name takes to it."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{field}", getattr(value, field)) for field in value._fields)
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif _package(type(value)) == OURS and not isinstance(value, nn.Module):
        yield from ((f".{attribute}", child) for attribute, child in getattr(value, "__dict__", {}).items())


# `dict(...)`, `type(...)`, `list(dict.keys(...))`: how Dynamo names what it reads of a class or a dict.
_GLOBAL = re.compile(
    r"(?:(?:dict|type|list|dict\.keys)\()*(?:G\['([^']+)'\](?:\['([^']+)'\])?|__import__\('([^']+)'\))"
)


def _is_of_packages(name: str, globals_: dict[str, Any], own: Collection[str]) -> bool:
    """Whether a guard is on what one of PACKAGES defines.

    Args:
        name: Dynamo's name of the guarded object.
        globals_: `G` in these names: the globals of the compiled function, to which Dynamo adds modules and scopes.
        own: the globals of the compiled function's module, where that is one of this package.
    """
    match = _GLOBAL.match(name)
    if match is None:
        return False
    variable, key, module = match.groups()
    if module is not None:
        return module.partition(".")[0] in PACKAGES
    if variable in own:
        return True
    if not _is_of_dynamo(variable):  # a name of the user's, who may give it to something else
        return False
    value = globals_.get(variable)
    if isinstance(value, ModuleType):
        return _package(value) in PACKAGES
    # The builtins, and the scopes of functions made by exec: the constructors of named tuples are some of these.
    return isinstance(value, dict) and key in value and _package(value[key]) == builtins.__name__


def _is_of_dynamo(variable: str) -> bool:
    """Whether Dynamo has added this global: an import of a function that it inlines, the builtins, a scope."""
    return variable.startswith("__")


def _globals_in(values: Mapping[str, object]) -> dict[str, object]:
    """The globals that have guards themselves; a frame of another function has others than the compiled one."""
    found = {match[1]: value for name, value in values.items() if (match := re.fullmatch(r"G\['([^']+)'\]", name))}
    return {name: value for name, value in found.items() if value is not None}


def _of_our_classes(values: Mapping[str, object]) -> frozenset[str]:
    """Dynamo's names of the objects, of those that have guards, whose class is one of this package.

    The class of an object has a guard of its own, which is kept. Modules are left out: a template's classes are made
    from the user's.
    """
    return frozenset(
        name for name, value in values.items() if _package(type(value)) == OURS and not isinstance(value, nn.Module)
    )


_CLASS = re.compile(r"type\(([^()]*)\)")


def _is_in_class(name: str, objects: Collection[str]) -> bool:
    """Whether a guard is on what the class of one of `objects` defines."""
    match = _CLASS.search(name)
    return match is not None and match[1] in objects


def _package(value: object) -> str:
    """The package that defines a module, class or function; "" for anything else."""
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, type):  # tuple.__new__
        return _package(value.__self__)
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0]
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return (value.__module__ or "").partition(".")[0]
    return ""
