"""torch.optim over the parameters of an ensemble: parameter groups, what an optimiser trains, and fused kernels."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from functorch_ens.anatomy import lora_names, rank1_names
from functorch_ens.checks import check_has_values, check_number, check_of_members, check_tensor, shown
from functorch_ens.params.pytree import EnsembleParams, check_is_params, check_leaves

# The devices for which torch has fused kernels of all optimisers that take `fused`.
_FUSED_DEVICES = ("cpu", "cuda")


def param_groups(
    params: EnsembleParams,
    *,
    rank1_lr_factor: float = 1.0,
    rank1_weight_decay: float | Tensor = 0.0,
    **values: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser of torch.optim: hyperparameters by member, and each kind of tensor apart.

    The groups are named `"shared"`, `"rank-1"` (r and s), `"lora"` (A and B) and `"stacked"` (whole copies).

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> sweep = fe.param_groups(fe.ensemble_params(model, E=3), lr=torch.tensor([1e-2, 1e-3, 1e-4]))
    >>> optimizer = torch.optim.Adam(sweep)  # equal to three optimisers, one for each member
    >>> [(group["name"], f"{group['lr']:g}") for group in optimizer.param_groups]
    [('member 0', '0.01'), ('member 1', '0.001'), ('member 2', '0.0001')]
    >>> groups = fe.param_groups(fe.batchensemble_params(model, E=3), lr=1e-3, rank1_lr_factor=0.5, weight_decay=0.1)
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    [('shared', 0.001, 0.1), ('rank-1', 0.0005, 0.0)]

    Args:
        params: the parameters to train; tensors that need no gradient are left out.
        rank1_lr_factor: multiplies `lr` for r and s.
        rank1_weight_decay: the weight decay of r and s, also where the optimiser decays by default (AdamW). It is 0, as
            in the paper: decay would pull r and s to 0, and the members' weights with them.
        values: hyperparameters of the optimiser (`lr`, `weight_decay`, `betas`, ...). A tensor, array or list `[E]`
            gives one to each member (but a list of `betas` is one pair). Each member's tensors are then a group of
            slices of the stacked ones, and an optimiser that computes over whole tensors sees one member alone. Shared
            tensors cannot have E values.

    Raises:
        TypeError: `params` is no `EnsembleParams`, or a hyperparameter is no number.
        ValueError: a tensor of another length than `[E]`; one where trained tensors are shared; a factor without `lr`;
            a number that is not finite, or below 0 where no optimiser takes that. `make_train_step` refuses names that
            its optimiser does not have.

    Source: Wen, Tran & Ba 2020, arXiv:2002.06715, appendix B.
    """
    check_leaves(params)
    factor = check_number(rank1_lr_factor, "rank1_lr_factor", minimum=0.0)
    if factor != 1 and "lr" not in values:
        raise ValueError(f"rank1_lr_factor: expected lr too, which it multiplies, got {factor:g} alone")
    if isinstance(rank1_weight_decay, Tensor):
        check_tensor(rank1_weight_decay, "rank1_weight_decay")
        _check_hyperparameter(rank1_weight_decay, "rank1_weight_decay", 0.0)
    else:
        check_number(rank1_weight_decay, "rank1_weight_decay", minimum=0.0)
    for key, value in values.items():
        if key == "name":
            raise ValueError(f"name: param_groups names its groups itself, got {value!r}")
        values[key] = _hyperparameter(value, key)
    shared = [tensor for tensor in params.shared.values() if tensor.requires_grad]
    for key, value in values.items():
        if shared and _by_member(value):
            raise ValueError(
                f"{key}: expected one number, got {list(value.shape)}, one for each member, but all members share "
                f"{len(shared)} trained tensors; only a classic ensemble has members of their own throughout"
            )
    kinds = {vector: "rank-1" for name in params.shared for vector in rank1_names(name)}
    kinds |= {factor: "lora" for name in params.shared for factor in lora_names(name)}
    of_rank1 = {**values, "weight_decay": rank1_weight_decay}
    if "lr" in values:
        of_rank1["lr"] = values["lr"] * factor
    groups = [{"name": "shared", "params": shared, **values}] if shared else []
    for kind, mine in (("rank-1", of_rank1), ("lora", values), ("stacked", values)):
        stacks = [stack for name, stack in params.stacked.items() if kinds.get(name, "stacked") == kind]
        trained = [stack for stack in stacks if stack.requires_grad]
        if trained:
            groups += _groups(kind, trained, mine)
    return groups


_AT_LEAST_0 = ("lr", "weight_decay", "eps", "momentum", "rho", "alpha", "lr_decay", "t0", "momentum_decay")
"""Hyperparameters that no optimiser of torch.optim takes below 0."""


def _hyperparameter(value: Any, key: str) -> Any:
    """The hyperparameter `value`, as a tensor of float64 where it has one number for each member.

    Raises TypeError or ValueError for what no optimiser can take: nan, infinite or complex numbers, objects, text for
    a number; and for known names also bools and numbers below 0.
    """
    minimum = 0.0 if key in _AT_LEAST_0 else -math.inf
    if isinstance(value, Tensor):
        check_tensor(value, key)
    if hasattr(value, "__array__") or (isinstance(value, list) and key != "betas"):
        try:
            found = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{key}: expected a number, or one for each member, got {shown(value)}") from error
        _check_hyperparameter(found, key, minimum)
        return torch.as_tensor(value, dtype=torch.float64)
    if isinstance(value, tuple | list):
        for item in value:
            if item is not None:
                _hyperparameter(item, key)
    elif isinstance(value, complex) or (isinstance(value, Real) and not isinstance(value, bool)):
        check_number(value, key, minimum=minimum)
    elif key in _AT_LEAST_0 or not (value is None or isinstance(value, bool | str) or callable(value)):
        raise TypeError(f"{key}: expected a number, or one for each member, got {shown(value)}")
    return value


def _check_hyperparameter(values: Tensor, key: str, minimum: float) -> Tensor:
    """Return `values`; TypeError where they are not numbers, ValueError where one is not finite or below `minimum`."""
    check_has_values(values, key)
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{key}: expected real numbers, got a tensor of {values.dtype}")
    if values.numel() == 0:
        raise ValueError(f"{key}: expected a number for each member, got the shape {list(values.shape)}")
    for value in values.flatten().tolist():
        check_number(value, key, minimum=minimum)
    return values


_OF_SCHEDULERS = ("initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
"""What schedulers of torch.optim add to groups."""


def check_groups(optimizer: Optimizer) -> None:
    """ValueError where a parameter group has a key that the optimiser ignores, or a value that it would refuse.

    torch.optim looks at the arguments of the constructor alone, so a misspelt key in a group trains by the default. An
    optimiser that is not torch's own may read other keys; there only those much like one of its own are refused.
    """
    known, is_torchs = list(optimizer.defaults), type(optimizer).__module__.startswith("torch.optim.")
    for i, group in enumerate(optimizer.param_groups):
        for key in group.keys() - {"params", "name", "param_names", *_OF_SCHEDULERS, *known}:
            if key == "weight_decay" and not isinstance(group[key], Tensor) and group[key] == 0:
                continue  # param_groups says so of r and s to every optimiser
            close = difflib.get_close_matches(key, known, cutoff=0.75)
            if close or is_torchs:
                meant = f"; is {' or '.join(map(repr, close))} meant?" if close else f"; it has {known}"
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} has no hyperparameter {key!r}, which group {i} "
                    f"({group.get('name', 'without a name')}) has{meant}"
                )
        for key in (*_AT_LEAST_0, "betas"):
            if key in group and group[key] is not optimizer.defaults.get(key):  # else its constructor has checked it
                try:
                    _hyperparameter(group[key], key)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"optimizer: group {i}: {error}") from error


def _groups(kind: str, stacks: list[Tensor], values: dict[str, Any]) -> list[dict[str, Any]]:
    """One group of `stacks`; one for each member where a value is `[E]`."""
    own = {key: value for key, value in values.items() if _by_member(value)}
    if not own:
        return [{"name": kind, "params": stacks, **values}]
    E = len(stacks[0])
    for key, value in own.items():
        if check_of_members(value, E, key).ndim > 1:
            raise ValueError(f"{key}: expected one number for each member, got the shape {list(value.shape)}")
    return [
        {
            "name": f"member {i}" if kind == "stacked" else f"{kind} of member {i}",
            "params": [_slice(stack, i) for stack in stacks],
            **values,
            **{key: value[i].item() for key, value in own.items()},
        }
        for i in range(E)
    ]


def _by_member(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _slice(stack: Tensor, i: int) -> Tensor:
    """`stack[i]` as an autograd leaf, which an optimiser takes; it shares the memory of `stack`."""
    return stack.detach()[i].requires_grad_()


class Trained:
    """The tensors of an optimiser as parts of an ensemble's parameters: whole tensors, and slices of stacked ones."""

    whole: dict[str, Tensor]
    """The whole tensors, by name."""
    slices: list[tuple[str, int, Tensor]]
    """The slices `stack[i]`: the name of the stack, the member i, and the optimiser's tensor."""
    params: EnsembleParams
    """The parameters that are trained."""
    fixed: EnsembleParams
    """The others."""
    fusable: set[int]
    """The ids of the optimiser's tensors that a fused kernel can update."""

    def __init__(self, optimizer: Optimizer, params: EnsembleParams) -> None:
        check_leaves(params)
        names = {id(tensor): name for part in params for name, tensor in part.items()}
        if len(names) != len(params.shared) + len(params.stacked):
            raise ValueError(
                "params: one tensor has two names; tied parameters have one, as named_parameters() gives it"
            )
        frozen = [name for part in params for name, tensor in part.items() if tensor.is_inference()]
        if frozen:
            raise ValueError(
                f"params: {frozen[0]} was made under torch.inference_mode(), so it cannot be trained; clone it outside"
            )
        self.whole = {}
        self.slices = []
        tensors = _held(optimizer)
        others = [tensor for tensor in tensors if id(tensor) not in names]
        places = {_place(stack[i]): (name, i) for name, stack in params.stacked.items() for i in range(len(stack))}
        strange = sum(_place(tensor) not in places for tensor in others)
        if strange:
            raise ValueError(
                f"params: the optimizer trains {strange} of its {len(tensors)} tensors elsewhere: they are not in "
                "these params; make it from their tensors, tree_leaves(params)"
            )
        for tensor in tensors:
            if id(tensor) in names:
                self.whole[names[id(tensor)]] = tensor
            else:
                self.slices.append((*places[_place(tensor)], tensor))
        count = Counter((name, i) for name, i, _ in self.slices)
        twice = [name for (name, _), times in count.items() if times > 1 or name in self.whole]
        if twice:
            raise ValueError(f"params: the optimizer trains {twice[0]} twice: as a whole and by members, or one again")
        self.fusable = {
            id(tensor)
            for tensor in tensors
            if tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES and is_dense(tensor)
        }
        chosen = {*self.whole, *(name for name, _, _ in self.slices)}
        self.params, self.fixed = (
            EnsembleParams(
                *({k: v for k, v in part.items() if (k in chosen and v.requires_grad) is keep} for part in params)
            )
            for keep in (True, False)
        )

    def check_stopped(self, stopped: Collection[int], E: int) -> None:
        """ValueError where members share trained tensors, so that none can stop alone, or a member does not exist."""
        members, shared = sorted(stopped), self.params.shared
        if members and shared:
            raise ValueError(
                f"stopped: members {members} cannot stop alone, for all share trained tensors, such as "
                f"{next(iter(shared))}"
            )
        if not all(isinstance(member, Integral) and 0 <= member < E for member in members):
            raise ValueError(f"stopped: expected numbers of members, from 0 to {E - 1}, got {members}")


class Finder:
    """Finds what an optimiser trains of given parameters, and remembers it until either has other tensors."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._last: tuple[list[Any], Trained] | None = None

    def __call__(self, params: EnsembleParams) -> Trained:
        """What the optimiser trains of `params`."""
        check_is_params(params)
        try:
            given = [(name, id(t), t.data_ptr(), t.requires_grad) for part in params for name, t in part.items()]
        except Exception:  # no tensors, or sparse ones: at every step this costs less than to look at them first
            check_leaves(params)
            raise
        key = [given, [id(tensor) for tensor in _held(self._optimizer)]]
        if self._last is None or self._last[0] != key:
            self._last = key, Trained(self._optimizer, params)
        return self._last[1]


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The storage, offset, shape and strides of a tensor: two tensors with the same ones are the same numbers."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def with_strides_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` with the strides of its parameter: with others Adam's fused CPU kernel silently updates wrongly."""
    if parameter.is_contiguous():
        return gradient.contiguous()
    return torch.empty_like(parameter).copy_(gradient)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its stretch of memory without gaps: fused kernels write to the whole stretch."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@contextmanager
def fused_kernels(optimizer: Optimizer, trained: Trained) -> Iterator[None]:
    """Set `fused=True` inside where a group has `fused=None`; torch itself does so on a GPU only.

    Afterwards it is open again: fused kernels update wrongly by gradients of other strides, which a user's own loop may
    give to the same optimiser.
    """
    groups = [group for group in optimizer.param_groups if _can_be_fused(group, trained, optimizer.state)]
    try:
        for group in groups:
            group["fused"] = True
        yield
    finally:
        for group in groups:
            group["fused"] = None


def _can_be_fused(group: dict[str, Any], trained: Trained, state: Mapping[Tensor, Any]) -> bool:
    """Whether `fused` is open, and a fused kernel serves all tensors of the group, and their state."""
    open_to_it = "fused" in group and group["fused"] is None and not group["foreach"] and not group["differentiable"]
    if not open_to_it or not all(id(tensor) in trained.fusable for tensor in group["params"]):
        return False
    # An unfused kernel counts its steps on the CPU, and in the default dtype.
    steps = [(tensor.device, state[tensor].get("step")) for tensor in group["params"] if tensor in state]
    return all(
        (step.device, step.dtype) == (device, torch.float32) for device, step in steps if isinstance(step, Tensor)
    )
