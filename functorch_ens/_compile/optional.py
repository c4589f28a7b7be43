"""How an extra fails: alone, and with its reason in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def optional(extra: str) -> Iterator[None]:
    """A `with` block whose failure is logged, as that of `extra`, and passed over."""
    try:
        yield
    except Exception as error:
        log.info("compiling without %s: %r", extra, error)


def inductor_option(name: str) -> Any:
    """The present value of an option of inductor, `"cpp.vec_isa_ok"`; AttributeError where this torch has none."""
    import torch._inductor.config

    return reduce(getattr, name.split("."), torch._inductor.config)
