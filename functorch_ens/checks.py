"""Checks of arguments that several functions take. Each error names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_positive_int(value: Any, argument: str) -> int:
    """Return `value` as an int. TypeError if it is not an integer, ValueError if it is below 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected a positive int, got {value!r}")
    return int(value)


def check_number(value: Any, argument: str, *, minimum: float = -math.inf) -> float:
    """Return `value` as a float. TypeError if it is not a number, ValueError if it is not finite or below `minimum`."""
    expected = "a finite number" if minimum == -math.inf else f"a finite number >= {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}: expected {expected}, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= minimum):
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return number


def check_option(value: Any, options: Collection[Any], argument: str) -> None:
    """ValueError if `value` is not one of `options`."""
    if value not in options:
        raise ValueError(f"{argument}: expected one of {list(options)}, got {value!r}")


def check_bool(value: Any, argument: str, or_else: str = "") -> None:
    """TypeError if `value` is not a bool: a truthy string is a mistake. `or_else` names other accepted values."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False{or_else and f', {or_else}'}, got {value!r}")


def check_generator(generator: Any) -> None:
    """TypeError if `generator` is neither None nor a `torch.Generator`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {generator!r}")


def check_keys(given: Collection[str], expected: Collection[str], argument: str) -> None:
    """ValueError that lists the missing and the unexpected keys, if there are any."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    if missing or unexpected:
        raise ValueError(f"{argument}: the names do not fit the model: missing {missing}, unexpected {unexpected}")


def check_of_members(value: Any, E: int | None, argument: str) -> Tensor:
    """Return `value`. TypeError if it is not a tensor, ValueError if its shape is not `[E, ...]`; None is any E."""
    wanted = "[E, ...]" if E is None else f"[{E}, ...]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor {wanted}, one for each member, got {value!r}")
    if value.ndim == 0 or (E is not None and value.shape[0] != E):
        raise ValueError(f"{argument}: expected {wanted}, one for each member, got the shape {list(value.shape)}")
    return value


def first_line(error: BaseException) -> str:
    """What `error` says, in one line: torch appends paragraphs of advice."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def shown(value: Any) -> str:
    """Format `value` for an error message: a tensor by its shape, a tuple or list by its items."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(shown, value))
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value)
