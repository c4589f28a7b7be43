"""The fence around torch's compiler: `Compiled`. README.md lists every private name of torch that is used here.

training/step.py alone imports this package, inside the first call that compiles: its files import torch's compiler,
which takes a second.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import partial
from pathlib import Path
from sysconfig import get_path
from typing import Any, Protocol

import torch

from functorch_ens._compile.extras import compile_with_extras
from functorch_ens._compile.guards import with_own_code
from functorch_ens._compile.waiting import told_at_a_terminal
from functorch_ens._torch import saved_tensor_hooks_kept
from functorch_ens.forward.failures import OF_THE_MACHINE
from functorch_ens.rng import Drawing, RandomState
from functorch_ens.trees import take_apart

log = logging.getLogger(__name__)


class Differentiated(Protocol):
    """What is compiled, in three forms that take the same arguments."""

    def __call__(self, *arguments: Any) -> Any:
        """The gradients by plain autograd. They are right, whatever the compiled ones are."""

    def by_grad(self, *arguments: Any) -> Any:
        """The gradients by `torch.func.grad`: it can be one graph."""

    def by_autograd(self, total: Callable[..., Any], /, *arguments: Any) -> Any:
        """The gradients by plain autograd, from what a compiled `self.total` returns."""

    def total(self, *arguments: Any) -> Any:
        """What is differentiated."""

    def disagreement(self, got: Any, want: Any, random: bool, arguments: tuple[Any, ...], /) -> str:
        """What of `got` is no rounding of `want`; "" where nothing is. `random`: random numbers were drawn."""


class Compiled:
    """The gradients of an objective, compiled by the first of four rungs that works.

    1. `"functorch_ens"`: one graph, by torch.compile with the extras of this package, each of which may fail alone.
    2. `"torch.compile"`: one graph, by torch.compile with the user's own options only.
    3. `"torch.compile"`, in parts: the objective alone, with graph breaks, and plain autograd after it.
    4. `"eager"`: plain autograd.

    A rung is in use only if its first result agrees with that of plain autograd. The failure of a rung is logged with
    its reason.
    """

    by: str | None
    """The rung in use; None before the first call."""
    reason: str
    """Why it is not the first one; "" where it is."""

    def __init__(
        self,
        objective: Differentiated,
        options: Mapping[str, Any],
        *,
        made: Collection[object] = (),
        keeps_layouts: Callable[..., bool] = lambda *_: False,
        situation: Callable[..., Hashable] = lambda *_: None,
    ) -> None:
        """Note what to compile; the first call compiles.

        Args:
            objective: what to compile; called with positional arguments.
            options: the user's own, for torch.compile.
            made: objects that the objective holds and never changes; guards on them are dropped.
            keeps_layouts: whether, for these arguments, convolutions are left in the layout of their inputs.
            situation: what else the results for these arguments depend on; in a new one they are compared again.
        """
        self.by = None
        self.reason = ""
        self._objective = objective
        self._compiled: Callable[..., Any] = objective
        self._options = dict(options)
        self._situation = situation
        self._compared: set[Hashable] = set()
        whole = {"fullgraph": True}
        by_grad = objective.by_grad
        self._rungs: dict[str, Callable[[dict[str, Any], tuple[Any, ...]], tuple[Any, Any]]] = {
            "functorch_ens": lambda options, arguments: compile_with_extras(
                by_grad, whole | options, made, keeps_layouts(*arguments), arguments
            ),
            "torch.compile": lambda options, arguments: self._plain(by_grad, whole | options, arguments),
            "in parts": self._in_parts,
        }

    def __call__(self, *arguments: Any) -> Any:
        """What the objective returns for these arguments."""
        if self.by is None:
            return self._start(arguments, self._options)
        if self.by == "eager":
            return self._compiled(*arguments)
        situation = self._situation(*arguments)
        try:
            with saved_tensor_hooks_kept():
                if situation in self._compared:
                    return self._compiled(*arguments)
                return self._checked(self._compiled, arguments, situation)
        except _Disagrees as error:
            log.info("the compiled code is wrong here: %s", error)
            return self._start(arguments, self._options)
        except Exception as error:
            if not _is_of_dynamo(error):
                if "out of bounds" in str(error):
                    self._objective(*arguments)  # raises the model's own error, which says what is out of bounds
                raise
            log.info("the compiled code failed, so it is compiled again with fixed sizes: %r", error)
        # The sizes of these arguments are new. Dynamo takes them for symbols, with which it may not come far.
        return self._start(arguments, {"dynamic": False, **self._options})

    def _start(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call the objective as it is, which raises the model's own errors, and then by the first rung that works.

        torch's random state afterwards is that of one call.
        """
        plain, before, drew = self._by_plain_autograd(arguments)
        reasons: list[str] = []
        situation = self._situation(*arguments)
        for rung, attempt in list(self._rungs.items()):
            if rung not in self._rungs:
                continue
            try:
                with saved_tensor_hooks_kept(), told_at_a_terminal():
                    compiled, result = attempt(options, arguments)
                self._compare(result, plain, drew, arguments)
            except OF_THE_MACHINE:
                raise
            except Exception as error:  # the compiler's, for eager code has just computed this
                if not isinstance(error, _Disagrees):
                    if _is_of_others(error):
                        raise
                    of_backend = hasattr(error, "inner_exception")
                    asked = options.get("fullgraph") and not of_backend
                    if asked and (rung == "torch.compile" or _is_of_dynamo(error)):
                        raise
                if drew:
                    before.restore()
                reasons.append(_said(error))
                log.info("the compilation by %s failed: %r", rung, error)
                del self._rungs[rung]
                if type(error).__name__ in _NOT_ONE_GRAPH:
                    self._rungs.pop("torch.compile", None)
            else:
                self._compiled, self._compared = compiled, {situation}
                self.by = "torch.compile" if rung == "in parts" else rung
                if reasons and rung == "in parts":
                    self._tell(f"the step is compiled in parts, for it cannot be one graph: {reasons[0]}")
                elif reasons:
                    self._tell(f"torch.compile works only without what functorch_ens adds to it: {reasons[-1]}")
                return result
        self._tell(f"torch.compile does not work here, so training goes on without it: {reasons[0]}")
        self.by, self._compiled = "eager", self._objective
        return self._objective(*arguments) if drew else plain

    def _checked(self, compiled: Callable[..., Any], arguments: tuple[Any, ...], situation: Hashable) -> Any:
        """The compiled result, in a situation that is new; it must agree with that of plain autograd."""
        plain, before, drew = self._by_plain_autograd(arguments)
        result = compiled(*arguments)
        try:
            self._compare(result, plain, drew, arguments)
        except _Disagrees:
            if drew:
                before.restore()
            raise
        self._compared.add(situation)
        return result

    def _by_plain_autograd(self, arguments: tuple[Any, ...]) -> tuple[Any, RandomState, bool]:
        """What the objective returns as it is, torch's random state, which stays, and whether numbers were drawn."""
        before = RandomState.of(take_apart(arguments)[0])
        with Drawing(before) as drawing:
            plain = self._objective(*arguments)
        return plain, before, drawing.drew

    def _compare(self, result: Any, plain: Any, random: bool, arguments: tuple[Any, ...]) -> None:
        """Raise `_Disagrees` where `result`, compiled, is not that of plain autograd."""
        if differs := self._objective.disagreement(result, plain, random, arguments):
            raise _Disagrees(differs)

    def _tell(self, reason: str) -> None:
        self.reason = reason
        log.warning(reason)

    def _plain(
        self, method: Callable[..., Any], options: dict[str, Any], arguments: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """A method compiled with the user's own options only, and its result for `arguments`."""
        compiled: Any = torch.compile(with_own_code(method), **options)
        return compiled, compiled(*arguments)

    def _in_parts(self, options: dict[str, Any], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """Plain autograd after a compiled objective, and the result."""
        total = torch.compile(with_own_code(self._objective.total), **options)
        compiled = partial(self._objective.by_autograd, total)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
            return compiled, compiled(*arguments)


class _Disagrees(Exception):
    """A compiled result is not that of plain autograd."""


def _is_of_dynamo(error: Exception) -> bool:
    """Whether Dynamo, or a backend that it called, raised `error`: its class, or a base of it, is Dynamo's."""
    return any(base.__module__.startswith("torch._dynamo") for base in type(error).__mro__)


def _is_of_others(error: Exception) -> bool:
    """Whether the class of `error` is one that the running script defines, so that no compiler raised it."""
    return type(error).__module__.partition(".")[0] in ("__main__", "__mp_main__")


_NOT_ONE_GRAPH = ("Unsupported", "UserError", "TorchRuntimeError")
"""Dynamo's errors about what it traces. Without our extras it traces the same."""

_LIBRARIES = tuple({get_path(name) for name in ("stdlib", "purelib", "platlib")} | {str(Path(__file__).parents[1])})
_PLACE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def _said(error: Exception) -> str:
    """What an error of the compiler says, with the user's line that Dynamo names."""
    text = str(getattr(error, "inner_exception", error)).strip()
    places = _PLACE.findall(text.partition("from user code")[2])
    places = [place for place in places if not place[0].startswith(_LIBRARIES)] or places
    where = f" ({places[-1][0]}, line {places[-1][1]}, in {places[-1][2]})" if places else ""
    return text.partition("\n")[0] + where
