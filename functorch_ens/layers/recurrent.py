"""RNN, LSTM and GRU, and their cells."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from functorch_ens.anatomy import Layout
from functorch_ens.layers.registry import register


def _pure_lstm_cell(
    layer: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """LSTMCell written out, because torch's fused kernel has no vmap rule."""
    if hx is None:
        zeros = input.new_zeros(*input.shape[:-1], layer.hidden_size)
        hx = zeros, zeros
    if any(x.ndim not in (1, 2) or x.ndim != input.ndim for x in (input, *hx)):
        return nn.LSTMCell.forward(layer, input, hx)  # it raises an error that says what is wrong
    h, c = hx
    gates = F.linear(input, layer.weight_ih, layer.bias_ih) + F.linear(h, layer.weight_hh, layer.bias_hh)
    enter, forget, cell, leave = gates.chunk(4, dim=-1)
    c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
    return leave.sigmoid() * c.tanh(), c


register(nn.RNNBase, layout=lambda layer: Layout(), obstacle="a fused RNN kernel, which vmap has no rule for")
register(nn.RNNCellBase, layout=lambda layer: Layout())
register(nn.LSTMCell, pure={"forward": _pure_lstm_cell})
