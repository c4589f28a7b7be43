"""Every private name of torch that eager code needs: one function each, with a fallback for a torch that lacks it."""

from __future__ import annotations

from torch import nn


def common_base(*classes: type[nn.Module]) -> type[nn.Module]:
    """The nearest class that all `classes` inherit from: torch's own private bases, without their names."""
    first, *others = classes
    return next(base for base in first.__mro__ if all(issubclass(other, base) for other in others))
