"""torch.compile with the extras of this package. Each extra that this torch does not take is left out alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from functorch_ens._compile.ahead import assumed, forget, may_explain
from functorch_ens._compile.guards import filter_for, with_own_code
from functorch_ens._compile.optional import inductor_option, optional
from functorch_ens.trees import take_apart

PASS = "post_grad_custom_pre_pass"
LAYOUT = "layout_optimization"


def compile_with_extras(
    method: Callable[..., Any],
    options: dict[str, Any],
    made: Collection[object],
    one_by_one: bool,
    arguments: tuple[Any, ...],
) -> tuple[Callable[..., Any], Any]:
    """`method` compiled with `options` and all extras that work, and its result for `arguments`.

    Args:
        method: a bound method.
        options: the user's own, for torch.compile; where they contradict an extra, they win.
        made: objects that the method's object holds and never changes.
        one_by_one: whether the method computes members one after another.
        arguments: those of its first call.
    """
    rest = dict(options)
    theirs = dict(rest.pop("options", None) or {})
    given = dict(theirs)
    if mode := rest.pop("mode", None):  # torch.compile takes a mode or options; a mode is a name for some options
        from torch._inductor import list_mode_options

        given = {**list_mode_options(mode, rest.get("dynamic")), **given}
    with optional("fewer guards"):
        given["guard_filter_fn"] = filter_for(method, made, theirs.get("guard_filter_fn"))
    if rest.get("backend", "inductor") != "inductor":
        return _called(torch.compile(with_own_code(method), **rest, options=given), arguments)
    with optional("passes over graphs"):
        from functorch_ens._compile.passes import Passes

        if inductor_option(PASS) is None:
            given.setdefault(PASS, Passes())
    if any(tensor.device.type != "cpu" for tensor in take_apart(arguments)[0]):
        return _called(torch.compile(with_own_code(method), **rest, options=given), arguments)
    with optional("layouts kept as they are"):
        # A weight that serves one member's rows is not worth a change of its layout before each convolution.
        if one_by_one and inductor_option(LAYOUT):
            given.setdefault(LAYOUT, False)
    untried: dict[str, Any] = {}
    with optional("a first compilation without trials of AVX"):
        untried = assumed(theirs)

    def attempt(untried: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
        compiled: Any = torch.compile(with_own_code(method), **rest, options={**untried, **given})
        with optional("kernels in common files"):
            from functorch_ens._compile.cpp_files import with_joined_kernels

            compiled = with_joined_kernels(compiled)
        return _called(compiled, arguments)

    try:
        return attempt(untried)
    except Exception as error:
        if not untried or not may_explain(error):
            raise
    forget()
    return attempt({})


def _called(compiled: Any, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
    return compiled, compiled(*arguments)
