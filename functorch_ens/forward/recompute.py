"""Checkpointing: a backward pass computes the intermediate values of a chunk again, instead of keeping them.

`torch.utils.checkpoint` does the same (Chen et al. 2016, arXiv:1604.06174), but `torch.func` cannot follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vjp

from functorch_ens import _torch
from functorch_ens._torch import pytree
from functorch_ens.anatomy import is_numeric
from functorch_ens.forward.failures import interrupt_in
from functorch_ens.holds import Generator, same_state
from functorch_ens.rng import Drawing, RandomState

Result = TypeVar("Result", bound=tuple[Any, ...])


def recomputed(
    function: Callable[[Any], Result],
    argument: Any,
    replay: Callable[[], AbstractContextManager[None]],
    generators: list[Generator],
) -> Result:
    """`function(argument)`, from a pytree of tensors to a tuple of them; a backward pass computes it again.

    The second call runs within `replay()`, from the autocast settings and the random state of the first: that of torch,
    and of those `generators` that it has drawn from. Inside `torch.func.grad` only the first entry of the tuple has a
    gradient. torch.compile plans memory by itself, and forward-mode derivatives have no backward pass: under both,
    nothing is computed again.
    """
    leaves, spec = pytree.tree_flatten(argument)
    trained = [leaf.requires_grad for leaf in leaves]
    if _torch.is_compiling() or _torch.in_forward_mode() or not (torch.is_grad_enabled() and any(trained)):
        return function(argument)
    form: pytree.TreeSpec
    constant: list[bool] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal form, constant
        result = function(pytree.tree_unflatten(list(tensors), spec))
        outputs, form = pytree.tree_flatten(result)
        first = len(pytree.tree_leaves(result[0]))
        constant = [index >= first or not is_numeric(leaf) for index, leaf in enumerate(outputs)]
        # autograd.Function cannot return one of its inputs as it is: return a view of it.
        return tuple(leaf.view_as(leaf) if any(leaf is x for x in tensors) else leaf for leaf in outputs)

    def first_time(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal constant
        if _torch.inside_transform():
            return flat(*tensors)
        with torch.enable_grad():  # autograd then tells which outputs depend on a trained tensor
            outputs = flat(*(x.detach().requires_grad_(needed) for x, needed in zip(tensors, trained, strict=True)))
        constant = [not leaf.requires_grad for leaf in outputs]
        return tuple(leaf.detach() for leaf in outputs)

    before, casts = RandomState.of(leaves), _autocasts(leaves)
    states = [(each, each.read()) for each in generators]

    @contextmanager
    def again() -> Iterator[None]:
        with Drawing(before), casts(), replay(), going_on_from(drew):
            yield

    outputs = _Recomputed.apply(first_time, flat, again, lambda: constant, *leaves)
    drew = [(each, state) for each, state in states if not same_state(each.read(), state)]
    result: Result = pytree.tree_unflatten(list(outputs), form)
    return result


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(first_time: Callable[..., Any], flat: Any, again: Any, constant: Any, *tensors: Tensor) -> Any:
        return first_time(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.flat, ctx.again, constant = inputs[:4]
        ctx.constant = constant()
        ctx.save_for_backward(*inputs[4:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(leaf for leaf, fixed in zip(output, ctx.constant, strict=True) if fixed))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        # Without the innermost grad: it would record this backward pass, and keep all that is computed in it.
        # Nothing goes back through that record, because a second derivative is taken by the next grad outside.
        tensors = [_torch.below_grad(tensor) for tensor in ctx.saved_tensors]
        given = [
            (index, _torch.below_grad(gradient))
            for index, (gradient, fixed) in enumerate(zip(gradients, ctx.constant, strict=True))
            if gradient is not None and not fixed
        ]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        nothing: tuple[Any, ...] = (None,) * 4
        if not given:
            return *nothing, *(None for _ in tensors)

        def compute(*some: Tensor) -> tuple[Tensor, ...]:
            own = dict(zip(wanted, some, strict=True))
            outputs = ctx.flat(*(own.get(index, tensor) for index, tensor in enumerate(tensors)))
            return tuple(outputs[index] for index, _ in given)

        some = [tensors[index] for index in wanted]
        slopes = tuple(gradient for _, gradient in given)
        layers = _torch.layers_in_force()
        try:
            if torch.is_grad_enabled() or _torch.inside_transform():
                with ctx.again():
                    pull: Any = vjp(compute, *some)[1]
                found = pull(slopes)
            else:  # plain autograd also serves operations that torch.func cannot follow
                with ctx.again(), torch.enable_grad():
                    leaves = [tensor.detach().requires_grad_() for tensor in some]
                    outputs = compute(*leaves)
                found = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)
        except BaseException as error:
            if interrupt := interrupt_in(error):
                _torch.leave_layers_beyond(layers)
                raise interrupt from None
            raise
        results = dict(zip(wanted, found, strict=True))
        return *nothing, *(results.get(index) for index in range(len(tensors)))


@contextmanager
def going_on_from(states: list[tuple[Generator, Any]]) -> Iterator[None]:
    """These generators begin at these states, and go on afterwards from where they were."""
    now = [each.read() for each, _ in states]
    for each, state in states:
        each.write(state)
    try:
        yield
    finally:
        for (each, _), own in zip(states, now, strict=True):
            each.write(own)


def _autocasts(tensors: list[Tensor]) -> Callable[[], AbstractContextManager[Any]]:
    """A context that brings back the present settings of autocast."""
    kinds: dict[str, dict[str, Any]] = {
        kind: {
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in {tensor.device.type for tensor in tensors}
    }

    def back() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for kind, options in kinds.items():
            stack.enter_context(torch.autocast(kind, **options))
        return stack

    return back
