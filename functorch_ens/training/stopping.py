"""Early stopping of single members."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_ens._torch import pytree
from functorch_ens.params.pytree import EnsembleParams


class Patience:
    """Watches one value per member, keeps a copy of each member's best parameters, and names members to stop.

    Members that share trained tensors have their best epoch together, by the mean of their values.
    """

    def __init__(self, patience: int, E: int, together: bool) -> None:
        self.epochs = patience
        self._together = together
        self._best = torch.full((E,), float("inf"), dtype=torch.float64)
        self._waited = torch.zeros(E, dtype=torch.long)
        self._kept: EnsembleParams | None = None
        self._buffers: dict[str, Tensor] = {}

    def look(self, values: Tensor, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> list[int]:
        """The members that should stop, given this epoch's `values` `[E]`; less is better."""
        values = values.detach().double().cpu()
        if self._together:
            values = values.mean().expand_as(values)
        better = (values < self._best) & (self._waited < self.epochs)  # False for nan and stopped members
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
        """Write the best parameters of every member into `params`, and return its best buffers."""
        if self._kept is not None:
            self._move(self._kept, params, list(range(params.E)))
        return dict(self._buffers)

    def _move(self, source: EnsembleParams, target: EnsembleParams, rows: list[int]) -> None:
        """Copy the members `rows`, and the shared tensors if they are trained (else they are equal already)."""
        _move_rows(source.stacked, target.stacked, rows)
        if self._together:
            with torch.no_grad():
                for name, tensor in source.shared.items():
                    target.shared[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "kept": self._kept, "buffers": self._buffers}

    def load_state_dict(self, state: Mapping[str, Any], params: EnsembleParams, buffers: Mapping[str, Tensor]) -> None:
        """Go on from `state`; its tensors are moved to the devices of `params` and `buffers`."""
        self._best, self._waited = state["best"], state["waited"]
        if state["kept"] is not None:
            self._kept, self._buffers = _copied(state["kept"], params), _copied(state["buffers"], buffers)


def _copied(source: Any, like: Any) -> Any:
    """A copy of `source` with the dtypes and devices of `like`."""
    return pytree.tree_map(lambda s, t: s.detach().to(t, copy=True), source, like)


def _move_rows(source: Mapping[str, Tensor], target: Mapping[str, Tensor], rows: list[int]) -> None:
    with torch.no_grad():
        for name, stack in source.items():
            target[name][rows] = stack[rows]
