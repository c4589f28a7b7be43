"""Early stopping of single members, and which way a monitored value gets better."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_ens._torch import pytree
from functorch_ens.params.pytree import EnsembleParams

_LESS = {"loss", "error", "err", "nll", "neg", "negative", "brier", "mse", "rmse", "mae", "ece"}
_MORE = {"accuracy", "acc", "auroc", "auc", "aupr", "f1", "precision", "recall", "r2", "iou", "dice", "likelihood"}


def better(monitor: str) -> str:
    """Which values of `monitor` are better, by its name: `"max"` for accuracy and its like, else `"min"`.

    >>> [better(name) for name in ("nll", "val_accuracy", "top-1 acc", "-accuracy", "calibration_error", "value")]
    ['min', 'max', 'max', 'min', 'min', 'min']
    """
    if re.match(r"(1 ?)?-", monitor):
        return "min"
    words = set(re.findall(r"[a-z]+\d?", monitor.lower()))
    return "max" if words & _MORE and not words & _LESS else "min"


class Patience:
    """Watches one value per member, keeps a copy of each member's best parameters, and names members to stop.

    Members that share trained tensors have their best epoch together, by the mean of their values.
    """

    def __init__(self, patience: int, E: int, together: bool, mode: str = "min") -> None:
        self.epochs = patience
        self._together = together
        self._mode = mode
        self._best = torch.full((E,), float("inf"), dtype=torch.float64)
        self._waited = torch.zeros(E, dtype=torch.long)
        self._kept: EnsembleParams | None = None
        self._buffers: dict[str, Tensor] = {}

    def look(self, values: Tensor, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> list[int]:
        """The members that should stop, given this epoch's `values` `[E]`. A nan is no better than anything."""
        values = values.detach().double().cpu() * (-1 if self._mode == "max" else 1)  # so less is better
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
        return {
            "mode": self._mode,
            "best": self._best,
            "waited": self._waited,
            "kept": self._kept,
            "buffers": self._buffers,
        }

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
