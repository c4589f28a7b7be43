"""Choosing by name pattern, list of patterns or predicate: which weights get `r` and `s`, which are stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

from torch import Tensor, nn

from functorch_ens.anatomy import Anatomy, Site, can_be_rank1, layouts_in
from functorch_ens.checks import check_callable, shown
from functorch_ens.layers.norm import NORMS
from functorch_ens.layers.registry import rule_of

Selector = str | Iterable[str] | Callable[[str, Any], bool]
"""An `fnmatch` pattern on qualified names (`"net.*"`), a list of them, or a predicate on (name, object)."""


EXPECTED = "a name pattern, a list of patterns or a predicate on (name, object)"


def select(selector: Selector, objects: Mapping[str, Any], argument: str, expected: str = EXPECTED) -> set[str]:
    """The names in `objects` that `selector` chooses.

    Raises:
        TypeError: `selector` is none of the three kinds.
        ValueError: a pattern matches no name, so it would be silently without effect.
    """
    if _is_predicate(selector):
        check_callable(selector, argument, "a predicate on (name, object)", ["name", "object"])
        return {name for name, value in objects.items() if selector(name, value)}
    chosen: set[str] = set()
    for pattern in _as_patterns(selector, argument, expected):
        found = _matches(pattern, objects)
        if not found:
            raise ValueError(f"{argument}: pattern {pattern!r} matches none of {list(objects)}")
        chosen |= found
    return chosen


def choose_parameters(
    selector: Selector, anatomy: Anatomy, argument: str = "stacked", expected: str = EXPECTED
) -> list[str]:
    """The parameters that `selector` chooses, in the model's order; patterns match every name of tied ones."""
    objects: Mapping[str, Any] = anatomy.parameters if callable(selector) else anatomy.names
    chosen = {anatomy.names[name] for name in select(selector, objects, argument, expected)}
    return [name for name in anatomy.parameters if name in chosen]


def choose_rank1(layers: Selector | None, anatomy: Anatomy) -> set[str]:
    """The names of the parameters that get `r` and `s`: the default ones, or those that `layers` chooses among them.

    A pattern is first matched with the names of modules, and chooses the weights of these modules that have `r` and `s`
    by default. If there are none, it chooses other parameters of two or more dimensions (a position embedding, say):
    those that the matched modules own, or, if no module matches, those whose own names match.

    Raises:
        TypeError: `layers` is not a pattern, a list of patterns or a predicate.
        ValueError: a pattern chooses nothing that can have `r` and `s`.
    """
    owned: dict[nn.Module, set[str]] = {}  # a module to the names of the weights in it that get r and s by default
    for name, places in anatomy.sites.items():
        for site in places:
            if _is_rank1_by_default(site):
                owned.setdefault(site.module, set()).add(name)
    if layers is None:
        return set().union(*owned.values())
    if _is_predicate(layers):
        check_callable(layers, "layers", "a predicate on (name, module)", ["name", "module"])
        return set().union(*(owned.get(module, ()) for name, module in anatomy.modules.items() if layers(name, module)))

    modules = dict(anatomy.model.named_modules(remove_duplicate=False))
    parameters = {
        site.name: name for name, places in anatomy.sites.items() for site in places if can_be_rank1(site.parameter)
    }
    chosen: set[str] = set()
    for pattern in _as_patterns(layers, "layers"):
        named = _matches(pattern, modules)
        found = set().union(*(owned.get(modules[name], ()) for name in named))
        if not found:
            inside = {
                f"{name}.{leaf}" if name else leaf
                for name in named
                for leaf, _ in modules[name].named_parameters(recurse=False, remove_duplicate=False)
                if "bias" not in leaf
            }
            found = {
                parameters[name] for name in (inside & parameters.keys() if named else _matches(pattern, parameters))
            }
        if not found:
            raise ValueError(
                f"layers: pattern {pattern!r} chooses no weight that can have r and s, or A and B; a pattern must "
                "match the layers themselves ('net.*' for what is inside net). The weights that have them by default: "
                f"{sorted(set().union(*owned.values()))}"
            )
        chosen |= found
    return chosen


def _is_rank1_by_default(site: Site) -> bool:
    """Whether the parameter at `site` is a weight that gets `r` and `s` without being named."""
    parameter = site.parameter
    if not can_be_rank1(parameter) or isinstance(site.module, NORMS):
        return False
    layouts = layouts_in(site.module)
    if isinstance(layouts, Mapping) and site.leaf not in layouts:
        return False
    if layouts is not None and (isinstance(layouts, Mapping) or "weight" in site.leaf):
        return True
    found = rule_of(site.module)
    if found is not None and site.leaf in found.weights:
        return True
    return parameter.ndim == 2 and min(parameter.shape) > 1


def _is_predicate(selector: Any) -> TypeGuard[Callable[[str, Any], bool]]:
    """Whether `selector` is a function. A class or a module is one too, but a mistake here."""
    return callable(selector) and not isinstance(selector, type | nn.Module)


def _as_patterns(selector: Any, argument: str, expected: str = EXPECTED) -> list[str]:
    """The patterns of a selector that is not a predicate; TypeError, naming `argument`, where it is none."""
    if isinstance(selector, str):
        return [selector]
    wanted = f"{argument}: expected {expected}, got {shown(selector)}"
    if not isinstance(selector, Iterable) or isinstance(selector, Tensor):
        raise TypeError(wanted)
    patterns = list(selector)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(wanted)
    return patterns


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    """The `names` that `pattern` matches; upper and lower case differ on every platform."""
    return {name for name in names if fnmatchcase(name, pattern)}
