"""MultiheadAttention and TransformerEncoderLayer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from cases import XLNetRelativeAttention, members, randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, both_kinds, compile_whole, gradients, loop, low_rank
from torch import Tensor, nn

import functorch_ens as fe
from functorch_ens.layers.registry import rule_of


@given(data=st.data(), E=members)
def test_the_rule_for_attention_equals_the_oracle(data: st.DataObject, E: int) -> None:
    def draw(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    heads, batch, L, S = draw(1, 2), draw(1, 3), draw(1, 4), draw(1, 3)
    batch_first, batched, alone = draw(False, True), draw(False, True), draw(False, True)
    model = nn.MultiheadAttention(4, heads, bias=draw(False, True), batch_first=batch_first, dropout=0.3).double()
    assert rule_of(model) is not None
    model.eval()

    def tensor(length: int) -> Tensor:
        return randn(length, 4) if not batched else randn(*((batch, length) if batch_first else (length, batch)), 4)

    query = tensor(L)
    key, value = (query, query) if alone else (tensor(S), tensor(S))
    S = L if alone else S
    options: dict[str, Any] = {"need_weights": draw(False, True), "average_attn_weights": draw(False, True)}
    shape = [draw((L, S), ((batch if batched else 1) * heads, L, S))]
    match draw("none", "bool", "float"):
        case "bool":
            options["attn_mask"] = torch.rand(*shape[0]) < 0.3
            options["attn_mask"][..., 0] = False  # something is left to attend to
        case "float":
            options["attn_mask"] = randn(*shape[0])
    if draw(False, True):
        padding = torch.rand(*((batch, S) if batched else (S,))) < 0.3
        padding[..., 0] = False
        floating = options.get("attn_mask") is not None and options["attn_mask"].is_floating_point()
        options["key_padding_mask"] = (
            torch.zeros(padding.shape).double().masked_fill(padding, -9.0) if floating else padding
        )
    params = fe.batchensemble_params(model, E)
    want = loop(model, params, query, key, value, **options)
    forward = fe.make_forward(model)
    assert_same(forward(params, query, key, value, **options), want)
    assert_same(
        gradients(forward, params, query, key, value, **options),
        gradients(partial(loop, model), params, query, key, value, **options),
    )


def test_attention_keeps_apart_what_its_caller_passed_apart() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    q, k, v = randn(2, 3, 4), randn(2, 5, 4), randn(2, 5, 4)
    for args in ((q, q, q), (q, k, k), (q, k, v), (q[0], k[0], v[0])):
        for params in both_kinds(model, 2):
            assert_same(fe.make_forward(model, strategy="vmap")(params, *args), loop(model, params, *args))
    assert model.batch_first


def test_a_transformer_in_eval_mode_has_a_gradient_also_compiled() -> None:
    # In float32: of float64 the compiler of torch 2.11 makes a backward pass of attention with mixed dtypes.
    model, x = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), torch.randn(2, 3, 4)
    params = fe.batchensemble_params(model, 3)
    forward = fe.make_forward(model)
    step = torch.func.grad(lambda params: forward(params, x).square().sum())
    with torch.no_grad():
        assert_same(compile_whole(step)(params), step(params))


def test_relative_attention_has_r_and_s_over_the_model_and_over_the_heads() -> None:
    model, x = XLNetRelativeAttention(4, 2, 3).double(), randn(2, 5, 4)
    params = fe.batchensemble_params(model, 3)
    sizes = {name: stack.shape[1] for name, stack in params.stacked.items()}
    assert sizes == {
        **{f"{name}_r": 6 for name in "qkvr"},
        **{f"{name}_s": 4 for name in "qkvr"},
        **{"o_r": 4, "o_s": 6},
    }
    r, s = params.stacked["q_r"].view(3, 1, 2, 3), params.stacked["q_s"].view(3, 4, 1, 1)
    assert_same(fe.member_params(model, params, 2)["q"], model.q * r[2] * s[2])
    for params in (*both_kinds(model, 3), low_rank(model, 3, 2, False), low_rank(model, 3, 2, True)):
        for strategy in ("vmap", "loop"):
            forward = fe.make_forward(model, strategy=strategy)
            assert_same(forward(params, x), loop(model, params, x))
            assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
