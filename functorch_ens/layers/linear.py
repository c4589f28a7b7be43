"""Linear, as one product of two matrices, and Bilinear."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import linear
from functorch_ens.layers.registry import register
from functorch_ens.layers.weight import Rank1


def _pure(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


def _rule(layer: nn.Linear, input: Tensor, *, weight: Rank1) -> Tensor:
    return weight.linear(input, layer.bias)


def _rule_conv1d(layer: Any, x: Tensor, *, weight: Rank1) -> Tensor:
    return weight.apply(x, lambda x, W: linear(x, W.mT), layer.bias)


register(nn.Linear, layout=lambda layer: Layout(), pure={"forward": _pure}, rule=_rule)
register(nn.Bilinear, layout=lambda layer: Layout())
# Falcon's layer writes its product as x @ W.T.
register("transformers.models.falcon.modeling_falcon.FalconLinear", pure={"forward": _pure}, rule=_rule)
# The layer of GPT-2 is a Linear whose weight is [in, out]; transformers is not imported for it.
register("transformers.pytorch_utils.Conv1D", layout=lambda layer: Layout(transposed=True), rule=_rule_conv1d)
