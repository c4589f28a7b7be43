"""The parameter pytree of an ensemble."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class EnsembleParams(NamedTuple):
    """The parameters of E members: a pytree, as `torch.func`, `torch.optim` and `torch.utils._pytree` take them.

    Keys are the names in `model.named_parameters()`; the rank-1 vectors of a weight `name` are `name_r` and `name_s`.
    """

    shared: dict[str, Tensor]
    """One tensor for all members."""
    stacked: dict[str, Tensor]
    """A leading axis E: member i owns `[i]`."""

    @property
    def E(self) -> int:
        """The number of members; ValueError where nothing is stacked."""
        if not self.stacked:
            raise ValueError("stacked: expected a tensor with a leading member axis, got {}")
        return next(iter(self.stacked.values())).shape[0]


def check_is_params(params: Any) -> None:
    """TypeError where `params` is no `EnsembleParams`."""
    if not isinstance(params, EnsembleParams):
        raise TypeError(f"params: expected EnsembleParams, got {type(params).__name__}")
