"""torch.compile for a method of an object that holds a forward, with less to look at before every call."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import cache
from importlib import import_module
from threading import Thread
from types import FunctionType, MethodType
from typing import Any

import torch
import torch._dynamo.exc
import torch._inductor.config
import torch._inductor.cpu_vec_isa
import torch._inductor.exc

log = logging.getLogger(__name__)


def compiled_method(method: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`method`, of an object with a `forward`, by torch.compile with `options`."""
    bound: Any = method
    function = bound.__func__
    fixed = _fixed(function)
    rest = dict(options)
    extra = dict(rest.pop("options", None) or {})
    if mode := rest.pop("mode", None):  # torch.compile takes a mode or options, but a mode is a name for some
        extra = {**torch._inductor.list_mode_options(mode, rest.get("dynamic")), **extra}
    if rest.get("backend", "inductor") == "inductor" and torch._inductor.config.post_grad_custom_pre_pass is None:
        try:
            from functorch_ens._compile.passes import Passes  # imports the compiler, which takes a second

            extra.setdefault("post_grad_custom_pre_pass", Passes())
        except Exception as error:  # a torch that has it otherwise
            log.debug("graphs are compiled as they are: %r", error)
    theirs = extra.get("guard_filter_fn", lambda guards: [True] * len(guards))

    def needed(guards: Sequence[Any]) -> list[bool]:
        return [keep and not fixed.search(guard.name) for guard, keep in zip(guards, theirs(guards), strict=True)]

    # torch.compile keeps what it makes by the code that it is made from. Without these guards it could not tell one
    # object from another, so each has code of its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(MethodType(own, bound.__self__), **rest, options={**extra, "guard_filter_fn": needed})


def _fixed(function: FunctionType) -> re.Pattern[str]:
    """What torch.compile would look at before every call of a method, and never finds changed.

    That is what a forward has made for itself, and the code of this package and of torch: a thousand guards take longer
    than a small step does. Not among them: the user's model, its classes, and the functions that it keeps, which its
    template shares.

    `dict(...)`, `type(...)` and `list(dict.keys(...))` are how the compiler names what it reads of a class or a dict.
    """
    own = "|".join(name for name in function.__globals__ if not name.startswith("__"))
    modules = r"__import_(torch|functorch_ens|einops|contextlib)(_dot_\w+)?|__builtins_dict_\w*"
    named_tuples = r"___unnamed_scope_\w*'\]\['_tuple_new"
    return re.compile(
        r"^self\.forward\._(expected|convolutions|template\._(module|pristine|aliases|pairs\[\d+\]\[1\]))"
        r"(?!.*__(closure|code|defaults|kwdefaults|globals|func|self)__)"
        rf"|^((dict|type|list|dict\.keys)\()*(G\['({own}|{modules}|{named_tuples})'\]|__import__\('(torch|collections)'\))"
    )


def compiled_on_cpu(
    method: Callable[..., Any], options: Mapping[str, Any], loop: bool, arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any]:
    """`method`, compiled for a CPU, and its result for `arguments`; `loop`: it computes members one after another.

    Before a first compilation torch tries whether the C++ compiler can build for each kind of AVX that the processor
    has. Hardly one cannot, so the plain trials, 6 of 8 seconds on two cores, are left for when a compilation fails.
    The others (AMX, VNNI, BF16), 2 seconds, are made while the method is traced, and then this package's own kernel.
    """
    given = dict(options.get("options") or {})
    # A weight that serves one member's rows is not worth a change of its layout before each convolution.
    mine: dict[str, Any] = {"layout_optimization": False} if loop else {}
    untried = {"cpp.vec_isa_ok": True} if _trial_can_wait() else {}
    if untried and not any(name.startswith("cpp.") for name in given):
        _begin_ahead()

    def attempt(assumed: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
        compiled = _joined(compiled_method(method, {**options, "options": {**mine, **assumed, **given}}))
        return compiled, compiled(*arguments)

    try:
        return attempt(untried)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        of_cpp = isinstance(error.inner_exception, torch._inductor.exc.CppCompileError | ImportError | OSError)
        if not (untried and of_cpp) or "cpp.vec_isa_ok" in given:
            raise
    _forget_what_was_not_tried()
    return attempt({})


def _joined(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with its kernels in common files, where this torch lets them be joined."""
    try:
        from functorch_ens._compile.cpp_files import with_joined_kernels  # imports the compiler, as above

        return with_joined_kernels(compiled)
    except Exception as error:
        log.debug("every kernel has a file of its own: %r", error)
        return compiled


@cache
def _begin_ahead() -> None:
    """Once, in a thread: what a first compilation needs of the C++ compiler, which torch then finds in its cache.

    Should that not work, torch still does everything in its own time.
    """
    try:
        # Imported by two threads at once, a module may be seen half made.
        for module in (
            "torch._inductor.cpp_builder",
            "torch.utils._filelock",
            "functorch_ens._compile.rank1_gradients",
        ):
            import_module(module)
        Thread(target=copy_context().run, args=(_ahead,)).start()  # with inductor's settings of this thread
    except Exception as error:
        log.debug("nothing is done ahead of a compilation: %r", error)


def _ahead() -> None:
    try:
        _try_others()
        _make_kernel()
    except Exception as error:
        log.debug("not all was done ahead of a compilation: %r", error)


def _try_others() -> None:
    """What torch tries of the C++ compiler besides plain AVX."""
    isa = torch._inductor.cpu_vec_isa
    known, plain = isa.x86_isa_checker(), isa.VecISA._avx_code
    for kind in map(type, isa.supported_vec_isa_list):

        class Ahead(kind):  # type: ignore[misc, valid-type]  # its answers are not taken for those of `kind`
            def check_build(self, code: str) -> bool:
                return code == plain or super().check_build(code)

        if all(flag in known for flag in str(Ahead()).split()):
            bool(Ahead())


def _make_kernel() -> None:
    """The kernel of this package, and with it the header of all: 4 seconds, once on a machine."""
    from functorch_ens._compile.rank1_gradients import kernel

    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        kernel()


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
