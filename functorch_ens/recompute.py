"""Memory for time: a computation whose intermediate values are not kept, but computed again in the backward pass.

This is what `torch.utils.checkpoint` does (Chen et al. 2016, arXiv:1604.06174), in a form that `torch.func` can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils import _pytree as pytree

from functorch_ens.randomness import RandomState


def recomputed(
    function: Callable[[Any], Any], argument: Any, replay: Callable[[], AbstractContextManager[None]]
) -> Any:
    """`function(argument)`, pytrees of tensors both; in a backward pass it is called again, within `replay()`.

    The second time it finds the random state and autocast as they were the first time. Inside `torch.compile`, which
    plans the memory itself, it is called as it is.
    """
    leaves, spec = pytree.tree_flatten(argument)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
        return function(argument)
    form: pytree.TreeSpec

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal form
        outputs, form = pytree.tree_flatten(function(pytree.tree_unflatten(list(tensors), spec)))
        return tuple(outputs)

    surroundings = _surroundings(leaves)

    @contextmanager
    def again() -> Iterator[None]:
        with surroundings(), replay():
            yield

    outputs = _Recomputed.apply(flat, again, *leaves)
    return pytree.tree_unflatten(list(outputs), form)


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Callable[..., tuple[Tensor, ...]], again: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return flat(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.flat, ctx.again = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.differentiable = [_is_differentiable(leaf) for leaf in output]
        ctx.mark_non_differentiable(*(leaf for leaf in output if not _is_differentiable(leaf)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors = [_below(tensor) for tensor in ctx.saved_tensors]
        gradients = tuple(_below(gradient) for gradient in gradients)
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def compute(*some: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(wanted, some, strict=True))
            outputs = ctx.flat(*(given.get(index, tensor) for index, tensor in enumerate(tensors)))
            return tuple(leaf for leaf in outputs if _is_differentiable(leaf))

        gradients = tuple(g for g, keep in zip(gradients, ctx.differentiable, strict=True) if keep)
        some = [tensors[index] for index in wanted]
        if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            with ctx.again():
                pull: Any = vjp(compute, *some)[1]
            found = pull(gradients)
        else:  # works also for operations that torch.func cannot follow
            with ctx.again(), torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in some]
                outputs = compute(*leaves)
            pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
            found = torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        results = dict(zip(wanted, found, strict=True))
        return None, None, *(results.get(index) for index in range(len(tensors)))


def _below(tensor: Tensor) -> Tensor:
    """`tensor` without the innermost `torch.func.grad` around it.

    That records its own backward pass, and would keep all that is computed in it. Nothing goes back through the record:
    a second derivative is taken by the next `grad` outside.
    """
    innermost = torch._C._functorch.peek_interpreter_stack()
    if innermost is None or not torch._C._functorch.is_gradtrackingtensor(tensor):
        return tensor
    level = innermost.level()
    of_it = torch._C._functorch.maybe_get_level(tensor) == level
    return torch._C._functorch._unwrap_for_grad(tensor, level) if of_it else tensor


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _surroundings(tensors: list[Tensor]) -> Callable[[], AbstractContextManager[None]]:
    """The random state and the autocast of now, as a context to come back to."""
    state = RandomState.of(tensors)
    casts: dict[str, dict[str, Any]] = {
        kind: {
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in {tensor.device.type for tensor in tensors}
    }

    @contextmanager
    def back() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=list(state.cuda)))
            for kind, options in casts.items():
                stack.enter_context(torch.autocast(kind, **options))
            state.restore()
            yield

    return back
