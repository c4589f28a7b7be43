"""Linear, as one product of two matrices, and Bilinear."""

from __future__ import annotations

from torch import Tensor, nn

from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import linear
from functorch_ens.layers.registry import register
from functorch_ens.layers.weight import Rank1


def _pure(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


def _rule(layer: nn.Linear, input: Tensor, *, weight: Rank1) -> Tensor:
    return weight.linear(input, layer.bias)


register(nn.Linear, layout=lambda layer: Layout(), pure={"forward": _pure}, rule=_rule)
register(nn.Bilinear, layout=lambda layer: Layout())
