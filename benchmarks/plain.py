"""What every ensemble must equal: a plain Python loop over E ordinary modules, each with its own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Weights = Mapping[str, Tensor]


def plain_loop(
    model: nn.Module,
    weights: Sequence[Weights],
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """The outputs and new buffers of `plain_members`, stacked."""
    return stacked(*plain_members(model, weights, buffers, args, kwargs, seed))


def plain_members(
    model: nn.Module,
    weights: Sequence[Weights],
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int | None = None,
) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """The outputs, and the new buffers, of a copy of `model` with each of the `weights`.

    Args:
        model: is only read.
        weights: of every member, by the names in `named_parameters()`; gradients flow back to them.
        buffers: `{name: [E, ...]}`.
        seed: every member draws its random numbers from there.
    """
    outputs, new = [], []
    for i, own in enumerate(weights):
        if seed is not None:
            torch.manual_seed(seed)
        member = with_weights(model, own, {name: stack[i].clone() for name, stack in buffers.items()})
        outputs.append(pytree.tree_map(opened, member(*args, **kwargs)))
        new.append({name: buffer for name, buffer in member.named_buffers() if name in buffers})
    return outputs, new


def stacked(outputs: list[Any], buffers: list[dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
    """The members' outputs and buffers, each tensor as `[E, ...]`, or as a list of E where their shapes differ."""
    return pytree.tree_map(_stack, *outputs), {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}


def with_weights(model: nn.Module, weights: Weights, buffers: Weights) -> nn.Module:
    """A copy of `model` in which `weights`, as they are in the autograd graph, stand for its parameters for good.

    The hooks of the model's parameters are on them.
    """
    hooks = {name: parameter._backward_hooks for name, parameter in model.named_parameters()}
    weights = {name: _hooked(weight, hooks.get(name)) for name, weight in weights.items()}
    memo: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), False) for parameter in model.parameters()}
    for module in model.modules():  # torch copies no tensor that has a history, as old weight_norm keeps one
        memo |= {id(value): value.detach().clone() for value in vars(module).values() if isinstance(value, Tensor)}
    member = copy.deepcopy(model, memo)
    names = {id(parameter): name for name, parameter in member.named_parameters()}
    kept = {id(buffer): name for name, buffer in member.named_buffers()}
    for module in member.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # a gradient that comes from one member's part of a stack cannot be sparse
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                weight: Any = weights[names[id(parameter)]]
                del module._parameters[leaf]
                setattr(module, leaf, weight)  # an RNN notes it
                if vars(module).pop(leaf, None) is not None:
                    module._parameters[leaf] = weight  # models ask parameters() for their dtype
        for leaf, buffer in module._buffers.items():
            if buffer is not None and kept[id(buffer)] in buffers:
                module._buffers[leaf] = buffers[kept[id(buffer)]]
    return member


def _hooked(weight: Tensor, hooks: Mapping[int, Callable[[Tensor], Tensor | None]] | None) -> Tensor:
    if not hooks or not weight.requires_grad:
        return weight
    weight = weight.view_as(weight)
    for hook in hooks.values():
        weight.register_hook(hook)
    return weight


def combined(output: Any) -> Tensor | None:
    """A fixed random combination of all that has a gradient in `output`: a number to differentiate; None of nothing."""
    leaves = [leaf for leaf in pytree.tree_leaves(pytree.tree_map(opened, output)) if isinstance(leaf, Tensor)]
    source = torch.Generator().manual_seed(1)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=source).to(leaf.real)).sum().real.double()
        for leaf in leaves
        if leaf.requires_grad
    ]
    return torch.stack(terms).sum() if terms else None


def member_loss(output: Any, target: Tensor | None = None) -> Tensor:
    """A fixed combination of all numbers in the `output` of one member: a loss that needs no target."""
    leaves = [leaf for leaf in pytree.tree_leaves(pytree.tree_map(opened, output)) if isinstance(leaf, Tensor)]
    terms = [
        (leaf * torch.arange(leaf.numel()).to(leaf).cos().reshape(leaf.shape)).sum().real.double()
        for leaf in leaves
        if leaf.is_floating_point() or leaf.is_complex()
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def opened(value: Any) -> Any:
    """A dataclass as a dict of its fields: pytrees do not know it."""
    return dict(vars(value)) if hasattr(value, "__dataclass_fields__") else value


def _stack(*leaves: Any) -> Any:
    """The members' values of one output; a list of them where their shapes differ."""
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    return torch.stack(leaves) if len({leaf.shape for leaf in leaves}) == 1 else list(leaves)
