"""Whether a parameter pytree, or a dict of buffers, fits a model: checked where it enters, never deep inside vmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from functorch_ens.checks import check_keys
from functorch_ens.params import EnsembleParams
from functorch_ens.rank1 import can_be_rank1, layout_of, rank1_names
from functorch_ens.structure import Site

Shapes = dict[str, tuple[int, ...]]


class Expected:
    """The names and shapes that the parameters and buffers of an ensemble of one model must have."""

    def __init__(self, model: nn.Module, sites: Mapping[str, list[Site]]) -> None:
        self.kind = type(model).__name__
        self.parameters: Shapes = {}
        self.vectors: Shapes = {}  # the r and s that its weights can have
        for name, places in sites.items():
            parameter = places[0].parameter
            self.parameters[name] = tuple(parameter.shape)
            if can_be_rank1(parameter):
                sizes = layout_of(places[0].module).sizes(parameter)
                self.vectors |= {vector: (size,) for vector, size in zip(rank1_names(name), sizes, strict=True)}
        self.vectors = {name: shape for name, shape in self.vectors.items() if name not in self.parameters}
        self.buffers: Shapes = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}

    def check_params(self, params: Any) -> int:
        """The number of members of `params`; TypeError or ValueError, listing all that is wrong, where they do not fit."""
        if not isinstance(params, EnsembleParams):
            raise TypeError(
                f"params: expected EnsembleParams (from ensemble_params, batchensemble_params or stack_params), got {type(params).__name__}"
            )
        shared, stacked = params
        if not stacked:
            raise ValueError(f"params: nothing is stacked, so there are no members; shared: {list(shared)}")
        twice = [name for name in stacked if name in shared]
        if twice:
            raise ValueError(f"params: both shared and stacked: {twice}")
        given = [name for name in (*shared, *stacked) if name not in self.vectors]
        check_keys(given, self.parameters, f"params: {self.kind}")
        shapes = self.parameters | self.vectors
        pairs = [rank1_names(name) for name in self.parameters]
        alone = [
            pair
            for pair in pairs
            if ((pair[0] in shared or pair[0] in stacked) != (pair[1] in shared or pair[1] in stacked))
        ]
        if alone:
            raise ValueError(f"params: r and s come in pairs; one is missing of {alone}")
        first = next(iter(stacked.values()))
        if first.ndim == 0:
            raise ValueError(f"params: {next(iter(stacked))}: expected a leading member axis, got a tensor of shape []")
        E = first.shape[0]
        _check_shapes("params", shared, shapes)
        _check_shapes("params", stacked, shapes, E)
        return E

    def check_buffers(self, buffers: Any, E: int) -> None:
        """TypeError or ValueError where `buffers` are not the model's, with a leading member axis of `E`."""
        if not isinstance(buffers, Mapping):
            raise TypeError(f"buffers: expected a dict (from ensemble_buffers), got {type(buffers).__name__}")
        check_keys(buffers, self.buffers, f"buffers: {self.kind}")
        _check_shapes("buffers", buffers, self.buffers, E)


def _check_shapes(argument: str, tensors: Mapping[str, Tensor], shapes: Shapes, E: int | None = None) -> None:
    """ValueError, listing every misfit, where a tensor is not of its shape, behind a member axis where `E` is given."""
    members = () if E is None else (E,)
    wrong = [
        f"{name}: expected {[*members, *shapes[name]]}, got {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != (*members, *shapes[name])
    ]
    if wrong:
        axis = "" if E is None else f" with a leading member axis of {E}"
        raise ValueError(f"{argument}: wrong shape{axis}: {'; '.join(wrong)}")
