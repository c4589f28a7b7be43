"""Convolutions and transposed convolutions: `s` per input channel, `r` per output channel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from functorch_ens._torch import common_base
from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import autocast
from functorch_ens.layers.registry import register
from functorch_ens.layers.weight import Rank1

CONVOLUTION = common_base(nn.Conv1d, nn.ConvTranspose1d)
"""The base of all convolutions, transposed ones too."""

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _pure(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _CONV[len(layer.kernel_size)]._conv_forward(layer, *autocast(input, weight, bias))


def _rule(layer: Any, input: Tensor, *, weight: Rank1) -> Tensor:
    # `_conv_forward` also does the padding modes, all of which commute with a scale per channel.
    x, W = weight.scale_input(input)
    return weight.scale_output(layer._conv_forward(x, W, None), layer.bias)


def _pure_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    return _transposed(layer, input, layer.weight, layer.bias, output_size)


def _rule_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None, *, weight: Rank1) -> Tensor:
    x, W = weight.scale_input(input)
    return weight.scale_output(_transposed(layer, x, W, None, output_size), layer.bias)


def _transposed(
    layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None
) -> Tensor:
    """The forward of a transposed convolution with another weight and bias."""
    spatial = len(layer.kernel_size)
    options = layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
    padding = layer._output_padding(input, output_size, *options)
    input, weight, bias = autocast(input, weight, bias)
    return _CONV_TRANSPOSE[spatial](
        input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
    )


register(
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    base=common_base(nn.Conv1d, nn.Conv2d),
    layout=lambda layer: Layout(layer.groups),
    pure={"_conv_forward": _pure},
    rule=_rule,
)
register(
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    base=common_base(nn.ConvTranspose1d, nn.ConvTranspose2d),
    layout=lambda layer: Layout(layer.groups, transposed=True),
    pure={"forward": _pure_transpose},
    rule=_rule_transpose,
)
