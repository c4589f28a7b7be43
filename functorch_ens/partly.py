"""One step of an optimiser, taken for some members after others: in memory are the gradients of these alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from functorch_ens.optimisers import Trained, apart, is_dense

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


def can_step_partly(optimizer: Optimizer, trained: Trained) -> bool:
    """Whether steps for some members after others are one step for all.

    Each member has its own of all that is trained, and the optimiser computes by members, or by single numbers, which
    in memory lie member after member, for fused kernels take a stretch of it.
    """
    by_number = type(optimizer) in _BY_NUMBER and all(is_dense(stack[:1]) for stack in trained.whole.values())
    return not trained.params.shared and (not trained.whole or by_number)


class PartlyStep:
    """A step of `optimizer`: called for rows of members, which together are all members once.

    Tensors that the optimiser holds as whole stacks are exchanged, for as long as a call lasts, for the rows of them
    and of their state (the moments of Adam), which are the same memory. What is no stack in the state (the number of
    steps) is the same for all rows.
    """

    def __init__(self, optimizer: Optimizer, trained: Trained) -> None:
        self._optimizer = optimizer
        self._trained = trained
        self._before = {name: dict(optimizer.state.get(stack, {})) for name, stack in trained.whole.items()}

    @torch.no_grad()
    def __call__(self, rows: slice, gradients: dict[str, Tensor]) -> None:
        """Update the members `rows` by their `gradients`, `{name: [k, ...]}`."""
        optimizer, gradients = self._optimizer, apart(gradients)
        parts = {name: self._trained.whole[name].detach()[rows] for name in gradients if name in self._trained.whole}
        for name, part in parts.items():
            part.grad = gradients[name]
        slices = [(gradients[name][i - rows.start], t) for name, i, t in self._trained.slices if i in _range(rows)]
        for gradient, tensor in slices:
            tensor.grad = gradient
        exchanged = {id(self._trained.whole[name]): part for name, part in parts.items()}
        held = [group["params"] for group in optimizer.param_groups]
        state = optimizer.state
        try:
            if parts:
                optimizer.state = defaultdict(dict, {part: self._of_rows(name, rows) for name, part in parts.items()})
                for group, tensors in zip(optimizer.param_groups, held, strict=True):
                    group["params"] = [exchanged.get(id(tensor), tensor) for tensor in tensors]
            optimizer.step()
            of_parts = optimizer.state
        finally:
            optimizer.state = state
            for group, tensors in zip(optimizer.param_groups, held, strict=True):
                group["params"] = tensors
            for _, tensor in slices:
                tensor.grad = None
        for name, part in parts.items():
            if new := of_parts[part]:
                self._keep(state[self._trained.whole[name]], new, self._trained.whole[name], rows)

    def _of_rows(self, name: str, rows: slice) -> dict[str, Any]:
        """The state of `rows` before the step."""
        shape = self._trained.whole[name].shape
        return {
            key: value if not isinstance(value, Tensor) else value[rows] if value.shape == shape else value.clone()
            for key, value in self._before[name].items()
        }

    @staticmethod
    def _keep(state: dict[str, Any], new: dict[str, Any], stack: Tensor, rows: slice) -> None:
        """Into the `state` of a stack, what is `new` in that of its `rows`."""
        shape = stack[rows].shape
        for key, value in new.items():
            if not isinstance(value, Tensor) or value.shape != shape:
                state[key] = value
                continue
            if not isinstance(state.get(key), Tensor):
                state[key] = torch.zeros_like(stack, dtype=value.dtype)
            mine = state[key][rows]
            if mine.data_ptr() != value.data_ptr():  # it is new, and was not updated in place
                mine.copy_(value)


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)
