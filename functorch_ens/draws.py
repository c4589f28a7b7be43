"""Which operators draw random numbers: a mode of torch notices them, for the thread that it is entered in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functorch_ens._torch import TorchDispatchMode, arguments_of, is_of_a_library, pytree, without_dispatch_modes


class _PastTheModes(TorchFunctionMode):
    """Leaves the dispatch modes for operators of other libraries.

    One without a derivative of its own, but with a kernel that calls differentiable operators, would lose its gradient.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with without_dispatch_modes() if is_of_a_library(func) else nullcontext():
            return func(*args, **(kwargs or {}))


class Draws(TorchDispatchMode):
    """Notes whether this thread draws random numbers from torch's global generators."""

    drew = False
    """Whether it has."""

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        """`before` is called before each draw."""
        super().__init__()
        self._beside = _PastTheModes()
        self._before = before

    def __enter__(self) -> Any:
        self._beside.__enter__()
        return super().__enter__()

    def __exit__(self, *of_error: Any) -> None:
        super().__exit__(*of_error)
        self._beside.__exit__(*of_error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws_globally(func, args, kwargs):
            self.drew = True
            if self._before is not None:
                self._before()
            return self.drawn(func, args, kwargs)
        return func(*args, **kwargs)

    def drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator that draws."""
        return func(*args, **kwargs)


@cache
def taking_a_generator(func: Any) -> Any:
    """The overload of an operator that has the arguments of `func`, and a generator; None where there is none."""

    def names(overload: Any) -> list[str]:
        return [argument.name for argument in arguments_of(overload)]

    wanted = names(func)
    if "generator" in wanted:
        return func
    overloads = [getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()]
    return next((each for each in overloads if sorted(names(each)) == sorted([*wanted, "generator"])), None)


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device that an operator with these arguments computes on."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")


def _draws_globally(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an operator that can draw does so, from a generator that it is not given."""
    if device_of(args, kwargs).type == "meta":
        return False
    for index, argument in enumerate(arguments_of(func)):
        given = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name == "generator" and given is not None:
            return False
        if argument.name in ("dropout_p", "dropout", "train", "training") and (given is False or given == 0):
            return False
    return True
