"""Layers in a form that torch.func can follow, and vmap fast, in place of their own.

Each has the same outputs, gradients, new buffers and random numbers as the layer it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm

from functorch_ens.layers.operators import product


def purify(layer: Any) -> None:
    """Give `layer` the pure form of its methods, where they are those of a class that has one."""
    kind: Any = type(layer)
    methods = tuple((name, pure) for (cls, name), pure in _PURE.items() if _is(layer, cls, name))
    if methods:
        layer.__class__ = _pure_class(kind, methods)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        layer.sparse = False  # the gradient of a stack cannot be sparse: it is the same, dense
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # closes the inference fast path, which has no derivative


def _is(layer: nn.Module, cls: type[nn.Module] | str, method: str) -> bool:
    """Whether `method` of `layer` is that of the class `cls`; one of another package is given by its full name."""
    for base in type(layer).__mro__:
        if method in vars(base):
            found = base if isinstance(cls, type) else f"{base.__module__}.{base.__qualname__}"
            return found == cls and method not in vars(layer)
    return False


@cache  # one class for all layers that are alike: torch.compile then takes templates of one structure for the same
def _pure_class(cls: Any, methods: tuple[tuple[str, Callable[..., Any]], ...]) -> type[nn.Module]:
    return type(cls.__name__, (cls,), dict(methods))


def autocast(*tensors: Any) -> Any:
    """The arguments of an operation that autocast computes in its own dtype, in that dtype: inside vmap it may not."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, as one product of two matrices."""
    x, weight, bias = autocast(x, weight, bias)
    if x.ndim < 3:
        y = product(x, weight)
    else:
        y = product(x.flatten(0, -2), weight).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _conv_forward(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = _CONV[len(layer.kernel_size)]
    return kind._conv_forward(layer, *autocast(input, weight, bias))


def _conv_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    return conv_transpose(layer, input, layer.weight, layer.bias, output_size)


def conv_transpose(
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


_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


def _attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """MultiheadAttention on contiguous inputs, which make its projections one matrix product each, as in `linear`.

    With the batch as the second axis, which is how it computes anyway, it does not take the inference fast path.
    """
    turned = layer.batch_first and query.ndim == 3

    def turn(x: Tensor) -> Tensor:
        return (x.transpose(0, 1) if turned else x).contiguous()

    q = turn(query)  # what was one tensor stays one: the layer looks
    k = q if key is query else turn(key)
    v = q if value is query else k if value is key else turn(value)
    batch_first, layer.batch_first = layer.batch_first, False
    try:
        output, weights = nn.MultiheadAttention.forward(layer, q, k, v, *args, **kwargs)
    finally:
        layer.batch_first = batch_first
    (output,) = autocast(output)
    return output.transpose(0, 1) if turned else output, weights


def _lstm_cell(layer: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    if hx is None:
        zeros = input.new_zeros(*input.shape[:-1], layer.hidden_size)
        hx = zeros, zeros
    if any(x.ndim not in (1, 2) or x.ndim != input.ndim for x in (input, *hx)):
        return nn.LSTMCell.forward(layer, input, hx)  # which says what is wrong
    h, c = hx
    gates = F.linear(input, layer.weight_ih, layer.bias_ih) + F.linear(h, layer.weight_hh, layer.bias_hh)
    enter, forget, cell, leave = gates.chunk(4, dim=-1)
    c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
    return leave.sigmoid() * c.tanh(), c


def _stochastic_depth(layer: Any, input: Tensor) -> Tensor:
    """torchvision's StochasticDepth (Huang et al. 2016, arXiv:1603.09382), without random numbers drawn in place."""
    if not layer.training or layer.p == 0.0:
        return input
    rows = input.shape[0] if layer.mode == "row" else 1
    survival = 1.0 - layer.p
    noise = torch.bernoulli(
        torch.empty(rows, *[1] * (input.ndim - 1), dtype=input.dtype, device=input.device), survival
    )
    return input * (noise / survival if survival > 0.0 else noise)


@torch.no_grad()
def _power_method(layer: Any, weight: Tensor, steps: int) -> None:
    """The power iteration of spectral_norm, without `out=`."""
    for _ in range(steps):
        layer._u = F.normalize(torch.mv(weight, layer._v), dim=0, eps=layer.eps)
        layer._v = F.normalize(torch.mv(weight.H, layer._u), dim=0, eps=layer.eps)


def _renormalised(rows: Tensor, layer: Any) -> Tensor:
    """`rows` `[..., D]` no longer than `max_norm`. Torch shortens the parameter itself, unseen by its gradient."""
    norms = rows.norm(layer.norm_type, dim=-1, keepdim=True)
    scale = torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), 1.0)
    return rows + (rows * scale - rows).detach()


def _embedding(layer: nn.Embedding, input: Tensor) -> Tensor:
    if layer.max_norm is None:
        return nn.Embedding.forward(layer, input)
    rows = F.embedding(input, layer.weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    return _renormalised(rows, layer)


def _embedding_bag(
    layer: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    if layer.max_norm is None:
        return nn.EmbeddingBag.forward(layer, input, offsets, per_sample_weights)
    return F.embedding_bag(
        input,
        _renormalised(layer.weight, layer),
        offsets,
        scale_grad_by_freq=layer.scale_grad_by_freq,
        mode=layer.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )


def _batch_norm(layer: Any, input: Tensor) -> Tensor:
    """BatchNorm whose running statistics are plain averages; torch's own reads the count of batches from its tensor."""
    if layer.momentum is not None or not layer.track_running_stats:
        return _BatchNorm.forward(layer, input)
    layer._check_input_dim(input)
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


_PURE: dict[tuple[type[nn.Module] | str, str], Callable[..., Any]] = {
    (nn.Linear, "forward"): _linear,
    **{(kind, "_conv_forward"): _conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    **{(kind, "forward"): _conv_transpose for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)},
    (nn.MultiheadAttention, "forward"): _attention,
    (nn.LSTMCell, "forward"): _lstm_cell,
    (nn.Embedding, "forward"): _embedding,
    (nn.EmbeddingBag, "forward"): _embedding_bag,
    (_BatchNorm, "forward"): _batch_norm,
    (_SpectralNorm, "_power_method"): _power_method,
    ("torchvision.ops.stochastic_depth.StochasticDepth", "forward"): _stochastic_depth,
}
"""By class and method, what stands for it."""
