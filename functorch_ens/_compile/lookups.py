"""In compiled graphs, the gradient of a lookup as a comparison.

A loss looks up the log-probability of each row's label (`gather`). autograd adds the gradient into zeros at the place
that was looked up (`scatter_add`), and no compiler fuses that with what is before and after it. With one place a row,
nothing meets: the gradient is `where(place == index, gradient, 0)`, arithmetic as any other.
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
    """Whether `index` has one place for each row of the zeros, and is looked up too, which checks that it is in range.

    Only where all sizes are known.
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
