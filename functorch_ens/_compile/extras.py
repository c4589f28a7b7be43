"""torch.compile with the extras of this package. Each extra that this torch does not take is left out alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from functorch_ens._compile.ahead import assumed, forget, may_explain
from functorch_ens._compile.guards import filter_for, with_own_code
from functorch_ens._compile.optional import inductor_option, optional
from functorch_ens._compile.waiting import told_at_a_terminal
from functorch_ens.trees import take_apart

log = logging.getLogger(__name__)

PASS = "post_grad_custom_pre_pass"
LAYOUT = "layout_optimization"


def compile_with_extras(
    method: Callable[..., Any],
    options: dict[str, Any],
    made: Collection[object],
    keeps_layouts: bool,
    arguments: tuple[Any, ...],
) -> tuple[Callable[..., Any], Any]:
    """`method` compiled with `options` and all extras that work, and its result for `arguments`.

    Args:
        method: a bound method.
        options: the user's own, for torch.compile; where they contradict an extra, they win.
        made: objects that the method's object holds and never changes.
        keeps_layouts: whether convolutions on a CPU are left in the layout of their inputs.
        arguments: those of its first call.
    """
    rest = dict(options)
    theirs = dict(rest.pop("options", None) or {})
    given = _with_mode(theirs, rest.pop("mode", None), rest.get("dynamic"))
    with optional("fewer guards"):
        given["guard_filter_fn"] = filter_for(method, made, theirs.get("guard_filter_fn"))

    def attempt(extras: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
        compiled: Any = torch.compile(with_own_code(method), **rest, options={**extras, **given})
        if on_cpu:
            compiled = _with_joined_kernels(compiled)
        return compiled, compiled(*arguments)

    on_cpu = False
    if rest.get("backend", "inductor") != "inductor":
        return attempt({})
    on_cpu = _on_cpu(take_apart(arguments)[0])
    extras = _passes()
    if on_cpu and keeps_layouts:
        extras |= _same_layouts()
    return _without_trials_first(attempt, extras, theirs, on_cpu)


def compile_function(function: Any, options: dict[str, Any]) -> Any:
    """Any function or module of the user's, by torch.compile with its own `options` and with all extras that work.

    A bound method gets code of its own, as the methods of this package do that are compiled for every forward.
    """
    if isinstance(function, MethodType):
        function = with_own_code(function)
    rest = dict(options)
    if (backend := rest.pop("backend", "inductor")) not in ("inductor", NAME):
        return torch.compile(function, **rest, backend=backend)
    theirs = dict(rest.pop("options", None) or {})
    # For torch's own errors about options, which a backend would raise at the first call.
    checked: dict[str, Any] = {**rest, "options": dict(theirs) or None}
    torch.compile(lambda: None, **checked)
    given = _with_mode(theirs, rest.pop("mode", None), rest.get("dynamic"))
    with optional("fewer guards"):
        given["guard_filter_fn"] = filter_for(function, theirs=theirs.get("guard_filter_fn"))
    inductor: Any = "inductor"
    with optional("changed graphs"):
        _inductor()
        inductor = functorch_ens
    return torch.compile(function, **rest, backend=inductor, options=given)


def functorch_ens(
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """inductor with all extras that a graph can have: the backend of `torch.compile(fn, backend="functorch_ens")`.

    Args:
        graph: what Dynamo has traced.
        inputs: its inputs.
        mode: as in torch.compile.
        options: as in torch.compile.
    """
    given = _with_mode(dict(options or {}), mode, None)
    on_cpu = _on_cpu([x for x in inputs if isinstance(x, Tensor)])

    def by_inductor(graph: torch.fx.GraphModule, extras: Mapping[str, Any]) -> Any:
        patches = {**extras, **given}
        return _inductor()(graph, list(inputs), **({"config_patches": patches} if patches else {}))

    def attempt(extras: dict[str, Any]) -> Any:
        return (_with_joined_kernels(by_inductor) if on_cpu else by_inductor)(_copied(graph), extras)

    extras = _passes()
    with optional("layouts kept as they are"):
        if on_cpu and any(map(_scales_a_convolution, graph.graph.nodes)):
            extras |= _same_layouts()
    with told_at_a_terminal():
        try:
            return _without_trials_first(attempt, extras, given, on_cpu)
        except Exception as error:
            log.info("compiling without what functorch_ens adds to inductor: %r", error)
        return by_inductor(graph, {})


def _inductor() -> Callable[..., Any]:
    from torch._dynamo import lookup_backend

    found: Callable[..., Any] = lookup_backend("inductor")
    return found


NAME = functorch_ens.__name__
"""The name of the backend, in pyproject.toml's entry points of torch."""


def _with_mode(options: dict[str, Any], mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    """All options in one dict: a mode is a name for some of them, and torch.compile takes one or the other."""
    if not mode or mode == "default":
        return dict(options)
    from torch._inductor import list_mode_options

    return {**list_mode_options(mode, dynamic), **options}


def _passes() -> dict[str, Any]:
    """The option that changes graphs, unless the user has set it."""
    with optional("passes over graphs"):
        from functorch_ens._compile.passes import Passes

        if inductor_option(PASS) is None:
            return {PASS: Passes()}
    return {}


def _same_layouts() -> dict[str, Any]:
    """The option that leaves convolutions in the layout of their inputs, unless the user has forbidden others anyway.

    inductor changes layouts to channels-last, which pays for convolutions alone. But between two convolutions of an
    ensemble the activations have a member axis, `[E, B, C, H, W]`, which inductor keeps contiguous, so that it copies
    them twice for each convolution. And a weight that serves one member's rows is not worth the change of its layout.
    """
    with optional("layouts kept as they are"):
        if inductor_option(LAYOUT):
            return {LAYOUT: False}
    return {}


def _scales_a_convolution(node: torch.fx.Node) -> bool:
    """Whether this is the `s` of a convolution of a BatchEnsemble, as Dynamo traces it."""
    if node.target not in (torch.ops.functorch_ens.scaled, torch.ops.functorch_ens.scaled.default):
        return False
    weight: Any = node.args[1]
    return weight.meta["example_value"].ndim > 2


def _without_trials_first(
    attempt: Callable[[dict[str, Any]], Any], extras: dict[str, Any], given: Mapping[str, Any], on_cpu: bool
) -> Any:
    """`attempt(extras)`; on a CPU first without trials of AVX, and with them where that may be why it fails."""
    untried: dict[str, Any] = {}
    with optional("a first compilation without trials of AVX"):
        untried = assumed(given) if on_cpu else {}
    try:
        return attempt({**untried, **extras})
    except Exception as error:
        if not untried or not may_explain(error):
            raise
    forget()
    return attempt(extras)


def _with_joined_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    with optional("kernels in common files"):
        from functorch_ens._compile.cpp_files import with_joined_kernels

        return with_joined_kernels(function)
    return function


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _copied(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph for inductor, which takes what it gets; the original is for another attempt."""
    copied = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    copied.meta = dict(graph.meta)
    return copied
