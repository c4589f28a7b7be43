"""A pass that turns the gradient of a lookup into a comparison.

A loss looks up the log-probability of each row's label (`gather`). Its gradient is a `scatter_add` into zeros, which
inductor does not fuse with other operations. With one place in each row no two numbers are added, so
`where(place == index, gradient, 0)` is the same, and it is pointwise: inductor fuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    Ignored,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.fx import Graph

aten = torch.ops.aten
_GATHER = aten.gather.default
_PATTERNS: Any = PatternMatcherPass()


def compare_lookups(graph: Graph) -> None:
    """Change `graph`: `scatter_add` of one number a row into zeros becomes `where`."""
    _PATTERNS.apply(graph)


def _is_of_a_lookup(match: Match) -> bool:
    """Whether `index` has one place in each row of the zeros, all sizes being known.

    A lookup by the same index must be in the graph too: it checks the range, which a comparison does not.
    """
    shape, dim, index, source = (match.kwargs[name] for name in ("shape", "dim", "index", "source"))
    rows = list(shape)
    if not rows:
        return False
    rows[dim] = 1
    sizes = [*shape, *index.meta["val"].shape, *source.meta["val"].shape]
    if not all(type(n) is int for n in sizes) or sizes[len(rows) :] != rows * 2:
        return False
    tables = [(user.args[0].meta["val"].shape, user.args[1]) for user in index.users if user.target is _GATHER]
    return any(list(table) == list(shape) and (axis - dim) % len(rows) == 0 for table, axis in tables)


@register_graph_pattern(
    CallFunction(
        aten.scatter_add.default,
        CallFunction(aten.full.default, KeywordArg("shape"), 0, dtype=Ignored(), device=Ignored(), _users=MULTIPLE),
        KeywordArg("dim"),
        KeywordArg("index"),
        KeywordArg("source"),
    ),
    extra_check=_is_of_a_lookup,
    pass_dict=_PATTERNS,
)
def _compare(match: Match, shape: list[int], dim: int, index: Any, source: Any) -> None:
    def compared(index: Tensor, source: Tensor) -> Tensor:
        places = torch.arange(shape[dim], device=index.device)
        ahead = [1] * len(shape)
        ahead[dim] = shape[dim]
        return torch.where(places.view(ahead) == index, source, source.new_zeros(()))

    match.replace_by_example(compared, [index, source])
