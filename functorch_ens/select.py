"""Choosing parts of a model by name pattern, list of patterns, or predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

Selector = str | Iterable[str] | Callable[[str, Any], bool]
"""An `fnmatch` pattern on qualified names (`"net.*"`), a list of them, or a predicate on (name, object)."""


def as_patterns(selector: Selector, argument: str) -> list[str]:
    """The patterns of a selector that is not a predicate.

    Raises TypeError, naming `argument`, where it is neither a string nor an iterable of strings.
    """
    if isinstance(selector, str):
        return [selector]
    wanted = (
        f"{argument}: expected a name pattern, a list of patterns or a predicate on (name, object), got {selector!r}"
    )
    if not isinstance(selector, Iterable):
        raise TypeError(wanted)
    patterns = list(selector)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(wanted)
    return patterns


def matches(pattern: str, names: Iterable[str]) -> set[str]:
    """The `names` that `pattern` matches, upper and lower case told apart on every platform."""
    return {name for name in names if fnmatchcase(name, pattern)}


def select(selector: Selector, objects: Mapping[str, Any], argument: str) -> set[str]:
    """The names in `objects` that `selector` chooses.

    Raises:
        TypeError: `selector` is none of the three kinds.
        ValueError: a pattern matches no name: it would be silently without effect.
    """
    if callable(selector) and not isinstance(selector, type):
        return {name for name, value in objects.items() if selector(name, value)}
    chosen: set[str] = set()
    for pattern in as_patterns(selector, argument):
        found = matches(pattern, objects)
        if not found:
            raise ValueError(f"{argument}: pattern {pattern!r} matches none of {list(objects)}")
        chosen |= found
    return chosen
