"""torch.compile for a method of an object that holds a forward, with less to look at before every call."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch._dynamo.exc
import torch._inductor.config
import torch._inductor.cpu_vec_isa
import torch._inductor.exc

# What torch.compile would look at before every call, and never finds changed: what a forward has made for itself, and
# the code of this package and of torch. A thousand such guards take longer than a small step does. Not among them: the
# user's model, its classes, and the functions that it keeps, which its template shares.
_FIXED = (
    r"^self\.forward\._(expected|convolutions|template\._(module|pristine|aliases|pairs\[\d+\]\[1\]))"
    r"(?!.*__(closure|code|defaults|kwdefaults|globals|func|self)__)"
    r"|^G\['__(import_(torch|functorch_ens|einops|contextlib)(_dot_\w+)?|builtins_dict_\w*)'\]|^__import__\('torch'\)"
)


def compiled_method(method: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`method`, of an object with a `forward`, by torch.compile with `options`."""
    bound: Any = method
    function = bound.__func__
    names = "|".join(name for name in function.__globals__ if not name.startswith("__"))
    fixed = re.compile(rf"{_FIXED}|^G\['({names})'\]")
    rest = dict(options)
    extra = dict(rest.pop("options", None) or {})
    if mode := rest.pop("mode", None):  # torch.compile takes a mode or options, but a mode is a name for some
        extra = {**torch._inductor.list_mode_options(mode, rest.get("dynamic")), **extra}
    theirs = extra.get("guard_filter_fn", lambda guards: [True] * len(guards))

    def needed(guards: Sequence[Any]) -> list[bool]:
        return [keep and not fixed.search(guard.name) for guard, keep in zip(guards, theirs(guards), strict=True)]

    # torch.compile keeps what it makes by the code that it is made from. Without these guards it could not tell one
    # object from another, so each has code of its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(MethodType(own, bound.__self__), **rest, options={**extra, "guard_filter_fn": needed})


def compiled_on_cpu(
    method: Callable[..., Any], options: Mapping[str, Any], loop: bool, arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any]:
    """`method`, compiled for a CPU, and its result for `arguments`; `loop`: it computes members one after another.

    Before a first compilation torch tries whether the C++ compiler can build for each kind of AVX that the processor
    has. Hardly one cannot, so the plain trials, 6 of 8 seconds on two cores, are left for when a compilation fails.
    """
    given = dict(options.get("options") or {})
    # A weight that serves one member's rows is not worth a change of its layout before each convolution.
    mine: dict[str, Any] = {"layout_optimization": False} if loop else {}
    untried = {"cpp.vec_isa_ok": True} if _trial_can_wait() else {}
    compiled = compiled_method(method, {**options, "options": {**mine, **untried, **given}})
    try:
        return compiled, compiled(*arguments)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        of_cpp = isinstance(error.inner_exception, torch._inductor.exc.CppCompileError | ImportError | OSError)
        if not (untried and of_cpp) or "cpp.vec_isa_ok" in given:
            raise
    _forget_what_was_not_tried()
    compiled = compiled_method(method, {**options, "options": {**mine, **given}})
    return compiled, compiled(*arguments)


def _trial_can_wait() -> bool:
    """Whether it is of AVX (on ARM it decides more), and was neither asked for nor forbidden."""
    return platform.machine() in ("x86_64", "AMD64") and torch._inductor.config.cpp.vec_isa_ok is None


def _forget_what_was_not_tried() -> None:
    """torch remembers it for all compilations of this process."""
    isa = torch._inductor.cpu_vec_isa
    kinds = {kind for each in isa.supported_vec_isa_list for kind in type(each).__mro__}
    answers: list[Any] = [isa.valid_vec_isa_list, *(vars(kind).get("__bool__") for kind in kinds)]
    for answer in answers:
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()
