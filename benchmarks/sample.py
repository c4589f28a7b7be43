"""A model with an input for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Sample(NamedTuple):
    """A model, and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def of(layer: Callable[[], nn.Module], *inputs: Any, **kwargs: Any) -> Callable[[], Sample]:
    """A case: `inputs` are shapes of random numbers (lists), or functions that make an input."""

    def make() -> Sample:
        args = tuple(torch.randn(each) if isinstance(each, list) else each() for each in inputs)
        return Sample(layer(), args, kwargs)

    return make


def integers(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape)
