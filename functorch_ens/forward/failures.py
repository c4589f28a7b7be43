"""Which errors of a call are vmap's, so that the loop may succeed, and which go to the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dis import opmap
from pathlib import Path

import torch
from torch import nn


class VmapCannot(RuntimeError):
    """vmap would compute something wrong; `modules` are those at work, the innermost last."""

    def __init__(self, message: str, modules: Sequence[nn.Module]) -> None:
        super().__init__(message)
        self.modules = list(modules)


# What vmap raises is of one of these classes, not of one derived from them. A user's classes, time-outs and lost
# connections are others.
_RAISED_BY_VMAP = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AssertionError)
_PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_RAISE = opmap["RAISE_VARARGS"]


def is_of_vmap(error: BaseException | None) -> bool:
    """Whether vmap, or torch because of vmap, raised `error` or an error that led to it.

    Then a loop may succeed. All others are the model's own, or have to do with the machine, and go to the caller.
    """
    while error is not None:
        if isinstance(error, VmapCannot) or (
            type(error) in _RAISED_BY_VMAP and not is_transient(error) and not _is_raised_by_others(error)
        ):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def interrupt_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that led to `error`: torch's own clearing up fails at some moments, and raises that in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


OF_THE_MACHINE = (MemoryError, TimeoutError, ConnectionError, torch.OutOfMemoryError)
"""Errors that say nothing of a compiler: they are perhaps gone at the next call."""


def is_transient(error: BaseException) -> bool:
    """Whether `error` may be gone at the next try: memory, time, a connection, a file."""
    return isinstance(error, MemoryError | OSError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _is_raised_by_others(error: BaseException) -> bool:
    """Whether a `raise` or `assert` outside of torch and this package raised `error`."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return code.co_code[trace.tb_lasti] == _RAISE and not code.co_filename.startswith(_PACKAGES)
