"""A step of an optimiser by given gradients: for all members at once, or for one part of them after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from functorch_ens._torch import has_step_hooks
from functorch_ens.training.optim import Trained, fused_kernels, is_dense
from functorch_ens.trees import members

# These update each number of a tensor independently of the others. (A subclass may do anything.)
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

SMALL = 2**17
"""With fewer bytes in a member's tensor, on average, copying its gradient takes less time than an update by parts."""


def can_be_parted(optimizer: Optimizer, trained: Trained) -> bool:
    """Whether updating part by part equals one update of all members, and is faster.

    It is equal where everything trained is stacked and the optimiser updates number by number. Hooks would see parts.
    Fused kernels write to the whole stretch of memory of a tensor, so each member's numbers must be dense.
    """
    stacks = trained.params.stacked.values()
    return (
        type(optimizer) in _BY_NUMBER
        and not trained.params.shared
        and not trained.slices
        and sum(stack.nbytes // len(stack) for stack in stacks) >= SMALL * len(stacks)
        and not has_step_hooks(optimizer)
        and not any(group["differentiable"] for group in optimizer.param_groups)
        and all(is_dense(stack[:1]) for stack in stacks)
    )


class Update:
    """One step of `optimizer`: call it once for all members, or once for each part of them, in order."""

    def __init__(self, optimizer: Optimizer, trained: Trained) -> None:
        self._optimizer = optimizer
        self._trained = trained
        self._before: dict[str, dict[str, Any]] = {}
        self._new: defaultdict[str, dict[str, Any]] = defaultdict(dict)

    def __call__(self, gradients: dict[str, Tensor], stopped: Collection[int] = (), rows: slice | None = None) -> None:
        """Update the parameters that have gradients.

        Args:
            gradients: by the name of the parameter; `[k, ...]` for the members `rows`.
            stopped: members that stay as they are.
            rows: the members of this part. None: all.
        """
        first, end = (0, None) if rows is None else (rows.start, rows.stop)
        still = [i - first for i in sorted(stopped) if i >= first and (end is None or i < end)]
        gradients = _apart(gradients)
        whole = {name: self._trained.whole[name] for name in gradients if name in self._trained.whole}
        held = [tensor for group in self._optimizer.param_groups for tensor in group["params"]]
        left = [(tensor, tensor.grad) for tensor in held]
        for tensor in held:
            tensor.grad = None
        parts = whole if rows is None else members({name: stack.detach() for name, stack in whole.items()}, rows)
        for name, part in parts.items():
            part.grad = _zero_in(gradients[name], still) if still else gradients[name]
        for name, i, tensor in self._trained.slices:
            tensor.grad = gradients[name][i] if name in gradients and i not in stopped else None
        kept = {name: part.detach()[still] for name, part in parts.items()} if still else {}
        try:
            exchanged = nullcontext() if rows is None else self._exchanged(whole, parts, rows)
            with fused_kernels(self._optimizer, self._trained), exchanged:
                self._optimizer.step()
        finally:
            for tensor, gradient in left:
                tensor.grad = gradient
            for name, values in kept.items():
                parts[name].detach()[still] = values

    @contextmanager
    def _exchanged(self, whole: dict[str, Tensor], parts: dict[str, Tensor], rows: slice) -> Iterator[None]:
        """A `with` block in which the optimiser holds the slices `rows` of its stacks and of their state.

        Slices share memory with their stacks. New state of a step is stored after the last part, so that an error in
        between leaves none of it half made.
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
        """Merge one value of the state of a slice into the state of its stack."""
        stack = self._trained.whole[name]
        before, new = self._before[name].get(key), self._new[name]  # SGD without momentum stores None
        if isinstance(value, Tensor) and value.shape == stack[rows].shape:
            if before is None:
                if key not in new:
                    new[key] = torch.zeros_like(stack, dtype=value.dtype)
                before = new[key]
            if before[rows].data_ptr() != value.data_ptr():  # a new tensor: it was not updated in place
                before[rows] = value
        elif isinstance(before, Tensor):
            if rows.stop == len(stack):  # a count of steps, the same for all members
                before.copy_(value)
        else:
            new[key] = value


def _of(rows: slice, value: Any, stack: Tensor) -> Any:
    """The part of a `value` in the state of a stack that belongs to `rows`; a copy of what is not stacked."""
    if not isinstance(value, Tensor):
        return value
    return value[rows] if value.shape == stack.shape else value.clone()


def _zero_in(gradient: Tensor, rows: list[int]) -> Tensor:
    """A copy of `gradient`, 0 in `rows`: a nan there would stay in the state of the optimiser."""
    gradient = gradient.clone()
    gradient[rows] = 0
    return gradient


def _apart(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, each in its own memory: those of a + b are one tensor, which a hook could clip twice."""
    places = set()
    for name, gradient in gradients.items():
        if gradient.data_ptr() in places:
            gradients = {**gradients, name: gradient.clone()}
        places.add(gradient.data_ptr())
    return gradients
