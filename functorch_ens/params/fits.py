"""Whether a parameter pytree, or a dict of buffers, fits a model: checked where it enters, never deep inside vmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from functorch_ens.anatomy import Site
from functorch_ens.checks import check_keys
from functorch_ens.layers.registry import rank1_layouts, rank1_names
from functorch_ens.params.pytree import EnsembleParams

Shapes = dict[str, tuple[int, ...]]


class Expected:
    """The names and shapes that the parameters and buffers of an ensemble of one model must have."""

    def __init__(self, model: nn.Module, sites: Mapping[str, list[Site]]) -> None:
        self._kind = type(model).__name__
        self._parameters: Shapes = {name: tuple(places[0].parameter.shape) for name, places in sites.items()}
        self._buffers: Shapes = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
        self._pairs: list[tuple[str, str]] = []  # the r and s that its weights can have
        self._vectors: Shapes = {}
        for name, layout in rank1_layouts(sites).items():
            r, s = rank1_names(name)
            out, into = layout.sizes(sites[name][0].parameter)
            self._pairs.append((r, s))
            self._vectors |= {r: (out,), s: (into,)}
        self._shapes = self._parameters | self._vectors

    def check_params(self, params: Any) -> int:
        """The number of members of `params`; TypeError or ValueError, naming what is wrong, where they do not fit."""
        if not isinstance(params, EnsembleParams):
            raise TypeError(
                "params: expected EnsembleParams (from ensemble_params, batchensemble_params or stack_params), "
                f"got {type(params).__name__}"
            )
        shared, stacked = params
        if not isinstance(shared, Mapping) or not isinstance(stacked, Mapping):
            raise TypeError(
                "params: expected EnsembleParams of two dicts, got "
                f"{type(shared).__name__} and {type(stacked).__name__}"
            )
        if not stacked:
            raise ValueError(f"params: nothing is stacked, so there are no members; shared: {list(shared)}")
        twice = [name for name in stacked if name in shared]
        if twice:
            raise ValueError(f"params: both shared and stacked: {twice}")
        given = {**shared, **stacked}
        own = {name: tensor for name, tensor in given.items() if name not in self._vectors}
        check_keys(own, self._parameters, f"params: {self._kind}")
        alone = [pair for pair in self._pairs if (pair[0] in given) != (pair[1] in given)]
        if alone:
            raise ValueError(f"params: r and s come in pairs; one is missing of {alone}")
        _check_tensors("params", given)
        name, first = next(iter(stacked.items()))
        if first.ndim == 0 or first.shape[0] == 0:
            raise ValueError(
                f"params: {name}: expected a leading member axis, got a tensor of shape {list(first.shape)}"
            )
        E = first.shape[0]
        _check_shapes("params", shared, self._shapes, ())
        _check_shapes("params", stacked, self._shapes, (E,))
        return E

    def check_buffers(self, buffers: Any, E: int) -> None:
        """TypeError or ValueError where `buffers` are not the model's, with a leading member axis of `E`."""
        if not isinstance(buffers, Mapping):
            raise TypeError(f"buffers: expected a dict (from ensemble_buffers), got {type(buffers).__name__}")
        check_keys(buffers, self._buffers, f"buffers: {self._kind}")
        _check_tensors("buffers", buffers)
        _check_shapes("buffers", buffers, self._buffers, (E,))


def _check_tensors(argument: str, values: Mapping[str, Any]) -> None:
    """TypeError, naming them, where values are no tensors."""
    wrong = {name: type(value).__name__ for name, value in values.items() if not isinstance(value, Tensor)}
    if wrong:
        raise TypeError(f"{argument}: expected tensors, got {wrong}")


def _check_shapes(argument: str, tensors: Mapping[str, Tensor], shapes: Shapes, members: tuple[int, ...]) -> None:
    """ValueError, listing every misfit, where a tensor's shape is not the member axis, if any, and then its own."""
    wrong = [
        f"{name}: expected {[*members, *shapes[name]]}, got {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != (*members, *shapes[name])
    ]
    if wrong:
        axis = f" with a leading member axis of {members[0]}" if members else ""
        raise ValueError(f"{argument}: wrong shape{axis}: {'; '.join(wrong)}")
