"""torch.optim over the parameters of an ensemble: parameter groups, and what an optimiser trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from functorch_ens.anatomy import rank1_names
from functorch_ens.checks import check_number, check_of_members
from functorch_ens.params.pytree import EnsembleParams

# The devices that have fused kernels for those optimisers of torch.optim that take `fused`.
_FUSED_DEVICES = ("cpu", "cuda")


def param_groups(
    params: EnsembleParams,
    *,
    rank1_lr_factor: float = 1.0,
    rank1_weight_decay: float | Tensor = 0.0,
    **values: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser of torch.optim: hyperparameters by member, and r and s apart from the rest.

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
        params: what is to be trained; tensors that need no gradient are left out.
        rank1_lr_factor: what `lr` is multiplied by for r and s.
        rank1_weight_decay: the weight decay of r and s, also where the optimiser has one by default (AdamW): none, as
            in the paper, for it would draw them to 0, and the members' weights with them.
        values: hyperparameters of the optimiser (`lr`, `weight_decay`, `betas`, ...). A tensor, array or list `[E]` has
            one for each member (but a list of `betas` is one pair). Each member's tensors are then a group of their
            own, slices of the stacked ones, which `make_train_step` knows as such; what an optimiser computes over a
            tensor as a whole is then also of that member alone. Tensors that all members share cannot have E values
            of anything.

    Raises:
        TypeError: `params` is no `EnsembleParams`.
        ValueError: a tensor of another length than `[E]`; one where trained tensors are shared; a factor without `lr`.

    Source: Wen, Tran & Ba 2020, arXiv:2002.06715, appendix B.
    """
    if not isinstance(params, EnsembleParams):
        raise TypeError(f"params: expected EnsembleParams, got {type(params).__name__}")
    factor = check_number(rank1_lr_factor, "rank1_lr_factor", minimum=0.0)
    if factor != 1 and "lr" not in values:
        raise ValueError(f"rank1_lr_factor: expected lr too, which it multiplies, got {factor:g} alone")
    if not isinstance(rank1_weight_decay, Tensor):
        check_number(rank1_weight_decay, "rank1_weight_decay", minimum=0.0)
    for key, value in values.items():
        if hasattr(value, "__array__") or (isinstance(value, list) and key != "betas"):
            values[key] = torch.as_tensor(value, dtype=torch.float64)
    shared = [tensor for tensor in params.shared.values() if tensor.requires_grad]
    for key, value in values.items():
        if shared and _by_member(value):
            raise ValueError(
                f"{key}: expected one number, got {list(value.shape)}, one for each member, but all members share "
                f"{len(shared)} trained tensors; only a classic ensemble has members of their own throughout"
            )
    vectors = {vector for name in params.shared for vector in rank1_names(name)}
    of_rank1 = {**values, "weight_decay": rank1_weight_decay}
    if "lr" in values:
        of_rank1["lr"] = values["lr"] * factor
    groups = [{"name": "shared", "params": shared, **values}] if shared else []
    for kind, mine in (("rank-1", of_rank1), ("stacked", values)):
        stacks = [t for name, t in params.stacked.items() if (name in vectors) is (kind == "rank-1")]
        trained = [stack for stack in stacks if stack.requires_grad]
        if trained:
            groups += _groups(kind, trained, mine)
    return groups


def _groups(kind: str, stacks: list[Tensor], values: dict[str, Any]) -> list[dict[str, Any]]:
    """One group of `stacks`, or one for each member where a value is `[E]`."""
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
    """Member i's part of `stack`, as a tensor that an optimiser takes; it is the same memory."""
    return stack.detach()[i].requires_grad_()


class Trained:
    """The tensors of an optimiser, as parts of an ensemble's parameters: whole ones, and slices of stacked ones."""

    def __init__(self, optimizer: Optimizer, params: EnsembleParams) -> None:
        if not isinstance(params, EnsembleParams):
            raise TypeError(f"params: expected EnsembleParams, got {type(params).__name__}")
        names = {id(tensor): name for part in params for name, tensor in part.items()}
        if len(names) != len(params.shared) + len(params.stacked):
            raise ValueError(
                "params: one tensor has two names; tied parameters have one, as named_parameters() gives it"
            )
        self.whole: dict[str, Tensor] = {}
        """Those that are whole, by name."""
        self.slices: list[tuple[str, int, Tensor]] = []
        """Those that are one member's part of a stack: its name, and whose it is."""
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
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
        chosen = {*self.whole, *(name for name, _, _ in self.slices)}
        self.params, self.fixed = (
            EnsembleParams(
                *({k: v for k, v in part.items() if (k in chosen and v.requires_grad) is keep} for part in params)
            )
            for keep in (True, False)
        )
        """What is trained, and what is not."""


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where in memory a tensor is, and how it lies there."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def clipped(
    gradients: dict[str, Tensor],
    stacked: Collection[str],
    stopped: Collection[int],
    max_norm: float,
    by: str,
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """The gradients, scaled down where their norm is above `max_norm`, as `torch.nn.utils.clip_grad_norm_` does it.

    By `"member"` each member's own gradients `[i]` have a norm, and those of what all share have one; by `"ensemble"`
    there is one over all. In that one, members that have stopped, or whose gradients are not finite, do not count.
    """
    own = {name: gradient for name, gradient in gradients.items() if name in stacked}
    squares = [_sum_of_squares(gradient, 1) for gradient in own.values()]  # [E] each
    members = torch.stack(squares).sum(0) if squares else None
    rest = [_sum_of_squares(gradient, 0) for name, gradient in gradients.items() if name not in own]
    shared = torch.stack(rest).sum() if rest else None
    if by == "ensemble":
        parts = [] if shared is None else [shared]
        if members is not None:
            counts = members.isfinite()
            counts[sorted(stopped)] = False
            parts.append(torch.where(counts, members, 0).sum())
        shared = torch.stack(parts).sum()
        members = None if members is None else shared.expand_as(members)

    def scale(square: Tensor) -> Tensor:
        return (max_norm / (square.sqrt() + eps)).clamp(max=1)

    scaled = {}
    for name, gradient in gradients.items():
        if name in own:
            assert members is not None
            factor = scale(members).reshape(-1, *[1] * (gradient.ndim - 1))
        else:
            assert shared is not None
            factor = scale(shared)
        scaled[name] = gradient * factor.to(gradient.dtype)
    return scaled


def _sum_of_squares(tensor: Tensor, keep: int) -> Tensor:
    """Over all axes but the first `keep`; of half precision in float32, which has room for squares."""
    tensor = tensor.abs()
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()
    return tensor.sum(tuple(range(keep, tensor.ndim))) if tensor.ndim > keep else tensor


def with_strides_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` laid out as its parameter: Adam's fused kernel for CPUs goes wrong on any other, and says nothing."""
    if parameter.is_contiguous():
        return gradient.contiguous()
    return torch.empty_like(parameter).copy_(gradient)


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers fill a stretch of memory, in any order: fused kernels go over all that is in it."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def use_fused_kernels(optimizer: Optimizer) -> None:
    """Turn `fused` on where it was left open, as torch itself does not on a CPU."""
    if optimizer.state:  # kept as the unfused step has begun it
        return
    for group in optimizer.param_groups:
        open_to_it = "fused" in group and group["fused"] is None and not group["foreach"]
        served = all(
            tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES and is_dense(tensor)
            for tensor in group["params"]
        )
        if open_to_it and served and not group.get("differentiable"):
            group["fused"] = True
