"""The C++ compiler's share of a first compilation: trials that are put off, and work that a thread does ahead.

Before a first compilation for a CPU, torch tries whether the C++ compiler can build for each kind of AVX that the
processor has. Nearly every compiler can, so the trials of plain AVX, 6 of 8 seconds on two cores, are put off until a
compilation fails. The others (AMX, VNNI, BF16), 2 seconds, and this package's own kernel are compiled in a thread while
Dynamo traces.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextvars import copy_context
from functools import cache
from importlib import import_module
from threading import Thread
from typing import Any

from functorch_ens._compile.optional import inductor_option, optional

TRIAL = "cpp.vec_isa_ok"
"""The option of inductor that answers the trials: True or False without trying, None by trying."""


def assumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The option by which torch takes AVX for granted; {} where that was asked for or forbidden.

    Where nothing in the options `given` by the user is about C++, this also begins the work in a thread.

    Raises: AttributeError where this torch has no such option, or could not `forget` it.
    """
    # On ARM these trials decide about more than AVX.
    if platform.machine() not in ("x86_64", "AMD64") or inductor_option(TRIAL) is not None or TRIAL in given:
        return {}
    if not _caches():
        raise AttributeError("torch._inductor.cpu_vec_isa remembers nothing that could be forgotten")
    if not any(name.startswith("cpp.") for name in given):
        _begin_ahead()
    return {TRIAL: True}


def may_explain(error: Exception) -> bool:
    """Whether the C++ compiler failed, perhaps because it cannot build for AVX."""
    try:
        from torch._inductor.exc import CppCompileError as of_cpp
    except ImportError:  # then any failure of inductor may be one
        of_cpp = Exception  # type: ignore[misc, assignment]  # a wider class in its place
    return isinstance(getattr(error, "inner_exception", None), of_cpp | ImportError | OSError)


def forget() -> None:
    """Clear what torch remembers of the kinds of AVX; it keeps this for all compilations of a process."""
    for each in _caches():
        each.cache_clear()


def _caches() -> list[Any]:
    """The cached functions in which torch keeps the kinds of AVX that it has found to work."""
    isa: Any = import_module("torch._inductor.cpu_vec_isa")
    kinds = {kind for each in isa.supported_vec_isa_list for kind in type(each).__mro__}
    answers = [isa.valid_vec_isa_list, *(vars(kind).get("__bool__") for kind in kinds)]
    return [answer for answer in answers if hasattr(answer, "cache_clear")]


@cache
def _begin_ahead() -> None:
    """Begin, once, in a thread, what a first compilation needs of the C++ compiler; torch finds it in its cache.

    If that fails, torch does everything in its own time.
    """
    with optional("work ahead"):
        # Imported by two threads at once, a module may be seen half made.
        for module in (
            "torch._inductor.cpp_builder",
            "torch.utils._filelock",
            "functorch_ens._compile.rank1_gradients",
        ):
            import_module(module)
        Thread(target=copy_context().run, args=(_ahead,)).start()  # with inductor's settings of this thread


def _ahead() -> None:
    with optional("trials ahead"):
        _try_others()
    with optional("the kernel of rank-1 gradients ahead"):
        _make_kernel()


def _try_others() -> None:
    """Make torch's trials of the C++ compiler, but those of plain AVX."""
    isa: Any = import_module("torch._inductor.cpu_vec_isa")
    known, plain = isa.x86_isa_checker(), isa.VecISA._avx_code
    for kind in map(type, isa.supported_vec_isa_list):

        class Ahead(kind):  # type: ignore[misc, valid-type]  # a subclass, so that its answers are not cached for `kind`
            def check_build(self, code: str) -> bool:
                return code == plain or super().check_build(code)

        if all(flag in known for flag in str(Ahead()).split()):
            bool(Ahead())


def _make_kernel() -> None:
    """Compile the kernel of this package, and with it the header of all kernels: 4 seconds, once on a machine."""
    import torch._inductor.config

    from functorch_ens._compile.rank1_gradients import kernel

    with torch._inductor.config.patch({TRIAL: True}):
        kernel()
