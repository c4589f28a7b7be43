"""Rank1: its definition, its exact value, and the arithmetic of a user's own rule."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, fast_layers, randn
from hypothesis import given
from oracle import assert_same, gradients, loop, materialise
from torch import Tensor, nn

import functorch_ens as fe
from functorch_ens.anatomy import layout_of
from functorch_ens.layers import operators
from functorch_ens.layers.operators import SIDES


def test_the_definition() -> None:
    """y_i = (W (x * s_i)) * r_i + b, written out, for a linear layer and a grouped convolution."""
    linear, x = nn.Linear(3, 4).double(), randn(5, 3)
    params = fe.batchensemble_params(linear, 2)
    r, s = params.stacked["weight_r"], params.stacked["weight_s"]
    want = torch.stack([F.linear(x * s[i], linear.weight) * r[i] + linear.bias for i in range(2)])
    assert_same(fe.make_forward(linear)(params, x), want)

    conv, x = nn.Conv1d(4, 6, 2, groups=2).double(), randn(5, 4, 7)
    params = fe.batchensemble_params(conv, 2)
    r, s = params.stacked["weight_r"][..., None], params.stacked["weight_s"][..., None]
    assert conv.bias is not None
    want = torch.stack([F.conv1d(x * s[i], conv.weight, groups=2) * r[i] + conv.bias[:, None] for i in range(2)])
    assert_same(fe.make_forward(conv)(params, x), want)


@given(case=fast_layers)
def test_materialise_equals_the_oracle_entry_by_entry(case: Case) -> None:
    layer: Any = case.model
    out, into = layout_of(layer).sizes(layer.weight)
    r, s = randn(out), randn(into)
    got = fe.Rank1(layer.weight, r, s, layout_of(layer)).materialise()
    assert_same(got, materialise(layer, layer.weight, r, s), tolerance=1e-15)


class Doubled(nn.Linear):
    """A layer with a forward of its own, which the rule for Linear does not serve."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Dilated(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, dilation=2)


calls: list[type[nn.Module]] = []


@fe.rank1_rule(Doubled)
def _doubled(layer: Doubled, x: Tensor, *, weight: fe.Rank1) -> Tensor:
    calls.append(Doubled)
    return 2 * weight.linear(x, layer.bias)


@fe.rank1_rule(Dilated)
def _dilated(layer: Dilated, x: Tensor, *, weight: fe.Rank1) -> Tensor:
    calls.append(Dilated)
    x, W = weight.scale_input(x)
    return weight.scale_output(F.conv2d(x, W, dilation=2), layer.bias)


OWN = [
    (Doubled(3, 4), nn.Linear(3, 4), (7, 3)),
    (Doubled(3, 4, bias=False), nn.Linear(3, 4, bias=False), (2, 7, 3)),
    (Dilated(3, 4, 2), nn.Conv2d(3, 4, 2, dilation=2), (2, 3, 9, 9)),
    (Dilated(3, 4, 2, bias=False), nn.Conv2d(3, 4, 2, dilation=2, bias=False), (3, 4, 4)),
]


@pytest.mark.parametrize(("own", "ours", "shape"), OWN)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("few", [0, operators.FEW])
def test_a_users_rule_equals_the_oracle_and_takes_the_side(
    own: nn.Module, ours: nn.Module, shape: tuple[int, ...], side: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "FEW", few)
    model, x = copy.deepcopy(own).double(), randn(*shape)
    params = fe.batchensemble_params(model, 3)
    want, slopes = loop(model, params, x), gradients(partial(loop, model), params, x)
    for strategy in ("vmap", "loop"):
        calls.clear()
        forward = fe.make_forward(model, strategy=strategy, rank1_side=side)
        assert_same(forward(params, x), want)
        assert_same(gradients(forward, params, x), slopes)
        # On the side of the weight, W * (r s^T) is multiplied out, for our rules too.
        assert set(calls) == (set() if side == "weight" else {type(own)})


@pytest.mark.parametrize(("own", "ours", "shape"), OWN)
@pytest.mark.parametrize("side", SIDES)
def test_a_users_rule_calls_the_operators_of_ours(
    own: nn.Module, ours: nn.Module, shape: tuple[int, ...], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "FEW", 0)
    called: list[tuple[Any, ...]] = []
    for name in ("scaled", "product"):
        operator = getattr(torch.ops.functorch_ens, name)

        def recorded(*args: Any, name: str = name, operator: Any = operator) -> Any:
            called.append((name, *(arg for arg in args if not isinstance(arg, Tensor))))
            return operator(*args)

        monkeypatch.setattr(torch.ops.functorch_ens, name, recorded)
    found = []
    for model in (own, ours):
        called.clear()
        params = fe.batchensemble_params(model, 3)
        fe.make_forward(model, strategy="vmap", rank1_side=side)(params, torch.randn(shape))
        found.append(list(dict.fromkeys(called)))  # each mode in force calls what stands in for the operator again
    expected = [] if side == "weight" else [("scaled", 1, False, side)]
    assert all([call for call in each if call[0] == "scaled"] == expected for each in found)
    if side != "weight":  # there the layer's own forward is called, with W * (r s^T) for its weight
        assert found[0] == found[1]


@given(case=fast_layers)
def test_scale_input_multiplies_s_in_on_either_side(case: Case) -> None:
    layer: Any = case.model
    layout = layout_of(layer)
    out, into = layout.sizes(layer.weight)
    r, s = randn(out), randn(into)
    x = randn(2, into, *[3] * (layer.weight.ndim - 2))
    for side in ("auto", "activation"):
        scaled, weight = fe.Rank1(layer.weight, r, s, layout, side).scale_input(x)
        assert weight is layer.weight
        assert_same(scaled, x * s.reshape(-1, *[1] * (x.ndim - 2)))
    same, weight = fe.Rank1(layer.weight, r, s, layout, "weight").scale_input(x)
    assert same is x
    assert_same(weight, materialise(layer, layer.weight, torch.ones(out, dtype=torch.float64), s), tolerance=1e-15)


def test_an_input_of_other_channels_comes_back_as_it_is() -> None:
    weight = fe.Rank1(randn(4, 3), randn(4), randn(3))
    for x in (randn(5, 1), randn(5, 2), randn()):
        assert weight.scale_input(x)[0] is x
