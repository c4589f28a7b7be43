"""Recurrent layers and their cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randn
from oracle import assert_same, both_kinds, loop
from torch import nn

import functorch_ens as fe


def test_an_lstm_cell_says_what_is_wrong_with_its_input() -> None:
    model = nn.LSTMCell(4, 3)
    forward, params = fe.make_forward(model), fe.ensemble_params(model, 2)
    with pytest.raises(ValueError, match="LSTMCell: Expected input to be 1D or 2D, got 3D"):
        forward(params, torch.ones(1, 2, 4))
    with pytest.raises(RuntimeError):
        forward(params, torch.ones(2, 5))
    assert forward(params, torch.ones(4))[0].shape == (2, 3)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_vmap_has_no_rule_for_the_fused_kernel(kind: type[nn.Module]) -> None:
    forward = fe.make_forward(nn.Sequential(kind(2, 3)))
    assert forward.strategy == "loop"
    assert forward.reason == f"0 ({kind.__name__}) calls a fused RNN kernel, which vmap has no rule for"


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [False, True])
def test_cells_equal_the_oracle_under_vmap(kind: Any, bias: bool) -> None:
    model, x = kind(4, 3, bias=bias).double(), randn(2, 4)
    state = (randn(2, 3), randn(2, 3)) if kind is nn.LSTMCell else randn(2, 3)
    for params in both_kinds(model, 2):
        for args in ((x,), (x, state)):
            assert_same(fe.make_forward(model, strategy="vmap")(params, *args), loop(model, params, *args))
