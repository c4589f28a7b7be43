"""Copies of a model, with other tensors in the place of its own, and the check that a model allows that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy
from functorch_ens.holds import Replayed, held, is_iterator, reachable


def copy_structure(
    model: nn.Module,
    parameter: Callable[[Tensor], Tensor],
    buffer: Callable[[Tensor], Tensor],
    memo: dict[int, Any] | None = None,
) -> nn.Module:
    """A deep copy of `model` with `parameter(p)` and `buffer(b)` in the place of its parameters and buffers.

    Ties and the order of parameters and buffers are kept. Tensors in plain attributes (constants, caches) are cloned
    without their autograd history. An iterator can be set back in the copy. A module wrapped by torch.compile is copied
    without the wrapper. `memo` is `copy.deepcopy`'s: afterwards its values are all the objects that the copy does not
    share with `model`.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for _, value in () if _torch.is_compiled(module) else reachable(module):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
    memo.update({id(b): buffer(b) for b in model.buffers()})
    memo.update({id(p): nn.Parameter(parameter(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()})
    what = type(model).__name__
    try:
        for name, value in [each for each in held(model) if is_iterator(each[1])]:
            what = f"{name} of {type(model).__name__}"
            memo[id(value)] = Replayed(copy.deepcopy(value, memo))
        what = type(model).__name__
        for module in reversed(list(model.modules())):  # the innermost first
            if _torch.is_compiled(module):
                memo[id(module)] = copy.deepcopy(_torch.compiled_from(module), memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        error.add_note(f"functorch_ens: {what} could not be copied; copy.deepcopy(model) must work")
        raise


_OF_RNNS = frozenset(vars(nn.RNN(1, 1, device="meta")))
"""The attributes that every RNN has."""


def check_replaceable(anatomy: Anatomy) -> None:
    """ValueError where functional_call cannot replace the parameters of the model.

    TorchScript compiles them into its code, and a tensor that is also kept in a plain attribute is read from there.
    """
    tensors = {id(tensor) for tensor in [*anatomy.parameters.values(), *anatomy.buffers.values()]}
    for prefix, module in anatomy.modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {prefix!r} is a {type(module).__name__}, whose parameters are part of its compiled code; give "
                "the module that it was made from, and compile the forward instead"
            )
        if _torch.is_compiled(module):
            continue
        for name, value in reachable(module):
            cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != CellType()]
            inside = [cell for cell in cells if isinstance(cell, nn.Module) and any(True for _ in cell.parameters())]
            # An RNN fills its list of flat weights anew whenever its parameters are replaced.
            if isinstance(module, nn.RNNBase) and name in _OF_RNNS:
                continue
            if inside or id(value) in tensors or any(id(cell) in tensors for cell in cells):
                raise ValueError(
                    f"model: {type(module).__name__} {prefix!r} keeps parameters or buffers of the model in its "
                    f"attribute {name!r}, besides where they are registered; members could not have their own there. "
                    "Read them from the module that owns them, in a method."
                )
