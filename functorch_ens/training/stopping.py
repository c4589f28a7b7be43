"""Early stopping, member by member."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from functorch_ens.params.pytree import EnsembleParams


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
        self._buffers: dict[str, Tensor] = {}

    def look(self, values: Tensor, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> list[int]:
        """The members that are to stop, by `values` `[E]`, of which less is better."""
        values = values.detach().double().cpu()
        if self._together:
            values = values.mean().expand_as(values)
        better = (values < self._best) & (self._waited < self.epochs)  # nan is not less; who has stopped is done
        self._best = torch.where(better, values, self._best)
        self._waited = torch.where(better, 0, self._waited + 1)
        rows = better.nonzero().flatten().tolist()
        if self._kept is None:
            self._kept, self._buffers = _copied(params, params), _copied(buffers or {}, buffers or {})
        elif rows:
            self._move(params, self._kept, rows)
            _move_rows(buffers or {}, self._buffers, rows)
        return (self._waited >= self.epochs).nonzero().flatten().tolist()

    def put_back(self, params: EnsembleParams) -> dict[str, Tensor]:
        """Make every member in `params`, in place, what it was at its best, and return the buffers of then."""
        if self._kept is not None:
            self._move(self._kept, params, list(range(params.E)))
        return dict(self._buffers)

    def _move(self, source: EnsembleParams, target: EnsembleParams, rows: list[int]) -> None:
        """The members `rows`, and what is shared where it is trained: else it is the same in both."""
        _move_rows(source.stacked, target.stacked, rows)
        if self._together:
            with torch.no_grad():
                for name, tensor in source.shared.items():
                    target.shared[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "kept": self._kept, "buffers": self._buffers}

    def load_state_dict(self, state: Mapping[str, Any], params: EnsembleParams, buffers: Mapping[str, Tensor]) -> None:
        """Go on from `state`; what is kept goes to where `params` and `buffers` are."""
        self._best, self._waited = state["best"], state["waited"]
        if state["kept"] is not None:
            self._kept, self._buffers = _copied(state["kept"], params), _copied(state["buffers"], buffers)


def _copied(source: Any, like: Any) -> Any:
    """New tensors with the values of `source`, of the dtypes and on the devices of `like`."""
    return pytree.tree_map(lambda s, t: s.detach().to(t, copy=True), source, like)


def _move_rows(source: Mapping[str, Tensor], target: Mapping[str, Tensor], rows: list[int]) -> None:
    with torch.no_grad():
        for name, stack in source.items():
            target[name][rows] = stack[rows]
