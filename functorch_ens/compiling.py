"""`compile`: torch.compile for functions of the user's that call an ensemble's forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from functorch_ens.checks import check_callable


def compile(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """`torch.compile` with what this package adds to it, for a training loop or a function of your own.

    It takes what torch.compile takes and returns what that returns. Three things make code that calls a forward faster:
    Dynamo guards the forward by one name instead of a thousand objects, one product gives both gradients of a first
    layer, and the C++ kernels of a graph are compiled in common files. What of this fails is left out, with its reason
    in the log. A trainer that takes the name of a backend gets all but the guards by `backend="functorch_ens"`.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> forward, params = fe.make_forward(model), fe.batchensemble_params(model, E=5)
    >>> @fe.compile
    ... def gradients(params, x):
    ...     return torch.func.grad(lambda params: forward(params, x).square().mean())(params)
    >>> gradients(params, torch.ones(7, 3)).stacked["weight_r"].shape  # doctest: +SKIP
    torch.Size([5, 2])

    Args:
        fn: a function or a module; without it, the result is a decorator.
        options: those of torch.compile: `fullgraph`, `dynamic`, `mode`, `options`, `disable`. With another `backend`
            than inductor nothing is added.

    Raises:
        TypeError: `fn` is not callable, or torch.compile has no such option.
        RuntimeError: torch.compile does not take these `options`.
    """
    if fn is None:
        return partial(compile, **options)
    check_callable(fn, "fn", "a function or a module")
    from functorch_ens._compile.extras import compile_function  # not at the top: it imports torch's compiler

    return compile_function(fn, options)
