"""The fence around torch's compiler: `Compiled`. README.md lists every private name of torch that is used here.

training/step.py alone imports this package, inside the first call that compiles: its files import torch's compiler,
which takes a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from functorch_ens._compile.extras import compile_with_extras
from functorch_ens._compile.guards import with_own_code
from functorch_ens.rng import RandomState
from functorch_ens.trees import take_apart

log = logging.getLogger(__name__)


class Compiled:
    """A method, compiled by the first of three rungs that works.

    1. `"functorch_ens"`: torch.compile with the extras of this package, each of which may fail alone.
    2. `"torch.compile"`: torch.compile with the user's own options only.
    3. `"eager"`: the method itself.

    The failure of a rung is logged with its reason.
    """

    by: str | None
    """The rung in use; None before the first call."""

    def __init__(
        self,
        method: Callable[..., Any],
        options: Mapping[str, Any],
        *,
        made: Collection[object] = (),
        one_by_one: Callable[..., bool] = lambda *_: False,
    ) -> None:
        """Note what to compile; the first call compiles.

        Args:
            method: a bound method, which is called with positional arguments.
            options: the user's own, for torch.compile.
            made: objects that the method's object holds and never changes; guards on them are dropped.
            one_by_one: whether the method, called with these arguments, computes members one after another.
        """
        self.by = None
        self._method = method
        self._compiled = method
        self._options = dict(options)
        self._rungs: dict[str, Callable[[dict[str, Any], tuple[Any, ...]], tuple[Any, Any]]] = {
            "functorch_ens": lambda options, arguments: compile_with_extras(
                method, options, made, one_by_one(*arguments), arguments
            ),
            "torch.compile": self._plain,
        }

    def __call__(self, *arguments: Any) -> Any:
        """What the method returns for these arguments."""
        if self.by is None:
            return self._start(arguments, self._options)
        try:
            return self._compiled(*arguments)
        except Exception as error:
            if self.by == "eager" or not _is_of_dynamo(error):
                if self.by != "eager" and "out of bounds" in str(error):
                    self._method(*arguments)  # raises the model's own error, which says what is out of bounds
                raise
            log.info("the compiled code failed, so it is compiled again with fixed sizes: %r", error)
        # The sizes of these arguments are new. Dynamo takes them for symbols, with which it may not come far.
        return self._start(arguments, {"dynamic": False, **self._options})

    def _start(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call the method as it is, which raises the model's own errors, and then by the first rung that works.

        torch's random state afterwards is that of one call.
        """
        tensors = take_apart(arguments)[0]
        before = RandomState.of(tensors)
        plain = self._method(*arguments)
        after = RandomState.of(tensors)
        reason = ""
        for rung, attempt in list(self._rungs.items()):
            before.restore()
            try:
                self._compiled, result = attempt(options, arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the compiler's, for eager code has just computed this
                of_backend = hasattr(error, "inner_exception")
                if options.get("fullgraph") and not of_backend and (rung == "torch.compile" or _is_of_dynamo(error)):
                    raise
                reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
                log.info("the compilation by %s failed: %r", rung, error)
                del self._rungs[rung]
            else:
                self.by = rung
                if reason:
                    log.warning("torch.compile works only without what functorch_ens adds to it: %s", reason)
                return result
        log.warning("torch.compile does not work here, so training goes on without it: %s", reason)
        after.restore()
        self.by, self._compiled = "eager", self._method
        return plain

    def _plain(self, options: dict[str, Any], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """The method compiled with the user's own options only, and its result for `arguments`."""
        compiled: Any = torch.compile(with_own_code(self._method), **options)
        return compiled, compiled(*arguments)


def _is_of_dynamo(error: Exception) -> bool:
    """Whether Dynamo, or a backend that it called, raised `error`: its class, or a base of it, is Dynamo's."""
    return any(base.__module__.startswith("torch._dynamo") for base in type(error).__mro__)
