"""Early stopping, member by member."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from functorch_ens.params import EnsembleParams


class Patience:
    """Watches a value of each member, keeps every member as it was at its best, and says who has waited too long.

    Members that share trained tensors stand for each other: they are at their best together, by the mean.
    """

    def __init__(self, patience: int, E: int, together: bool) -> None:
        self.epochs = patience
        self._together = together
        self._best = torch.full((E,), float("inf"), dtype=torch.float64)
        self._waited = torch.zeros(E, dtype=torch.long)
        self._kept: EnsembleParams | None = None
        self._buffers: dict[str, Tensor] | None = None

    def look(self, values: Tensor, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> list[int]:
        """The members that are to stop, by `values` `[E]`, of which less is better."""
        values = values.detach().double().cpu()
        if self._together:
            values = values.mean().expand_as(values)
        better = (values < self._best) & (self._waited < self.epochs)  # nan is not less; who has stopped is done
        self._best = torch.where(better, values, self._best)
        self._waited = torch.where(better, 0, self._waited + 1)
        own = None if buffers is None else dict(buffers)
        if self._kept is None:
            self._kept, self._buffers = (_map(lambda t: t.detach().clone(), tree) for tree in (params, own))
        else:
            rows = better.nonzero().flatten().tolist()
            if rows:
                _copy(params, self._kept, rows, shared=self._together)
                _copy(own, self._buffers, rows)
        return (self._waited >= self.epochs).nonzero().flatten().tolist()

    def put_back(self, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Make every member in `params`, in place, what it was at its best, and return the buffers of then."""
        if self._kept is None:
            return None if buffers is None else dict(buffers)
        _copy(self._kept, params, list(range(params.E)), shared=True)
        return None if buffers is None else _map(Tensor.clone, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "kept": self._kept, "buffers": self._buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]
        self._kept, self._buffers = state["kept"], state["buffers"]


def _map(function: Any, tree: Any) -> Any:
    return pytree.tree_map(function, tree)


def _copy(source: Any, target: Any, rows: list[int], shared: bool = False) -> None:
    """The members `rows` of `source` into `target`, and what they share."""
    if source is None:
        return
    pairs = (source, target) if isinstance(source, dict) else (source.stacked, target.stacked)
    with torch.no_grad():
        for name, stack in pairs[0].items():
            pairs[1][name][rows] = stack[rows]
        if shared:
            for name, tensor in source.shared.items():
                target.shared[name].copy_(tensor)
