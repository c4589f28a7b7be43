"""Layers without weights: stochastic depth, and those that vmap cannot serve."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import randn
from oracle import assert_same, both_kinds, compile_whole, gradients, loop
from torch import Tensor, nn
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


class _Gelu(torch.autograd.Function):
    """An autograd.Function of the old kind, which vmap cannot follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / 2 * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * (x + 0.044715 * x**3))
        return slope * (x / 2 * (1 - t**2) * 0.79788456 * (1 + 3 * 0.044715 * x**2) + (1 + t) / 2)


class BloomGelu(nn.Module):
    """Stands for the layer of this name in transformers."""

    __module__ = "transformers.models.bloom.modeling_bloom"  # by which it is known

    def forward(self, x: Tensor) -> Tensor:
        return _Gelu.apply(x)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_the_gelu_of_bloom_is_computed_by_vmap(strategy: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), BloomGelu(), nn.Linear(4, 2)).double(), 3 * randn(5, 3)
    for params in both_kinds(model, 3):
        forward = fe.make_forward(model, strategy=strategy)
        assert_same(forward(params, x), loop(model, params, x))
        assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
        assert strategy == "loop" or forward.strategy == "vmap"
