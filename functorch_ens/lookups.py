"""In compiled graphs, the gradient of a lookup as a comparison.

A loss looks up the log-probability of each row's label. autograd adds the gradient into zeros at the place that was
looked up (`scatter_add`), and no compiler fuses that with what is before and after it. With one place a row, nothing is
ever added to anything: the gradient is `where(place == index, gradient, 0)`, arithmetic as any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
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
_PATTERNS: Any = PatternMatcherPass()


class ComparedLookups(CustomGraphPass):
    """A pass of inductor: `scatter_add` of one number a row into zeros becomes `where`."""

    def __call__(self, graph: Graph) -> None:
        """Change `graph`."""
        _PATTERNS.apply(graph)

    def uuid(self) -> Any:
        """What the compiler's cache knows this pass by."""
        return get_hash_for_files((__file__,))


def _is_one_a_row(match: Match) -> bool:
    """Whether each row of the zeros gets one number; only where all sizes are known."""
    shape, dim, index, source = (match.kwargs[name] for name in ("shape", "dim", "index", "source"))
    rows = list(shape)
    if not rows:
        return False
    rows[dim] = 1
    sizes = [*shape, *index.meta["val"].shape, *source.meta["val"].shape]
    return all(type(n) is int for n in sizes) and sizes[len(rows) :] == rows * 2


@register_graph_pattern(
    CallFunction(
        aten.scatter_add.default,
        CallFunction(aten.full.default, KeywordArg("shape"), 0, dtype=Ignored(), device=Ignored(), _users=MULTIPLE),
        KeywordArg("dim"),
        KeywordArg("index"),
        KeywordArg("source"),
    ),
    extra_check=_is_one_a_row,
    pass_dict=_PATTERNS,
)
def _compare(match: Match, shape: list[int], dim: int, index: Any, source: Any) -> None:
    def compared(index: Tensor, source: Tensor) -> Tensor:
        places = torch.arange(shape[dim], device=index.device)
        ahead = [1] * len(shape)
        ahead[dim] = shape[dim]
        return torch.where(places.view(ahead) == index, source, 0)

    match.replace_by_example(compared, [index, source])
