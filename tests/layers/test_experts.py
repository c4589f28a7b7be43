"""Experts: stacks of matrices, by pattern of the name of their class, and in layers of the user's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import MixtralExperts, Mixture, randn
from oracle import assert_same, assert_untouched, both_kinds, compile_whole, gradients, loop, low_rank, snapshot
from torch import Tensor, nn

import functorch_ens as fe
from functorch_ens.anatomy import Anatomy


@pytest.mark.parametrize("transposed", [False, True])
def test_the_definition(transposed: bool) -> None:
    """W_i[k] = W[k] * (r_i[k] s_i[k]^T): each expert has vectors of its own."""
    model = Mixture(transposed).double()
    params = fe.batchensemble_params(model, 2, init="normal")
    sizes = {name: list(vector.shape) for name, vector in params.stacked.items() if "experts" in name}
    assert sizes == {
        **{"experts.up_proj_r": [2, 15], "experts.up_proj_s": [2, 12]},
        **{"experts.down_proj_r": [2, 12], "experts.down_proj_s": [2, 15]},
    }
    r, s = params.stacked["experts.up_proj_r"][1].view(3, 5), params.stacked["experts.up_proj_s"][1].view(3, 4)
    W = params.shared["experts.up_proj"]
    own = [W[k] * (torch.outer(s[k], r[k]) if transposed else torch.outer(r[k], s[k])) for k in range(3)]
    assert_same(fe.member_params(model, params, 1)["experts.up_proj"], torch.stack(own))
    assert "experts.up_proj_bias" in params.shared  # [n, out] is no matrix here
    assert "experts.up_proj_bias" in fe.batchensemble_params(model, 2, bias="stacked").stacked
    rows = {row.name: (row.held, row.rule) for row in fe.describe(model, params).rows}
    assert rows["up_proj"] == rows["down_proj"] == ("shared + r, s", "fallback")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble", "LoRA", "both"])
@pytest.mark.parametrize("options", [{"strategy": "vmap"}, {"strategy": "loop"}, {"chunk_size": 2}], ids=str)
def test_values_and_gradients_equal_the_oracle(transposed: bool, kind: str, options: dict[str, Any]) -> None:
    model, x = Mixture(transposed).double(), randn(2, 3, 4)
    if kind in ("LoRA", "both"):
        params = low_rank(model, 3, 2, rank1=kind == "both")
    else:
        params = both_kinds(model, 3)[kind == "BatchEnsemble"]
    before = snapshot(model, params)
    forward = fe.make_forward(model, **options)
    assert_same(forward(params, x), loop(model, params, x))
    assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
    assert_untouched(before, model, params)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_weight_is_multiplied_out_once_in_a_call(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward reads it once for every expert."""
    model, x = Mixture().double(), randn(2, 3, 4)
    params, calls = fe.batchensemble_params(model, 2), []
    own = fe.Rank1.materialise

    def counted(self: fe.Rank1) -> Tensor:
        calls.append(self.weight.shape)
        return own(self)

    forward = fe.make_forward(model, strategy=strategy)
    forward(params, x)
    monkeypatch.setattr(fe.Rank1, "materialise", counted)
    for _ in range(2):
        calls.clear()
        assert_same(forward(params, x), loop(model, params, x))
        assert len(calls) == 2 * (1 if strategy == "vmap" else 2)


@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble"])
def test_experts_compile_whole(kind: str) -> None:
    model, x = Mixture().double(), randn(2, 3, 4)
    params = both_kinds(model, 2)[kind == "BatchEnsemble"]
    assert_same(compile_whole(fe.make_forward(model))(params, x), loop(model, params, x))


def test_an_error_in_a_forward_leaves_the_weights_as_they_are() -> None:
    model = Mixture().double()
    params, forward = fe.batchensemble_params(model, 2), fe.make_forward(model, strategy="loop")
    with pytest.raises(RuntimeError):
        forward(params, randn(2, 3, 5))
    x = randn(2, 3, 4)
    assert_same(forward(params, x), loop(model, params, x))


def test_signs_and_choices_of_them() -> None:
    model = Mixture()
    params = fe.batchensemble_params(model, 2, init="random_sign", flip={"experts": 0.0, "router": 1.0})
    assert all((vector == (1 if "experts" in name else -1)).all() for name, vector in params.stacked.items())
    assert set(fe.batchensemble_params(model, 2, layers="experts").stacked) == {
        f"experts.{name}_{side}" for name in ("up_proj", "down_proj") for side in "rs"
    }
    assert set(fe.lora_params(model, 2, rank=1, layers="experts.up_proj").stacked) == {
        "experts.up_proj_lora_A",
        "experts.up_proj_lora_B",
    }


def test_a_train_step_trains_the_vectors_of_experts() -> None:
    model, x, y = Mixture().double(), randn(6, 4), randn(6, 4)
    params = fe.batchensemble_params(model, 3, r_std=0.1, s_std=0.1)
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=0.05))
    step = fe.make_train_step(fe.make_forward(model), nn.functional.mse_loss, optimizer, compile=False)
    first = step(params, x, y)
    for _ in range(20):
        last = step(params, x, y)
    assert (last < first).all()


class Stack(nn.Module):
    """A stack of matrices in a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4, 5))
        self.offset = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("noi,bi->bno", self.kernel, x) + self.offset


class Stacked(Stack):
    pass


class Ruled(Stack):
    pass


class Shaped(Stack):
    pass


def test_a_users_stack_by_a_layout_of_his_own() -> None:
    assert set(fe.batchensemble_params(Stack(), 2).stacked) == {"offset_r", "offset_s"}
    fe.rank1_layout(Stacked, layout=lambda layer: {"kernel": fe.Layout(groups=3, axes=(2, 1))})
    model, x = Stacked().double(), randn(2, 5)
    params = fe.batchensemble_params(model, 2)
    assert {name: list(vector.shape) for name, vector in params.stacked.items()} == {
        "kernel_r": [2, 12],
        "kernel_s": [2, 15],
    }
    r, s = params.stacked["kernel_r"].view(2, 3, 4, 1), params.stacked["kernel_s"].view(2, 3, 1, 5)
    want = torch.einsum("enoi,bi->ebno", model.kernel * r * s, x) + model.offset
    assert_same(fe.make_forward(model, strategy="vmap")(params, x), want)


def test_a_rule_for_a_stack_gets_the_merged_weight_and_no_product_of_matrices() -> None:
    fe.rank1_layout(Ruled, layout=lambda layer: {"kernel": fe.Layout(groups=3, axes=(2, 1))})
    refusals: list[str] = []

    @fe.rank1_rule(Ruled)
    def ruled(layer: Ruled, x: Tensor, *, kernel: fe.Rank1) -> Tensor:
        calls: list[Any] = [lambda: kernel.linear(x), lambda: kernel.scale_output(x), lambda: kernel.chunk(3)]
        for call in calls:
            with pytest.raises(TypeError, match=r"rule: a weight \[3, 4, 5\] of Layout.* use materialise"):
                call()
            refusals.append("told")
        return torch.einsum("noi,bi->bno", kernel.materialise(), x) + layer.offset

    model, x = Ruled().double(), randn(2, 5)
    params = fe.batchensemble_params(model, 2)
    r, s = params.stacked["kernel_r"].view(2, 3, 4, 1), params.stacked["kernel_s"].view(2, 3, 1, 5)
    want = torch.einsum("enoi,bi->ebno", model.kernel * r * s, x) + model.offset
    assert_same(fe.make_forward(model, strategy="loop")(params, x), want)
    assert len(refusals) == 6


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ({"offset": fe.Layout(axes=(2, 1))}, ValueError, r"reads 3 axes, but offset of Shaped is \[3, 4\]"),
        ({"kernel": 3}, TypeError, "returns a Layout, or a dict of Layouts by parameter"),
        (3, TypeError, "returns a Layout, or a dict of Layouts by parameter"),
    ],
    ids=str,
)
def test_a_wrong_layout_is_an_error(layout: Any, error: type[Exception], message: str) -> None:
    fe.rank1_layout(Shaped, layout=lambda layer: layout)
    with pytest.raises(error, match=message):
        fe.batchensemble_params(Shaped(), 2)


def test_one_layout_for_a_layer_leaves_its_smaller_parameters_as_they_are() -> None:
    fe.rank1_layout(Shaped, layout=lambda layer: fe.Layout(groups=3, axes=(2, 1)))
    assert Anatomy(Shaped()).layouts == {"kernel": fe.Layout(3, axes=(2, 1)), "offset": fe.Layout()}


def test_a_name_in_a_pattern_is_that_of_the_class() -> None:
    class Own(MixtralExperts):
        """A subclass is known by its base."""

    assert Anatomy(Own(2, 3, 4)).layouts["up_proj"] == fe.Layout(2, axes=(2, 1))
    assert Anatomy(Own(2, 3, 4, True)).layouts["up_proj"] == fe.Layout(2, transposed=True, axes=(2, 1))
