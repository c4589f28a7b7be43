"""The kernels of a compiled graph for a CPU, in as few files of C++ as there are processes to compile them.

inductor writes one file for each kernel. In each the C++ compiler instantiates the templates of torch's header again,
which takes 0.4 of the 0.5 seconds of a small kernel. In two files, the seven kernels of a graph compile in half the
time on two cores.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache, LambdaFuture

log = logging.getLogger(__name__)

_JOINS: ContextVar[bool] = ContextVar("functorch_ens_joins_kernels", default=False)


def with_joined_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, made by torch.compile; a graph that a call of it compiles has its kernels in common files."""
    _install()

    def joined(*arguments: Any) -> Any:
        token = _JOINS.set(True)
        try:
            return function(*arguments)
        finally:
            _JOINS.reset(token)

    return joined


@cache
def _install() -> None:
    """Replace, once, the method that a graph calls for each of its kernels; inductor has no option for it."""
    by_torch = AsyncCompile.cpp_pybinding

    def cpp_pybinding(self: Any, argtypes: list[str], source: str) -> Any:
        if not _JOINS.get() or get_compile_threads() <= 1:
            return by_torch(self, argtypes, source)
        try:
            kernels = vars(self).setdefault("_functorch_ens_kernels", _Kernels(self.submit))
            return LambdaFuture(kernels.add(argtypes, source))
        except Exception as error:
            log.info("a kernel is compiled in a file of its own: %r", error)
            return by_torch(self, argtypes, source)

    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[method-assign, assignment]


class _File(CppPythonBindingsCodeCache):
    """A file that is compiled but not loaded here: each of its kernels is loaded as a module of its own."""

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return SimpleNamespace(path=path)


class _Kernels:
    """The kernels of one graph, which adds all before it asks for the first."""

    def __init__(self, submit: Callable[..., Any]) -> None:
        self._submit = submit  # hands a task to a process that compiles
        self._texts: list[str] = []  # kernel number -> source
        self._files: dict[int, Any] | None = None

    def add(self, argtypes: list[str], source: str) -> Callable[[], Any]:
        """Add a kernel; the result loads it for Python, alone where it does not compile with the others."""
        number = len(self._texts)

        def load_async(part: Any, text: str, *_: Any, **__: Any) -> Callable[[], ModuleType]:
            self._texts.append(text)
            return lambda: self._module(part, number)

        members = {"entry_function": _name(number), "load_async": classmethod(load_async)}
        part: Any = type("Part", (CppPythonBindingsCodeCache,), members)  # torch adds the Python binding to it
        joined = part.load_pybinding_async(argtypes, source)

        def function() -> Any:
            try:
                return joined()
            except Exception as error:
                log.info("kernel %d is compiled alone: %r", number, error)
                return CppPythonBindingsCodeCache.load_pybinding(argtypes, source)

        return function

    def _module(self, part: Any, number: int) -> Any:
        file = self._compiled()[number]
        return part._load_library_inner(file.path, file.key)

    def _compiled(self) -> dict[int, Any]:
        """Kernel number -> its file, compiled by the first call."""
        if self._files is None:
            self._files = {}  # after a failure, the next kernel does not try again
            parts = _shared_out(dict(enumerate(self._texts)), get_compile_threads())
            waits = [_File.load_async(_joined(part), submit_fn=self._submit) for part in parts]
            files = [wait() for wait in waits]
            self._files = {number: file for part, file in zip(parts, files, strict=True) for number in part}
        return self._files


def _shared_out(texts: Mapping[int, str], count: int) -> list[dict[int, str]]:
    """Deal `texts` out to at most `count` parts of about the same length."""
    parts: list[dict[int, str]] = [{} for _ in range(min(count, len(texts)))]
    for number in sorted(texts, key=lambda number: -len(texts[number])):
        shortest = min(parts, key=lambda part: sum(map(len, part.values())))
        shortest[number] = texts[number]
    return parts


def _joined(texts: Mapping[int, str]) -> str:
    """Join several files into one: each in its own namespace, its function `kernel` renamed."""
    includes: dict[str, None] = {}
    parts = []
    for number, text in texts.items():
        includes |= dict.fromkeys(line.strip() for line in _INCLUDE.findall(text))
        alone = _INCLUDE.sub("", text)
        parts.append(f"#define kernel {_name(number)}\nnamespace part{number} {{\n{alone}\n}}\n#undef kernel\n")
    return "\n".join([*includes, *parts])


def _name(number: int) -> str:
    return f"kernel{number}"


# Includes, and the macro that must be defined before Python's header.
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*(?:include|define PY_SSIZE_T_CLEAN)\b.*$", re.MULTILINE)
