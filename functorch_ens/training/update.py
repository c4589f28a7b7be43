"""A step of an optimiser by given gradients, for all members at once, or for some of them after others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from functorch_ens.training.optim import Trained, is_dense

# What these compute of a number depends on no other number of its tensor. (Not so a subclass, which may do anything.)
_BY_NUMBER = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)

# Tensors that have fewer bytes a member, on average, are copied in less time than it takes to exchange them.
SMALL = 2**17


def can_be_parted(optimizer: Optimizer, trained: Trained) -> bool:
    """Whether steps for some members after others are one step for all, and worth it.

    Each member must have its own of all that is trained, and the optimiser compute number by number. Hooks would see
    parts. Fused kernels write to all that lies between the first and last number of a tensor, so those of a member must
    lie together.
    """
    stacks = trained.params.stacked.values()
    hooks = (
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        *(_global_optimizer_pre_hooks, _global_optimizer_post_hooks),
    )
    return (
        type(optimizer) in _BY_NUMBER
        and not trained.params.shared
        and not trained.slices
        and sum(stack.nbytes // len(stack) for stack in stacks) >= SMALL * len(stacks)
        and not any(hooks)
        and not any(group["differentiable"] for group in optimizer.param_groups)
        and all(is_dense(stack[:1]) for stack in stacks)
    )


class Update:
    """One step of `optimizer`: called once, or for rows of members one after another, which are all members once."""

    def __init__(self, optimizer: Optimizer, trained: Trained) -> None:
        self._optimizer = optimizer
        self._trained = trained
        self._before: dict[str, dict[str, Any]] = {}
        self._new: defaultdict[str, dict[str, Any]] = defaultdict(dict)

    def __call__(self, gradients: dict[str, Tensor], stopped: Collection[int] = (), rows: slice | None = None) -> None:
        """Update all that has gradients, but not the members that have `stopped`.

        Args:
            gradients: by the name of the parameter.
            stopped: members.
            rows: of which members the gradients are, `{name: [k, ...]}`; None: of all.
        """
        first, end = (0, None) if rows is None else (rows.start, rows.stop)
        still = [i - first for i in sorted(stopped) if i >= first and (end is None or i < end)]
        gradients = _apart(gradients)
        whole = {name: self._trained.whole[name] for name in gradients if name in self._trained.whole}
        parts = whole if rows is None else {name: stack.detach()[rows] for name, stack in whole.items()}
        for name, part in parts.items():
            part.grad = _zero_in(gradients[name], still) if still else gradients[name]
        for name, i, tensor in self._trained.slices:
            tensor.grad = gradients[name][i] if name in gradients and i not in stopped else None
        kept = {name: part.detach()[still] for name, part in parts.items()} if still else {}
        try:
            with nullcontext() if rows is None else self._exchanged(whole, parts, rows):
                self._optimizer.step()
        finally:
            slices = (tensor for _, _, tensor in self._trained.slices)
            for tensor in (*whole.values(), *parts.values(), *slices):
                tensor.grad = None
            for name, values in kept.items():
                parts[name].detach()[still] = values

    @contextmanager
    def _exchanged(self, whole: dict[str, Tensor], parts: dict[str, Tensor], rows: slice) -> Iterator[None]:
        """While this lasts, the optimiser holds `rows` of its stacks and of their state, which are the same memory.

        What a step adds to the state is put there when all rows are done, so that an error leaves none of it half made.
        """
        optimizer = self._optimizer
        state, held = optimizer.state, [group["params"] for group in optimizer.param_groups]
        if not self._before:
            self._before = {name: dict(state.get(stack, {})) for name, stack in whole.items()}
        of_rows: defaultdict[Any, Any] = defaultdict(dict)
        for name, part in parts.items():
            of_rows[part] = {key: _of(rows, value, whole[name]) for key, value in self._before[name].items()}
        exchanged = {id(whole[name]): part for name, part in parts.items()}
        try:
            optimizer.state = of_rows
            for group, tensors in zip(optimizer.param_groups, held, strict=True):
                group["params"] = [exchanged[id(tensor)] for tensor in tensors if id(tensor) in exchanged]
            yield
        finally:
            optimizer.state = state
            for group, tensors in zip(optimizer.param_groups, held, strict=True):
                group["params"] = tensors
        for name, part in parts.items():
            for key, value in of_rows[part].items():
                self._keep(name, key, value, rows)
            if self._new[name] and rows.stop == len(whole[name]):
                state[whole[name]].update(self._new[name])

    def _keep(self, name: str, key: str, value: Any, rows: slice) -> None:
        """Of the state of a stack, what the step has left in that of its `rows`."""
        stack = self._trained.whole[name]
        before, new = self._before[name].get(key), self._new[name]  # SGD without momentum has None before
        if isinstance(value, Tensor) and value.shape == stack[rows].shape:
            if before is None:
                if key not in new:
                    new[key] = torch.zeros_like(stack, dtype=value.dtype)
                before = new[key]
            if before[rows].data_ptr() != value.data_ptr():  # it is new, and was not updated in place
                before[rows] = value
        elif isinstance(before, Tensor):
            if rows.stop == len(stack):  # the number of steps, which is the same for all rows
                before.copy_(value)
        else:
            new[key] = value


def _of(rows: slice, value: Any, stack: Tensor) -> Any:
    """What `rows` have of a `value` in the state of a stack."""
    if not isinstance(value, Tensor):
        return value
    return value[rows] if value.shape == stack.shape else value.clone()


def _zero_in(gradient: Tensor, rows: list[int]) -> Tensor:
    """`gradient` without that of `rows`, which may be nan: an optimiser would keep it in its state."""
    gradient = gradient.clone()
    gradient[rows] = 0
    return gradient


def _apart(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, each in memory of its own: two may be one tensor (of a + b), which a hook could clip twice."""
    places = set()
    for name, gradient in gradients.items():
        if gradient.data_ptr() in places:
            gradients = {**gradients, name: gradient.clone()}
        places.add(gradient.data_ptr())
    return gradients
