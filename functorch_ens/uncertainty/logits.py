"""Checks of the members' outputs and of labels. Each error names the argument, the rule and the value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functorch_ens._torch import is_compiling, is_under_vmap
from functorch_ens.checks import check_tensor


def check_logits(logits: Tensor) -> Tensor:
    """Return `logits`, `[E, ..., C]`, with half precision converted to float32.

    Raises:
        TypeError: not a floating tensor.
        ValueError: fewer than 3 axes; no member or input; fewer than 2 classes; NaN, +inf, or -inf for every class of
            an input. Values are checked only where `shows_values` is true.
    """
    check_floating(logits, "logits")
    shape = list(logits.shape)
    if logits.ndim < 3:
        raise ValueError(
            f"logits: expected members first, [E, B, C]; one network's are logits[None]; got shape {shape}"
        )
    if 0 in shape:
        raise ValueError(f"logits: expected [E, B, C] with at least one member and one input, got shape {shape}")
    if shape[-1] == 1:
        raise ValueError(
            f"logits: expected at least 2 classes on the last axis, got shape {shape}; where z is the one logit of a "
            "sigmoid, give torch.cat([torch.zeros_like(z), z], -1)"
        )
    if shows_values(logits):
        highest = logits.detach().amax(-1)  # NaN, +inf and "all -inf" each show in the maximum
        if not bool(highest.isfinite().all()):
            kinds = {"nan": highest.isnan(), "inf": highest == math.inf, "-inf for all classes": highest == -math.inf}
            found = [f"{kind} in the members {_members(where)}" for kind, where in kinds.items() if bool(where.any())]
            raise ValueError(f"logits: expected numbers, or -inf for a class that is ruled out, got {', '.join(found)}")
    return _at_least_float32(logits)


def check_regression(outputs: Tensor, *, means_alone: bool) -> Tensor:
    """Return `outputs`, with half precision converted to float32: `[E, B, 2]`, or `[E, B]` if `means_alone`.

    Raises:
        TypeError: not a floating tensor.
        ValueError: another shape; no member or input; NaN or inf, where `shows_values` is true.
    """
    check_floating(outputs, "outputs")
    shape = list(outputs.shape)
    expected = "[E, B, 2], a mean and a log variance" + means_alone * ", or [E, B], means alone"
    if not ((outputs.ndim == 3 and shape[-1] == 2) or (means_alone and outputs.ndim == 2)) or 0 in shape:
        raise ValueError(f"outputs: expected {expected}, with at least one member and one input, got shape {shape}")
    if shows_values(outputs):
        strange = ~outputs.detach().isfinite()
        if bool(strange.any()):
            raise ValueError(f"outputs: expected finite numbers, got others in the members {_members(strange)}")
    return _at_least_float32(outputs)


def check_floating(tensor: Tensor, argument: str) -> None:
    """TypeError if `tensor` is not a floating tensor, ValueError if it is sparse or nested."""
    check_tensor(tensor, argument, "a floating tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{argument}: expected a floating tensor, got one of {tensor.dtype}")


def shows_values(tensor: Tensor) -> bool:
    """Whether Python can read the values of `tensor`: not within torch.compile, under vmap or on the meta device."""
    return not (is_compiling() or tensor.is_meta or is_under_vmap(tensor))


def check_labels(y: Tensor, logits: Tensor) -> Tensor:
    """Return the labels `y` as int64; their shape is that of `logits` `[E, ..., C]` without E and C.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another shape or device; a label that is not in 0 to C - 1, where `shows_values` is true.
    """
    check_tensor(y, "y", "a tensor of classes")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y: expected classes of an integer dtype, got {y.dtype}")
    if y.shape != logits.shape[1:-1]:
        raise ValueError(
            f"y: expected one class for each input of logits {list(logits.shape)}, a tensor of shape "
            f"{list(logits.shape[1:-1])}, got {list(y.shape)}"
        )
    if y.device != logits.device:
        raise ValueError(f"y: expected the device of the logits, {logits.device}, got {y.device}")
    y, C = y.long(), logits.shape[-1]
    if shows_values(y):
        low, high = y.min().item(), y.max().item()
        if low < 0 or high >= C:
            raise ValueError(f"y: expected classes from 0 to {C - 1}, of {C}, got {low if low < 0 else high}")
    return y


def of_label(values: Tensor, y: Tensor) -> Tensor:
    """Select the value of each label: `values` `[..., C]`, `y` `[...]` -> `[...]`."""
    return values.gather(-1, y[..., None])[..., 0]


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _members(where: Tensor) -> list[int]:
    """The indices on axis 0 at which `where` is true anywhere."""
    found: list[int] = where.flatten(1).any(1).nonzero().flatten().tolist()
    return found
