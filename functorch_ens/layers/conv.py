"""Convolutions and transposed convolutions: `s` per input channel, `r` per output channel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from functorch_ens._torch import CONVOLVES, PADS, common_base, convolve, output_padding
from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import autocast
from functorch_ens.layers.registry import register
from functorch_ens.layers.weight import Rank1

CONVOLUTION = common_base(nn.Conv1d, nn.ConvTranspose1d)
"""The base of all convolutions, transposed ones too."""

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _pure(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return getattr(_CONV[len(layer.kernel_size)], CONVOLVES)(layer, *autocast(input, weight, bias))


def _rule(layer: Any, input: Tensor, *, weight: Rank1) -> Tensor:
    # Every padding mode commutes with a scale per channel.
    return weight.apply(input, lambda x, kernel: convolve(layer, x, kernel, None), layer.bias)


def _pure_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    if not hasattr(layer, PADS):
        return _CONV_TRANSPOSE[len(layer.kernel_size)].forward(layer, input, output_size)
    return _transposed(layer, input, layer.weight, layer.bias, output_size)


def _rule_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None, *, weight: Rank1) -> Tensor:
    return weight.apply(input, lambda x, kernel: _transposed(layer, x, kernel, None, output_size), layer.bias)


def _transposed(
    layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None
) -> Tensor:
    """The forward of a transposed convolution with another weight and bias."""
    spatial = len(layer.kernel_size)
    options = layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
    padding = output_padding(layer, input, output_size, *options)
    input, weight, bias = autocast(input, weight, bias)
    return _FUNCTIONS[spatial](input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


register(
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    base=common_base(nn.Conv1d, nn.Conv2d),
    layout=lambda layer: Layout(layer.groups),
    pure={CONVOLVES: _pure},
    rule=_rule,
    when=lambda layer: hasattr(layer, CONVOLVES),
)
register(
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    base=common_base(nn.ConvTranspose1d, nn.ConvTranspose2d),
    layout=lambda layer: Layout(layer.groups, transposed=True),
    pure={"forward": _pure_transpose},
    rule=_rule_transpose,
    when=lambda layer: hasattr(layer, PADS),
)
