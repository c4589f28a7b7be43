"""Convolutions and transposed convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same, loop
from torch import Tensor, nn

import functorch_ens as fe
from functorch_ens.anatomy import Layout, layout_of
from functorch_ens.layers.conv import CONVOLUTION

KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_has_the_groups_and_the_direction(kind: Any) -> None:
    layer: Any = kind(4, 6, 1, groups=2)
    assert issubclass(kind, CONVOLUTION) and not isinstance(nn.Linear(2, 2), CONVOLUTION)
    assert layout_of(layer) == Layout(groups=2, transposed="Transpose" in kind.__name__)
    assert layout_of(layer).sizes(layer.weight) == (6, 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_derived_from_torchs_base_has_the_layout(transposed: bool) -> None:
    base: Any = (nn.ConvTranspose1d if transposed else nn.Conv1d).__mro__[1]

    def forward(self: Any, x: Tensor) -> Tensor:
        compute = F.conv_transpose1d if transposed else F.conv1d
        return compute(x, self.weight, self.bias, groups=self.groups)

    own: Any = type("Own", (base,), {"forward": forward})
    model = own(4, 6, (2,), (1,), (0,), (1,), transposed, (0,), 2, True, "zeros").double()
    x = randn(3, 4, 5)
    assert layout_of(model) == Layout(2, transposed)
    params = fe.batchensemble_params(model, 2)
    assert_same(fe.make_forward(model, strategy="vmap")(params, x), loop(model, params, x))


def test_output_size_reaches_a_transposed_convolution() -> None:
    model, x = nn.ConvTranspose2d(2, 3, 3, stride=2).double(), randn(2, 2, 4, 4)
    params = fe.batchensemble_params(model, 2)
    for size in ([9, 9], [10, 9]):
        got = fe.make_forward(model, strategy="vmap")(params, x, output_size=size)
        assert got.shape == torch.Size([2, 2, 3, *size])
        assert_same(got, loop(model, params, x, output_size=size))
