"""Norms, and the power iteration of spectral norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_ens._torch import check_input_dim, common_base
from functorch_ens.layers.registry import register

RUNNING_NORM = common_base(nn.BatchNorm1d, nn.InstanceNorm1d)
"""The base of the norms that can keep running statistics, in buffers that a forward in training mode updates."""

NORMS = (RUNNING_NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The norms, whose weights are scales by channel: they have no `r` and `s` unless they are named."""

_BATCH_NORM = common_base(nn.BatchNorm1d, nn.BatchNorm2d)


def _pure(layer: Any, input: Tensor) -> Tensor:
    """BatchNorm with `momentum=None`. Torch reads its count of batches as a Python number, which vmap refuses."""
    if layer.momentum is not None or not layer.track_running_stats:
        return _BATCH_NORM.forward(layer, input)
    check_input_dim(layer, input)
    if not layer.training:
        return F.batch_norm(input, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
    with torch.no_grad():
        layer.num_batches_tracked = layer.num_batches_tracked + 1
        over = [dim for dim in range(input.ndim) if dim != 1]
        var, mean = torch.var_mean(input, over)
        weight = 1.0 / layer.num_batches_tracked.to(mean.dtype)
        layer.running_mean = layer.running_mean + (mean - layer.running_mean) * weight
        layer.running_var = layer.running_var + (var - layer.running_var) * weight
    return F.batch_norm(input, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)


@torch.no_grad()
def _pure_power_method(layer: Any, weight: Tensor, steps: int) -> None:
    """The power iteration of spectral_norm without `out=`, which vmap refuses."""
    for _ in range(steps):
        layer._u = F.normalize(torch.mv(weight, layer._v), dim=0, eps=layer.eps)
        layer._v = F.normalize(torch.mv(weight.H, layer._u), dim=0, eps=layer.eps)


register(_BATCH_NORM, pure={"forward": _pure})
register("torch.nn.utils.parametrizations._SpectralNorm", pure={"_power_method": _pure_power_method})
