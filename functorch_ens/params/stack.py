"""From E separate models to one ensemble and back: stack trained members, or take one member out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn

from functorch_ens._torch import normal
from functorch_ens.anatomy import Anatomy, is_numeric
from functorch_ens.layers.weight import member_weight
from functorch_ens.params.pytree import EnsembleParams, check_kinds, check_params
from functorch_ens.trees import members as members_of

Member = nn.Module | Mapping[str, Tensor]


def stack_params(members: Sequence[Member], *, model: nn.Module | None = None) -> EnsembleParams:
    """The parameters of a classic ensemble whose members are trained models of one kind.

    >>> import torch, functorch_ens as fe
    >>> params = fe.stack_params([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
    >>> params.stacked["weight"].shape
    torch.Size([2, 2, 3])

    Args:
        members: modules, or their state_dicts. Those of a classic ensemble: nothing is shared.
        model: tells the parameters in a state_dict from the buffers; needed for state_dicts of a model that has buffers
            or tied parameters. Take the buffers to `stack_buffers`.

    Returns: parameters that own their memory and are autograd leaves; frozen where the members' are.

    Raises:
        TypeError: a member is neither a module nor a mapping of tensors.
        ValueError: no members; or names, shapes, dtypes, devices or `requires_grad` differ among them (all differences
            are listed).
    """
    tables = _tables(members, model, "parameters")
    _check_alike(tables)
    stacked = _stack(tables)
    return EnsembleParams(
        {}, {name: stacked[name].requires_grad_(value.requires_grad) for name, value in tables[0].items()}
    )


def stack_buffers(members: Sequence[Member], *, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The buffers (BatchNorm statistics, masks) of trained models, stacked: `{name: [E, ...]}`.

    Takes `members` and `model` as `stack_params` does and raises as it does; for state_dicts `model` must be given,
    whose own values stand for buffers that are not persistent.
    """
    tables = _tables(members, model, "buffers")
    _check_alike(tables)
    return _stack(tables)


def member_params(model: nn.Module, params: EnsembleParams, i: int) -> dict[str, Tensor]:
    """The effective weights of member `i` as an ordinary network has them: `(W + B_i A_i) * (r_i s_i^T)`.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> params = fe.batchensemble_params(model, E=5)
    >>> _ = model.load_state_dict(fe.member_params(model, params, 2))

    Returns: `{name: tensor}` of the model's own shapes, tied parameters under each of their names, in memory of their
        own. Gradients flow through to `params`. `model.load_state_dict` takes it, with `strict=False` for a model with
        buffers.

    Raises:
        TypeError: `i` is not an int.
        ValueError: `i` is not in 0 ... E - 1, or `params` are not those of `model`.
    """
    anatomy = Anatomy(model)
    E = check_params(params, anatomy)
    check_kinds(params, None, anatomy)
    if isinstance(i, bool) or not isinstance(i, Integral):
        raise TypeError(f"i: expected an int, got {i!r}")
    if not 0 <= i < E:
        raise ValueError(f"i: expected 0 <= i < {E}, got {i}")
    weights = {name: weight.clone() for name, weight in effective(params, anatomy, int(i))}
    return {name: weights[first] for name, first in anatomy.names.items()}


def effective(params: EnsembleParams, anatomy: Anatomy, i: int) -> Iterator[tuple[str, Tensor]]:
    """The effective weights of member `i`, by their first names; some are those of `params` themselves."""
    tensors = {**params.shared, **members_of(dict(params.stacked), i)}
    for name in anatomy.parameters:
        found = member_weight(tensors, name, anatomy.layouts[name]) if name in anatomy.layouts else None
        yield name, tensors[name] if found is None else found.materialise()


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


Kind = Literal["parameters", "buffers"]


def _tables(members: Sequence[Member], model: nn.Module | None, kind: Kind) -> list[dict[str, Tensor]]:
    """The parameters or the buffers of every member."""
    if isinstance(members, Mapping | nn.Module) or not isinstance(members, Sequence):
        raise TypeError(f"members: expected a list of modules or state_dicts, got {type(members).__name__}")
    if not members:
        raise ValueError("members: expected at least one module or state_dict, got an empty list")
    anatomy = None if model is None else Anatomy(model)
    tables = []
    for index, member in enumerate(members):
        if isinstance(member, nn.Module):
            tables.append(_of_kind(Anatomy(member), kind))
        elif isinstance(member, Mapping) and all(isinstance(value, Tensor) for value in member.values()):
            tables.append(_from_state_dict(member, index, anatomy, kind))
        else:
            raise TypeError(f"members: expected modules or state_dicts, member {index} is {type(member).__name__}")
    return tables


def _of_kind(anatomy: Anatomy, kind: Kind) -> dict[str, Tensor]:
    return dict(anatomy.parameters if kind == "parameters" else anatomy.buffers)


def _from_state_dict(state: Mapping[str, Tensor], index: int, anatomy: Anatomy | None, kind: Kind) -> dict[str, Tensor]:
    """The tensors of one `kind` in a state_dict, with the model's `requires_grad`; without a model all are trained."""
    if anatomy is None:
        buffers = [name for name in state if name.rpartition(".")[2] in _STATISTICS]
        if buffers or kind == "buffers":
            raise ValueError(
                f"model: got None, but state_dict {index} does not say which of its tensors are buffers (as {buffers} "
                "are); give model=, and stack the buffers with stack_buffers"
            )
        return {name: value.detach().requires_grad_(is_numeric(value)) for name, value in state.items()}
    own, saved = _of_kind(anatomy, kind), anatomy.model.state_dict()
    unexpected = [name for name in state if name not in saved]
    missing = [name for name in own if name in saved and name not in state]
    if missing or unexpected:
        raise ValueError(f"members: state_dict {index} is not one of model: missing {missing}, unexpected {unexpected}")
    return {name: state.get(name, value).detach().requires_grad_(value.requires_grad) for name, value in own.items()}


def _check_alike(tables: list[dict[str, Tensor]]) -> None:
    """ValueError, listing all that differs, where members have other names, shapes, dtypes, devices or frozen parts."""
    first, wrong = tables[0], []
    for index, table in enumerate(tables[1:], start=1):
        if table.keys() != first.keys():
            missing, unexpected = [n for n in first if n not in table], [n for n in table if n not in first]
            wrong.append(f"member {index}: missing {missing}, unexpected {unexpected}")
        for name in [name for name in first if name in table]:
            for what, value in _signature(first[name]).items():
                other = _signature(table[name])[what]
                if other != value:
                    wrong.append(f"member {index}: {name}: {what} {other}, member 0 has {value}")
    if wrong:
        raise ValueError(f"members: they are not of one kind: {'; '.join(wrong)}")


def _signature(tensor: Tensor) -> dict[str, object]:
    return {
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "requires_grad": tensor.requires_grad,
    }


def _stack(tables: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`{name: [E, ...]}`, in memory of their own."""
    return {name: normal(torch.stack([table[name].detach() for table in tables])) for name in tables[0]}
