"""Low-rank weights in every kind of layer, alone and with `r` and `s`, against merged weights in a plain loop."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, Case, fast_layers, members, model_case, randn, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, assert_same, compile_whole, gradients, loop, low_rank, merge
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import functorch_ens as fe
from functorch_ens.anatomy import Layout, layout_of
from functorch_ens.layers import operators
from functorch_ens.layers.operators import SIDES, pointwise

ranks = st.integers(1, 4)  # the sizes of the layers are 1 to 4 too, so a rank may be larger than those of its weight


def test_the_definition() -> None:
    """y_i = (W (x * s_i) + B_i (A_i (x * s_i))) * r_i + b, for a linear layer and a grouped convolution."""
    linear, x = nn.Linear(3, 4).double(), randn(5, 3)
    params = low_rank(linear, 2, 2, rank1=True)
    r, s, A, B = (params.stacked[f"weight_{each}"] for each in ("r", "s", "lora_A", "lora_B"))
    want = [(F.linear(x * s[i], linear.weight) + (x * s[i]) @ A[i].T @ B[i].T) * r[i] + linear.bias for i in range(2)]
    assert_same(fe.make_forward(linear)(params, x), torch.stack(want))

    conv, x = nn.Conv1d(4, 6, 2, groups=2).double(), randn(5, 4, 7)
    params = low_rank(conv, 2, 3, rank1=True)
    r, s, A, B = (params.stacked[f"weight_{each}"] for each in ("r", "s", "lora_A", "lora_B"))
    assert conv.bias is not None
    outputs = []
    for i in range(2):
        halves = (x * s[i][:, None]).chunk(2, dim=1)  # both groups share A, and have their own rows of B
        low = [F.conv1d(half, A[i].view(3, 2, 2)) for half in halves]
        mixed = [torch.einsum("or,nrl->nol", rows, part) for rows, part in zip(B[i].chunk(2), low, strict=True)]
        y = F.conv1d(x * s[i][:, None], conv.weight, groups=2) + torch.cat(mixed, dim=1)
        outputs.append(y * r[i][:, None] + conv.bias[:, None])
    assert_same(fe.make_forward(conv)(params, x), torch.stack(outputs))


@given(
    case=fast_layers,
    E=members,
    rank=ranks,
    rank1=st.booleans(),
    side=st.sampled_from(SIDES),
    few=st.sampled_from([0, operators.FEW]),
)
@settings(max_examples=60)
def test_fast_rules_equal_the_oracle(case: Case, E: int, rank: int, rank1: bool, side: str, few: int) -> None:
    params = low_rank(case.model, E, rank, rank1)
    want = loop(case.model, params, *case.args)
    slopes = gradients(partial(loop, case.model), params, *case.args)
    assert {name for name in slopes if "lora" in name} == {"weight_lora_A", "weight_lora_B"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "FEW", few)
        for strategy in ("vmap", "loop"):
            forward = fe.make_forward(case.model, strategy=strategy, rank1_side=side)
            assert_same(forward(params, *case.args), want)
            assert_same(gradients(forward, params, *case.args), slopes)


@given(case=fast_layers, rank=ranks)
@settings(max_examples=50)
def test_materialise_equals_the_merged_weight(case: Case, rank: int) -> None:
    layer: Any = case.model
    A, B = (tensor[0].detach() for tensor in low_rank(layer, 1, rank, rank1=False).stacked.values())
    got = fe.Rank1(layer.weight, layout=layout_of(layer), A=A, B=B).materialise()
    assert_same(got, merge(layer, layer.weight, A, B), tolerance=1e-15)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank1", [False, True])
def test_any_model_equals_the_oracle(name: str, rank1: bool) -> None:
    case = model_case(name)
    params = low_rank(case.model, 3, 2, rank1)
    want = loop(case.model, params, *case.args)
    slopes = gradients(partial(loop, case.model), params, *case.args)
    for options in ({}, {"strategy": "loop"}, {"chunk_size": 2}):
        forward = fe.make_forward(case.model, **options)
        assert_same(forward(params, *case.args), want)
        assert_same(gradients(forward, params, *case.args), slopes)


@given(data=st.data(), E=members, rank=ranks)
@settings(max_examples=30)
def test_the_packed_projection_of_attention_equals_the_oracle(data: st.DataObject, E: int, rank: int) -> None:
    batch_first, alone, rank1 = (data.draw(st.booleans()) for _ in range(3))
    model = nn.MultiheadAttention(4, 2, batch_first=batch_first, bias=data.draw(st.booleans())).double().eval()
    query = randn(2, 3, 4)
    inputs = (query, query, query) if alone else (query, randn(2, 3, 4), randn(2, 3, 4))
    params = low_rank(model, E, rank, rank1)
    forward = fe.make_forward(model)
    assert_same(forward(params, *inputs), loop(model, params, *inputs))
    slopes = gradients(partial(loop, model), params, *inputs)
    assert_same(gradients(forward, params, *inputs), slopes)


def test_inputs_of_its_own_for_each_member() -> None:
    for layer, shape in ((nn.Linear(3, 4), (2, 5, 3)), (nn.Conv1d(3, 4, 2), (2, 5, 3, 6))):
        model, x = layer.double(), randn(*shape)
        for rank1 in (False, True):
            params = low_rank(model, 2, 2, rank1)
            want = torch.stack([loop(model, params, x[i])[i] for i in range(2)])
            assert_same(fe.make_forward(model, strategy="vmap", member_inputs=True)(params, x), want)


def test_an_input_without_a_batch() -> None:
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(3, 4), randn(3)),
        (nn.Conv2d(2, 4, 2, groups=2), randn(2, 4, 4)),
        (nn.ConvTranspose1d(2, 4, 2, groups=2), randn(2, 4)),
        (nn.Embedding(4, 3), torch.tensor(2)),
    ]
    for layer, x in layers:
        params = low_rank(layer.double(), 2, 3, rank1=True)
        assert_same(fe.make_forward(layer, strategy="vmap")(params, x), loop(layer, params, x))


def test_an_input_of_another_size_is_an_error_as_in_the_layer() -> None:
    for layer, shape in (
        (nn.Linear(3, 4), (5, 1)),
        (nn.Conv1d(3, 4, 2), (5, 1, 6)),
        (nn.ConvTranspose1d(3, 4, 2), (5, 1, 6)),
    ):
        for rank1 in (False, True):
            params = low_rank(layer, 2, 1, rank1)
            with pytest.raises(RuntimeError):
                fe.make_forward(layer, strategy="loop")(params, torch.randn(shape))


FAST: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
    (nn.Linear(3, 2), (torch.randn(4, 3),)),
    (nn.Conv2d(4, 2, 2, groups=2), (torch.randn(4, 4, 5, 5),)),
    (nn.ConvTranspose1d(3, 2, 2), (torch.randn(4, 3, 5),)),
    (nn.Embedding(3, 2), (torch.tensor([0, 2]),)),
    (nn.MultiheadAttention(4, 2), (torch.randn(3, 1, 4),) * 3),
]


@pytest.mark.parametrize(("layer", "inputs"), FAST, ids=[type(layer).__name__ for layer, _ in FAST])
@pytest.mark.parametrize("rank1", [False, True])
def test_fast_rules_are_what_computes(
    layer: nn.Module, inputs: tuple[Tensor, ...], rank1: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: fe.Rank1) -> Tensor:
        raise AssertionError("materialised")

    params = low_rank(layer, 2, 2, rank1)
    assert {row.rule for row in fe.describe(layer, params).rows} <= {"fast", "none"}
    monkeypatch.setattr(fe.Rank1, "materialise", refuse)
    for strategy in ("vmap", "loop"):
        fe.make_forward(layer, strategy=strategy)(params, *inputs)
    with pytest.raises(AssertionError, match="materialised"):
        fe.make_forward(layer, rank1_side="weight")(params, *inputs)


# --------------------------------------------------------------------------------------------------------------------
# A user's own rules


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Tripled(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


calls: list[type[nn.Module]] = []


@fe.rank1_rule(Doubled)
def _doubled(layer: Doubled, x: Tensor, *, weight: fe.Rank1) -> Tensor:
    calls.append(Doubled)
    assert weight.r is not None and weight.s is not None and weight.A is None
    return 2 * weight.scale_output(F.linear(x * weight.s, weight.weight), layer.bias)


@fe.rank1_rule(Tripled, lora=True)
def _tripled(layer: Tripled, x: Tensor, *, weight: fe.Rank1) -> Tensor:
    calls.append(Tripled)
    return 3 * weight.apply(x, F.conv1d, layer.bias)


def test_a_rule_that_does_not_know_low_rank_weights_is_not_asked() -> None:
    model, x = Doubled(3, 4).double(), randn(5, 3)
    for rank1, rule in ((False, "fallback"), (True, "fallback")):
        params = low_rank(model, 3, 2, rank1)
        calls.clear()
        assert_same(fe.make_forward(model)(params, x), loop(model, params, x))
        assert calls == [] and fe.describe(model, params).rows[0].rule == rule
    params = fe.batchensemble_params(model, 3)
    assert_same(fe.make_forward(model)(params, x), loop(model, params, x))
    assert calls == [Doubled] and fe.describe(model, params).rows[0].rule == "fast"


def test_a_rule_that_knows_them_serves_them() -> None:
    model, x = Tripled(3, 4, 2).double(), randn(5, 3, 6)
    for rank1 in (False, True):
        params = low_rank(model, 3, 2, rank1)
        want, slopes = loop(model, params, x), gradients(partial(loop, model), params, x)
        for strategy in ("vmap", "loop"):
            calls.clear()
            forward = fe.make_forward(model, strategy=strategy)
            assert_same(forward(params, x), want)
            assert_same(gradients(forward, params, x), slopes)
            assert set(calls) == {Tripled}
        assert fe.describe(model, params).rows[0].rule == "fast"


def test_lora_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="lora: expected True or False, got 'yes'"):
        fe.rank1_rule(Doubled, lora="yes")  # type: ignore[arg-type]  # that is the test


# --------------------------------------------------------------------------------------------------------------------
# Parts


@given(groups=st.integers(1, 3), spatial=st.integers(0, 2), lead=st.integers(0, 2))
@settings(max_examples=30)
def test_pointwise_is_a_convolution_of_size_1(groups: int, spatial: int, lead: int) -> None:
    x, matrix = randn(*[2] * lead, 2 * groups, *[3] * spatial), randn(4 * groups, 2)
    rows = x.reshape(-1, 2 * groups, max(3**spatial, 1))
    want = F.conv1d(rows, matrix[..., None], groups=groups).reshape(*[2] * lead, 4 * groups, *[3] * spatial)
    assert_same(pointwise(x, matrix, groups, spatial), want)


@pytest.mark.parametrize("layout", [Layout(), Layout(transposed=True), Layout(groups=2)])
def test_low_rank_of_a_layout(layout: Layout) -> None:
    weight = randn(4, 3, 2)
    (rank, into), (out, also) = layout.factors(weight)
    assert rank == also == "rank" and (out, into) == ((6, 4) if layout.transposed else (4, 6))
    A, B = randn(2, int(into)), randn(int(out), 2)
    delta = layout.low_rank(A, B, weight).flatten(1)
    assert delta.shape == (4, 6) and torch.linalg.matrix_rank(delta) == 2
    assert_same(delta.T if layout.transposed else delta, B @ A)


def test_the_parts_of_a_weight_share_its_input() -> None:
    A, B, r, s = randn(2, 3), randn(6, 2), randn(6), randn(3)
    whole = fe.Rank1(randn(6, 3), r, s, A=A, B=B)
    parts = whole.chunk(3)
    assert_same(torch.cat([part.materialise() for part in parts]), whole.materialise(), tolerance=1e-15)
    assert all(part.A is A and part.s is s for part in parts)
    plain = fe.Rank1(randn(6, 3)).chunk(2)
    assert all(part.r is None and part.B is None and part.weight.shape == (3, 3) for part in plain)


# --------------------------------------------------------------------------------------------------------------------
# Precision and compilation


@given(case=fast_layers, E=members, rank=ranks, rank1=st.booleans(), strategy=st.sampled_from(["vmap", "loop"]))
@settings(max_examples=30)
def test_fast_rules_in_bfloat16_are_near_the_float64_oracle(
    case: Case, E: int, rank: int, rank1: bool, strategy: str
) -> None:
    rounded = case.to(torch.bfloat16)
    params = low_rank(rounded.model, E, rank, rank1)
    forward = fe.make_forward(rounded.model, strategy=strategy)
    got, slopes = forward(params, *rounded.args), gradients(forward, params, *rounded.args)
    assert got.dtype == torch.bfloat16 and all(slope.dtype == torch.bfloat16 for slope in slopes.values())
    exact = rounded.to(torch.float64)
    twin = tree_map(lambda leaf: leaf.detach().double().requires_grad_(leaf.requires_grad), params)
    near = partial(assert_same, tolerance=TOLERANCE[torch.bfloat16], floor=1.0)
    near(got.double(), loop(exact.model, twin, *exact.args))
    want = gradients(partial(loop, exact.model), twin, *exact.args)
    near({name: slope.double() for name, slope in slopes.items()}, want)


@pytest.mark.parametrize(("layer", "inputs"), FAST, ids=[type(layer).__name__ for layer, _ in FAST])
@pytest.mark.parametrize("side", ["auto", "weight"])
def test_factors_may_be_wider_than_the_base(layer: nn.Module, inputs: tuple[Tensor, ...], side: str) -> None:
    """They are trained in float32, beside a base in bfloat16."""
    layer = copy.deepcopy(layer)
    params = low_rank(layer, 2, 2, rank1=False)
    exact = fe.make_forward(layer)(params, *inputs)
    narrow = fe.EnsembleParams({name: x.bfloat16() for name, x in params.shared.items()}, params.stacked)
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    got = fe.make_forward(layer.bfloat16(), rank1_side=side)(narrow, *inputs)
    first = got[0] if isinstance(got, tuple) else got
    assert first.dtype == torch.bfloat16
    assert_same(tree_map(lambda x: x.float(), got), exact, tolerance=TOLERANCE[torch.bfloat16])
    first.square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in params.stacked.values())


@pytest.mark.parametrize(("layer", "inputs"), FAST, ids=[type(layer).__name__ for layer, _ in FAST])
def test_autocast_reaches_the_factors(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The products are computed in bfloat16, as in the layer itself, and the result is near that of float32."""
    params = low_rank(layer, 2, 2, rank1=False)
    exact = fe.make_forward(layer)(params, *inputs)
    for strategy in ("vmap", "loop"):
        with torch.autocast("cpu", torch.bfloat16):
            got, own = fe.make_forward(layer, strategy=strategy)(params, *inputs), layer(*inputs)
        first, theirs = (value[0] if isinstance(value, tuple) else value for value in (got, own))
        assert first.dtype == theirs.dtype
        assert_same(tree_map(lambda x: x.float(), got), exact, tolerance=5e-2)


@pytest.mark.compile
@pytest.mark.parametrize(("layer", "inputs"), FAST, ids=[type(layer).__name__ for layer, _ in FAST])
@pytest.mark.parametrize("rank1", [False, True])
def test_every_fast_rule_compiles_whole(layer: nn.Module, inputs: tuple[Tensor, ...], rank1: bool) -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return (first - target).square().mean()

    layer = copy.deepcopy(layer).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    params = low_rank(layer, 3, 2, rank1)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.1))
    found = []
    for strategy, compile in (("vmap", {"backend": "aot_eager", "fullgraph": True}), ("loop", False)):
        forward = fe.make_forward(layer, strategy=strategy)
        step = fe.make_train_step(forward, loss, optimizer, compile=compile)
        found.append(step.gradients(params, *inputs, torch.tensor(0.5).double()))
        assert step.compiled_by == ("functorch_ens" if compile else "eager")
    for got, want in zip(*(dict(sorted(each.gradients.items())).items() for each in found), strict=True):
        assert_same(got, want)
    assert_same(found[0].losses, found[1].losses)


@pytest.mark.parametrize("rank1", [False, True])
def test_a_compiled_forward_equals_the_oracle(rank1: bool) -> None:
    model, x = small_net().double(), randn(5, 3)
    params = low_rank(model, 3, 2, rank1)
    forward = compile_whole(fe.make_forward(model.eval()))
    assert_same(forward(params, x), loop(model, params, x))
    assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
