"""Layers without weights: stochastic depth, and those that vmap cannot serve."""

from __future__ import annotations

import pytest
import torch
from oracle import compile_whole
from torch import nn
from torchvision.ops import StochasticDepth

import functorch_ens as fe
from functorch_ens.anatomy import Anatomy
from functorch_ens.layers.registry import obstacle


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_compiles_at_the_first_call(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), StochasticDepth(0.5, mode), nn.Linear(4, 2))
    params, x = fe.ensemble_params(model, 3), torch.randn(6, 4)
    assert compile_whole(fe.make_forward(model))(params, x).shape == (3, 6, 2)


def test_stochastic_depth_drops_rows_of_each_member_at_its_rate() -> None:
    model = nn.Sequential(nn.Linear(1, 1), StochasticDepth(0.25, "row"))
    params, x = fe.ensemble_params(model, 4), torch.ones(4000, 1)
    kept = fe.make_forward(model, strategy="vmap")(params, x)[..., 0] != 0
    assert (kept.float().mean(1) - 0.75).abs().max() < 0.05
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(
    ("layer", "operation"),
    [
        (nn.RReLU(), "aten::rrelu, which vmap has no rule for"),
        (nn.CrossMapLRN2d(2), "an autograd.Function that torch.func cannot follow"),
        (nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2]), "operations that depend on the values of its target"),
    ],
)
def test_obstacles_to_vmap(layer: nn.Module, operation: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "layer": layer})
    assert obstacle(Anatomy(model)) == f"layer ({type(layer).__name__}) calls {operation}"
