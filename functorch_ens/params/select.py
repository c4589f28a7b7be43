"""Choosing by name pattern, list of patterns or predicate: which weights get `r` and `s`, which are stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from functorch_ens.anatomy import Site
from functorch_ens.layers.registry import can_be_rank1, has_layout, rule_of

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Selector = str | Iterable[str] | Callable[[str, Any], bool]
"""An `fnmatch` pattern on qualified names (`"net.*"`), a list of them, or a predicate on (name, object)."""


def _as_patterns(selector: Selector, argument: str) -> list[str]:
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


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
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
    for pattern in _as_patterns(selector, argument):
        found = _matches(pattern, objects)
        if not found:
            raise ValueError(f"{argument}: pattern {pattern!r} matches none of {list(objects)}")
        chosen |= found
    return chosen


def choose_parameters(selector: Selector, model: nn.Module) -> list[str]:
    """The parameters that `stacked` chooses, in the model's order; patterns also match the other names of tied ones."""
    own = dict(model.named_parameters())
    names = own if callable(selector) else dict(model.named_parameters(remove_duplicate=False))
    found = {id(names[name]) for name in select(selector, names, "stacked")}
    return [name for name, parameter in own.items() if id(parameter) in found]


def _is_rank1_by_default(site: Site) -> bool:
    """Whether the parameter at `site` is a weight that gets `r` and `s` without being named."""
    parameter = site.parameter
    if not can_be_rank1(parameter) or isinstance(site.module, _NORMS):
        return False
    if has_layout(site.module) and "weight" in site.leaf:
        return True
    found = rule_of(site.module)
    if found is not None and site.leaf in found.weights:
        return True
    return parameter.ndim == 2 and min(parameter.shape) > 1


def choose_rank1(model: nn.Module, sites: Mapping[str, list[Site]], layers: Selector | None) -> set[str]:
    """The names of the parameters that get `r` and `s`: the default ones, or those that `layers` chooses among them.

    A pattern is read as module names, and chooses the weights of those modules that have `r` and `s` by default. Where
    they have none of these, or no module is called so, it chooses any parameters of two or more dimensions: those that
    the modules own themselves, or whose name it is (a position embedding, say).

    Raises:
        TypeError: `layers` is not a pattern, a list of patterns or a predicate.
        ValueError: a pattern chooses nothing that can have `r` and `s`.
    """
    owned: dict[nn.Module, set[str]] = {}  # a module to the names of the weights in it that get r and s by default
    for name, places in sites.items():
        for site in places:
            if _is_rank1_by_default(site):
                owned.setdefault(site.module, set()).add(name)
    if layers is None:
        return set().union(*owned.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(layers) and not isinstance(layers, type):
        return set().union(*(owned.get(module, ()) for name, module in model.named_modules() if layers(name, module)))

    parameters = {site.name: name for name, places in sites.items() for site in places if can_be_rank1(site.parameter)}
    chosen: set[str] = set()
    for pattern in _as_patterns(layers, "layers"):
        named = _matches(pattern, modules)
        found = set().union(*(owned.get(modules[name], ()) for name in named))
        if not found:
            inside = {
                f"{name}.{leaf}" if name else leaf
                for name in named
                for leaf in modules[name]._parameters
                if "bias" not in leaf
            }
            found = {
                parameters[name] for name in (inside & parameters.keys() if named else _matches(pattern, parameters))
            }
        if not found:
            raise ValueError(
                f"layers: pattern {pattern!r} chooses no weight that can have r and s; a pattern must match the layers "
                "themselves ('net.*' for what is inside net). The weights that have them by default: "
                f"{sorted(set().union(*owned.values()))}"
            )
        chosen |= found
    return chosen
