"""Tensors that a model makes in its forward, as each member's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name + suffix) for name in ("empty", "zeros", "ones", "full") for suffix in ("", "_like")
) | frozenset(getattr(Tensor, f"new_{name}") for name in ("empty", "zeros", "ones", "full"))


class Owned(TorchFunctionMode):
    """Under vmap, makes new tensors differ between members from the start.

    vmap takes a new tensor for one that all members share, into which no member's values can be written in place, nor
    random numbers that differ between members. `zero` is a member's own 0, which makes what it is added to its own.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self._zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _FACTORIES:
            return made
        zero = self._zero.to(made.device)
        return made | (zero != 0) if made.dtype == torch.bool else made + zero.to(made.dtype)
