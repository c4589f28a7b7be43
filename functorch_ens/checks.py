"""Checks of arguments that several functions take. Each error names the argument, the rule and the value."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_positive_int(value: Any, argument: str, or_else: str = "") -> int:
    """Return `value` as an int. TypeError if it is not an integer, ValueError if it is below 1.

    `or_else` names other accepted values.
    """
    expected = f"a positive int{or_else and f', {or_else}'}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected {expected}, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return int(value)


def check_number(value: Any, argument: str, *, minimum: float = -math.inf) -> float:
    """Return `value` as a float. TypeError if it is not a number, ValueError if it is not finite or below `minimum`."""
    expected = "a finite number" if minimum == -math.inf else f"a finite number >= {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}: expected {expected}, got {shown(value)}")
    number = float(value)
    if not (math.isfinite(number) and number >= minimum):
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return number


def check_option(value: Any, options: Collection[Any], argument: str, or_else: str = "") -> None:
    """ValueError if `value` is not one of `options`. `or_else` names other accepted values."""
    # The types are compared first, because an array is equal to nothing or to everything, number by number.
    if not any(value is option or (isinstance(value, type(option)) and value == option) for option in options):
        raise ValueError(f"{argument}: expected one of {list(options)}{or_else and f', {or_else}'}, got {shown(value)}")


def check_bool(value: Any, argument: str, or_else: str = "") -> None:
    """TypeError if `value` is not a bool: a truthy string is a mistake. `or_else` names other accepted values."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False{or_else and f', {or_else}'}, got {shown(value)}")


def check_text(value: Any, argument: str, expected: str) -> None:
    """TypeError if `value` is not a text, ValueError if it is empty."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected {expected}, got {shown(value)}")
    if not value:
        raise ValueError(f"{argument}: expected {expected}, got ''")


def check_path(value: Any, argument: str) -> None:
    """TypeError if `value` is not the path of a file, ValueError if it is empty or has a null character."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{argument}: expected the path of a file, got {shown(value)}")
    if os.fspath(value) in ("", ".") or "\0" in str(value):
        raise ValueError(f"{argument}: expected the path of a file, got {os.fspath(value)!r}")


def check_mapping(value: Any, argument: str, expected: str) -> None:
    """TypeError if `value` is not a mapping, such as a dict."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument}: expected {expected}, got {kind_of(value)}")


def check_callable(
    value: Any,
    argument: str,
    expected: str,
    arguments: Sequence[str] | None = None,
    keywords: Collection[str] = (),
    *,
    classes: bool = False,
) -> None:
    """TypeError if `value` is not a function, or cannot be called with these `arguments` (None: any) and `keywords`.

    A class is no function, unless `classes`: `nn.CrossEntropyLoss` in the place of `nn.CrossEntropyLoss()` makes
    modules, no losses.
    """
    if isinstance(value, type) and not classes:
        raise TypeError(f"{argument}: expected {expected}, got the class {value.__name__}; give {value.__name__}(...)")
    if not callable(value):
        raise TypeError(f"{argument}: expected {expected}, got {shown(value)}")
    if arguments is not None:
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # some functions written in C do not have one
            return
        try:
            signature.bind(*arguments, **dict.fromkeys(keywords))
        except TypeError as error:
            called = ", ".join([*arguments, *(f"{name}=" for name in keywords)])
            raise TypeError(
                f"{argument}: expected {expected}, called with ({called}), got one that takes {signature}"
            ) from error


def check_compile(compile: Any) -> None:
    """TypeError if `compile` is neither True, False nor a dict of options that torch.compile has."""
    if isinstance(compile, bool):
        return
    check_mapping(compile, "compile", "True, False or options of torch.compile")
    try:
        inspect.signature(torch.compile).bind(None, **compile)
    except TypeError as error:
        raise TypeError(f"compile: expected options of torch.compile, got {dict(compile)!r}: {error}") from error


def check_generator(generator: Any) -> None:
    """TypeError if `generator` is neither None nor a `torch.Generator`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {shown(generator)}")


def check_device(device: Any, argument: str = "device") -> None:
    """TypeError if `device` is no device, its name or None; ValueError if there is no such device here."""
    if device is None:
        return
    if not isinstance(device, str | torch.device):
        raise TypeError(f"{argument}: expected a torch.device, its name or None, got {shown(device)}")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError
        raise ValueError(
            f"{argument}: expected a device that is there, got {str(device)!r}: {first_line(error)}"
        ) from error


def check_tensor(value: Any, argument: str, expected: str = "a tensor") -> None:
    """TypeError if `value` is not a tensor, ValueError if its numbers are not laid out by strides (sparse, nested)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected {expected}, got {kind_of(value)}{advice(value, argument)}")
    if value.layout is not torch.strided or value.is_nested:
        raise ValueError(f"{argument}: expected {expected}, strided, got {shown(value)}; give to_dense()")


def check_has_values(value: Tensor, argument: str) -> None:
    """ValueError if `value` is on the meta device, where tensors have a shape alone."""
    if value.is_meta:
        raise ValueError(f"{argument}: expected a tensor with values, got one on the meta device, {list(value.shape)}")


def advice(value: Any, argument: str) -> str:
    """What to do with a `value` of numbers that is no tensor; "" for anything else."""
    if hasattr(value, "__array__") or (isinstance(value, list | tuple) and value):
        return f"; give torch.as_tensor({argument})"
    return ""


def check_keys(given: Collection[str], expected: Collection[str], argument: str) -> None:
    """ValueError that lists the missing and the unexpected keys, if there are any."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    if missing or unexpected:
        raise ValueError(f"{argument}: the names do not fit the model: missing {missing}, unexpected {unexpected}")


def check_of_members(value: Any, E: int | None, argument: str) -> Tensor:
    """Return `value`. TypeError if it is not a tensor, ValueError if its shape is not `[E, ...]`; None is any E."""
    wanted = "[E, ...]" if E is None else f"[{E}, ...]"
    check_tensor(value, argument, f"a tensor {wanted}, one for each member")
    tensor: Tensor = value
    if tensor.ndim == 0 or tensor.shape[0] == 0 or (E is not None and tensor.shape[0] != E):
        raise ValueError(f"{argument}: expected {wanted}, one for each member, got the shape {list(tensor.shape)}")
    return tensor


def first_line(error: BaseException) -> str:
    """What `error` says, in one line: torch appends paragraphs of advice."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def kind_of(value: Any) -> str:
    """A number or a text itself, anything else by its type: a list of numbers may be long."""
    return shown(value) if isinstance(value, str | int | float | complex | type) else type(value).__name__


def shown(value: Any) -> str:
    """Format `value` for an error message: a tensor or array by its shape, a tuple or list by its items."""
    if isinstance(value, Tensor):
        kind = "a nested tensor" if value.is_nested else f"a tensor {list(value.shape)}"
        return kind if value.layout is torch.strided else f"{kind} of the layout {value.layout}"
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        inner = ", ".join([*map(shown, value[:4]), *(["..."] if len(value) > 4 else [])])
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "__array__"):
        return f"{type(value).__name__} {list(getattr(value, 'shape', ()))}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({type(value).__name__})"
