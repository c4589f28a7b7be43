"""Between E separate models and one ensemble: stack trained members, and take one member out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from functorch_ens.anatomy import is_numeric, parameter_sites
from functorch_ens.layers.registry import Rank1, rank1_layouts, rank1_names
from functorch_ens.params.fits import Expected
from functorch_ens.params.pytree import EnsembleParams

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
    tables = _tables(members, model, "named_parameters")
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
    tables = _tables(members, model, "named_buffers")
    _check_alike(tables)
    return _stack(tables)


def member_params(model: nn.Module, params: EnsembleParams, i: int) -> dict[str, Tensor]:
    """The effective weights of member `i` as an ordinary network has them: `W * (r_i s_i^T)` for a rank-1 weight.

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
    sites = parameter_sites(model)
    E = Expected(model, sites).check_params(params)
    if isinstance(i, bool) or not isinstance(i, Integral):
        raise TypeError(f"i: expected an int, got {i!r}")
    if not 0 <= i < E:
        raise ValueError(f"i: expected 0 <= i < {E}, got {i}")
    tensors = {**params.shared, **{name: stack[int(i)] for name, stack in params.stacked.items()}}
    layouts = rank1_layouts(sites)
    weights: dict[int, Tensor] = {}  # by the identity of the model's parameter
    for name, places in sites.items():
        value = tensors[name].clone()
        r_name, s_name = rank1_names(name)
        if name in layouts and r_name in tensors:
            value = Rank1(value, tensors[r_name], tensors[s_name], layouts[name]).materialise()
        weights[id(places[0].parameter)] = value
    return {name: weights[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _tables(members: Sequence[Member], model: nn.Module | None, kind: str) -> list[dict[str, Tensor]]:
    """Of every member, its `named_parameters` or `named_buffers`."""
    if isinstance(members, Mapping | nn.Module) or not isinstance(members, Sequence):
        raise TypeError(f"members: expected a list of modules or state_dicts, got {type(members).__name__}")
    if not members:
        raise ValueError("members: expected at least one module or state_dict, got an empty list")
    if model is not None:
        parameter_sites(model)
    tables = []
    for index, member in enumerate(members):
        if isinstance(member, nn.Module):
            parameter_sites(member)
            tables.append(dict(getattr(member, kind)()))
        elif isinstance(member, Mapping) and all(isinstance(value, Tensor) for value in member.values()):
            tables.append(_from_state_dict(member, index, model, kind))
        else:
            raise TypeError(f"members: expected modules or state_dicts, member {index} is {type(member).__name__}")
    return tables


def _from_state_dict(state: Mapping[str, Tensor], index: int, model: nn.Module | None, kind: str) -> dict[str, Tensor]:
    """The tensors of one `kind` in a state_dict. It does not say what is trained: what is in `model`, or everything."""
    if model is None:
        buffers = [name for name in state if name.rpartition(".")[2] in _STATISTICS]
        if buffers or kind == "named_buffers":
            raise ValueError(
                f"model: got None, but state_dict {index} does not say which of its tensors are buffers (as {buffers} "
                "are); give model=, and stack the buffers with stack_buffers"
            )
        return {name: value.detach().requires_grad_(is_numeric(value)) for name, value in state.items()}
    own, saved = dict(getattr(model, kind)()), model.state_dict()
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
    return {name: torch.stack([table[name].detach() for table in tables]) for name in tables[0]}
