"""The networks whose time the benchmarks take, by name. Nothing here needs functorch_ens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from models import cnn


class Case(NamedTuple):
    """A model, the shape of one input, and the default sizes E and B."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    E: int
    B: int
    sizes: tuple[int, ...] = ()
    """The widths of the layers of an MLP."""


def mlp(sizes: Sequence[int]) -> nn.Module:
    """An MLP of these widths, with ReLU between its layers."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def small_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def mlp_case(E: int, B: int, *sizes: int) -> Case:
    """A case of an MLP of these widths."""
    return Case(f"MLP {'-'.join(map(str, sizes))}", partial(mlp, sizes), (sizes[0],), E, B, sizes)


NOTEBOOK_MLP = (3072, 128, 128, 10)
CASES = {
    **{f"mlp-{B}": mlp_case(5, B, *NOTEBOOK_MLP) for B in (32, 256, 1024)},
    "small-mlp": mlp_case(32, 32, 20, 64, 64, 10),
    "wide-mlp": mlp_case(16, 128, 784, 256, 256, 10),
    "cnn": Case("CNN with BatchNorm, 32 x 32", partial(cnn, 3, 10), (3, 32, 32), 5, 32),
    "resnet18": Case("ResNet-18, 32 x 32", resnet18, (3, 32, 32), 4, 16),
    "vit": Case("vision transformer, 32 x 32", small_vit, (3, 32, 32), 4, 8),
    "large-mlp": mlp_case(8, 1024, 4096, 4096, 4096, 10),
}
