"""A line for whoever waits at a terminal while something is compiled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from tqdm import tqdm

WAIT = 10.0
"""Seconds after which the line is written."""


@contextmanager
def told_at_a_terminal() -> Iterator[None]:
    """A `with` block that compiles. If it takes long, a line on stderr says so, and another one how long it took."""
    if not sys.stderr.isatty():
        yield
        return
    begun, lines = time.monotonic(), []

    def tell(line: str) -> None:
        lines.append(line)
        tqdm.write(f"functorch_ens: {line}", file=sys.stderr)  # does not break a progress bar

    timer = Timer(WAIT, tell, ["compiling, once ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if lines:
            tell(f"compiling took {time.monotonic() - begun:.0f} s")
