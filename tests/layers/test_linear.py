"""Linear and Bilinear."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import randn
from measure import peak_memory
from oracle import assert_same, both_kinds, gradients, loop
from torch import Tensor, nn

import functorch_ens as fe


@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble"])
def test_projections_of_sequences_are_one_product(kind: str) -> None:
    """vmap alone copied the weight of a projection for every position, and was 40 times slower than the loop."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.down(self.up(x.transpose(0, 1)).relu()).transpose(0, 1)

    model, x = Block(), torch.randn(2, 100, 64)
    params = both_kinds(model, 2)[kind == "BatchEnsemble"]
    peaks = {}
    for strategy in ("vmap", "loop"):
        forward = fe.make_forward(model, strategy=strategy)
        gradients(forward, params, x)
        peaks[strategy] = peak_memory(partial(gradients, forward, params, x), torch.device("cpu"))
    assert peaks["vmap"] < 1.5 * peaks["loop"]


@pytest.mark.parametrize("shape", [(3,), (0, 3), (5, 3), (2, 5, 3), (2, 1, 5, 3)])
def test_any_number_of_leading_axes(shape: tuple[int, ...]) -> None:
    model, x = nn.Linear(3, 4).double(), randn(*shape)
    for params in both_kinds(model, 2):
        assert_same(fe.make_forward(model, strategy="vmap")(params, x), loop(model, params, x))


def test_bilinear_equals_the_oracle_under_vmap() -> None:
    model, x, y = nn.Bilinear(3, 4, 2).double(), randn(5, 3), randn(5, 4)
    for params in both_kinds(model, 2):
        assert_same(fe.make_forward(model, strategy="vmap")(params, x, y), loop(model, params, x, y))
