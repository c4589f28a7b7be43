"""The parameter pytree of an ensemble, and the check of it, and of a dict of buffers, against a model.

The check runs where the arguments enter, because a misfit would otherwise raise from deep inside vmap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_ens.anatomy import Anatomy, is_numeric, member_names
from functorch_ens.checks import advice, check_keys, shown


class EnsembleParams(NamedTuple):
    """The parameters of E members: a pytree, as `torch.func`, `torch.optim` and `torch.utils._pytree` take them.

    Keys are the names in `model.named_parameters()`; the rank-1 vectors of a weight `name` are `name_r` and `name_s`,
    and its low-rank factors are `name_lora_A` and `name_lora_B`.
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


def allow_to_load() -> None:
    """Let `torch.load` read `EnsembleParams` by its default, `weights_only=True`.

    Importing this file does so. It is needed again after `torch.serialization.clear_safe_globals()`, or a
    `torch.serialization.safe_globals` of the user that had the class too.
    """
    if EnsembleParams not in torch.serialization.get_safe_globals():  # to add sets the whole list anew
        torch.serialization.add_safe_globals([EnsembleParams])


allow_to_load()


def check_is_params(params: Any) -> None:
    """TypeError where `params` is not an `EnsembleParams`."""
    if not isinstance(params, EnsembleParams):
        raise TypeError(
            f"params: expected EnsembleParams, got {type(params).__name__}; ensemble_params, batchensemble_params, "
            "lora_params and stack_params make them"
        )


def check_names(name: str, anatomy: Anatomy) -> None:
    """ValueError where the model has a parameter of its own that is called as what members would add to `name`."""
    if name not in anatomy.layouts:
        taken = [each for each in member_names(name) if each in anatomy.names]
        raise ValueError(f"model: it already has a parameter named {' and '.join(taken)}; leave {name} out of layers")


def check_leaves(params: Any) -> None:
    """TypeError or ValueError where `params` are no `EnsembleParams` of strided tensors, stacked ones `[E, ...]`."""
    check_is_params(params)
    for part in params:
        if not isinstance(part, Mapping):
            raise TypeError(f"params: expected EnsembleParams of two dicts, got {type(part).__name__}")
        _check_tensors("params", part)
        _check_strided("params", part)
    flat = [name for name, tensor in params.stacked.items() if not tensor.ndim]
    if flat:
        raise ValueError(f"params: expected a leading member axis [E, ...], got tensors of the shape [] in {flat}")


def check_params(params: Any, anatomy: Anatomy) -> int:
    """The number of members of `params`; TypeError or ValueError, naming what is wrong, where they do not fit."""
    check_is_params(params)
    shared, stacked = params
    if not isinstance(shared, Mapping) or not isinstance(stacked, Mapping):
        raise TypeError(
            f"params: expected EnsembleParams of two dicts, got {type(shared).__name__} and {type(stacked).__name__}"
        )
    if not stacked:
        raise ValueError(f"params: nothing is stacked, so there are no members; shared: {list(shared)}")
    twice = [name for name in stacked if name in shared]
    if twice:
        raise ValueError(f"params: both shared and stacked: {twice}")
    given = {**shared, **stacked}
    own = {name: x for name, x in given.items() if name not in anatomy.vectors and name not in anatomy.factors}
    check_keys(own, anatomy.shapes, f"params: {anatomy.kind}")
    alone = [(one, other) for one, other in anatomy.pairs if (one in given) != (other in given)]
    if alone:
        raise ValueError(f"params: r and s come in pairs, and so do lora_A and lora_B; one is missing of {alone}")
    _check_tensors("params", given)
    name, first = next(iter(stacked.items()))
    if first.ndim == 0 or first.shape[0] == 0:
        raise ValueError(f"params: {name}: expected a leading member axis, got a tensor of shape {list(first.shape)}")
    E = first.shape[0]
    _check_shapes("params", shared, anatomy.every_shape, ())
    _check_shapes("params", stacked, anatomy.every_shape, (E,))
    for A, B in anatomy.factor_pairs:
        if A in given and not given[A].shape[-2] == given[B].shape[-1] > 0:
            ranks = given[A].shape[-2], given[B].shape[-1]
            raise ValueError(f"params: {A}, {B}: expected one rank of 1 or more, got {ranks[0]} and {ranks[1]}")
    return E


def check_buffers(buffers: Any, anatomy: Anatomy, E: int) -> None:
    """TypeError or ValueError where `buffers` are not those of the model with a leading member axis of `E`."""
    if not isinstance(buffers, Mapping):
        raise TypeError(f"buffers: expected a dict (from ensemble_buffers), got {type(buffers).__name__}")
    check_keys(buffers, anatomy.buffer_shapes, f"buffers: {anatomy.kind}")
    _check_tensors("buffers", buffers)
    _check_shapes("buffers", buffers, anatomy.buffer_shapes, (E,))


def _check_tensors(argument: str, values: Mapping[str, Any]) -> None:
    """TypeError, naming them, where values are no tensors."""
    wrong = {name: type(value).__name__ for name, value in values.items() if not isinstance(value, Tensor)}
    if wrong:
        raise TypeError(f"{argument}: expected tensors, got {wrong}{advice(values[next(iter(wrong))], 'it')}")


def check_kinds(params: EnsembleParams, buffers: Mapping[str, Tensor] | None, anatomy: Anatomy) -> None:
    """TypeError or ValueError, naming them, where tensors are of a kind that those of the model cannot be.

    It is apart from `check_params` because compiled code goes without it: each look is a guard there.
    """
    _check_kinds("params", {**params.shared, **params.stacked}, anatomy)
    if buffers is not None:
        _check_kinds("buffers", buffers, anatomy)


def _check_kinds(argument: str, values: Mapping[str, Tensor], anatomy: Anatomy) -> None:
    """TypeError or ValueError, naming them, where tensors are of a kind that those of the model cannot be.

    That is sparse, of whole numbers where the model's are not, or on the meta device where others are not.
    """
    _check_strided(argument, values)
    dtypes = {tensor.dtype for tensor in values.values()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        whole = [name for name, x in values.items() if not is_numeric(x) and name not in anatomy.whole_numbers]
        if whole:
            raise TypeError(f"{argument}: expected floating tensors, got one of {values[whole[0]].dtype} in {whole}")
    devices = {tensor.device for tensor in values.values()}
    if len(devices) > 1:
        on_meta = [name for name, tensor in values.items() if tensor.device.type == "meta"]
        if on_meta:
            raise ValueError(f"{argument}: expected tensors with values, got ones on the meta device in {on_meta}")


def _check_strided(argument: str, values: Mapping[str, Tensor]) -> None:
    """ValueError, naming them, where tensors are sparse or nested."""
    odd = [name for name, tensor in values.items() if tensor.layout is not torch.strided or tensor.is_nested]
    if odd:
        raise ValueError(f"{argument}: expected strided tensors, got {shown(values[odd[0]])} in {odd}; give to_dense()")


def _check_shapes(
    argument: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | str, ...]], members: tuple[int, ...]
) -> None:
    """ValueError, listing every misfit, where a tensor has not the shape `[*members, *shapes[name]]`.

    A size in `shapes` that is a word stands for any number.
    """
    wrong = [
        f"{name}: expected [{', '.join(map(str, (*members, *shapes[name])))}], got {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != (*members, *shapes[name]) and not _fits(tensor, (*members, *shapes[name]))
    ]
    if wrong:
        axis = f" with a leading member axis of {members[0]}" if members else ""
        raise ValueError(f"{argument}: wrong shape{axis}: {'; '.join(wrong)}")


def _fits(tensor: Tensor, shape: tuple[int | str, ...]) -> bool:
    """Whether `tensor` has the `shape`, in which a word stands for any number."""
    sizes = zip(tensor.shape, shape, strict=False)
    return tensor.ndim == len(shape) and all(isinstance(want, str) or size == want for size, want in sizes)
