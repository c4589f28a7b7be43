"""Norms, and the power iteration of spectral norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_ens._torch import check_input_dim, common_base, is_compiling
from functorch_ens.layers.operators import by_channel
from functorch_ens.layers.registry import register

RUNNING_NORM = common_base(nn.BatchNorm1d, nn.InstanceNorm1d)
"""The base of the norms that can keep running statistics, in buffers that a forward in training mode updates."""

NORMS = (RUNNING_NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The norms, whose weights are scales by channel: they have no `r` and `s` unless they are named."""

_BATCH_NORM = common_base(nn.BatchNorm1d, nn.BatchNorm2d)


def _pure(layer: Any, input: Tensor) -> Tensor:
    """BatchNorm. In training mode its statistics are plain arithmetic where torch's own code would not do.

    With `momentum=None` torch reads the count of batches as a Python number, which vmap refuses. And under vmap the
    rule of `F.batch_norm` makes the member axis a part of the channels. Compiled, this is a copy of the activations
    before the norm and another one after it; plain arithmetic leaves the axis where it is.
    """
    counts = layer.momentum is None and layer.track_running_stats
    if not layer.training or not (counts or is_compiling()):
        return _BATCH_NORM.forward(layer, input)
    check_input_dim(layer, input)
    rows = input.numel() // input.shape[1]
    if rows == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    var, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    if layer.track_running_stats:
        with torch.no_grad():
            _update(layer, mean, var * (rows / (rows - 1)))
    spatial = x.ndim - 2
    scale = torch.rsqrt(var + layer.eps)
    y = (x - by_channel(mean, spatial)) * by_channel(scale if layer.weight is None else scale * layer.weight, spatial)
    return (y if layer.bias is None else y + by_channel(layer.bias, spatial)).to(input.dtype)


def _update(layer: Any, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics towards those of a batch, in place, as torch does."""
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    share = 1.0 / layer.num_batches_tracked.to(mean.dtype) if layer.momentum is None else layer.momentum
    for running, value in ((layer.running_mean, mean), (layer.running_var, var)):
        if running is not None:
            running.add_((value.to(running.dtype) - running) * share)


@torch.no_grad()
def _pure_power_method(layer: Any, weight: Tensor, steps: int) -> None:
    """The power iteration of spectral_norm without `out=`, which vmap refuses."""
    for _ in range(steps):
        layer._u = F.normalize(torch.mv(weight, layer._v), dim=0, eps=layer.eps)
        layer._v = F.normalize(torch.mv(weight.H, layer._u), dim=0, eps=layer.eps)


register(_BATCH_NORM, pure={"forward": _pure})
register("torch.nn.utils.parametrizations._SpectralNorm", pure={"_power_method": _pure_power_method})
