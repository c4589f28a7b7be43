"""Fast rules, the exact fallback, the oracle, and which weights get r and s."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, Case, fast_layers, members, model_case, randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import TOLERANCE, assert_same, gradients, loop, materialise
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from zoo import Matrices

import functorch_ens as fe
from functorch_ens.layers import operators as products
from functorch_ens.layers.operators import SIDES
from functorch_ens.layers.registry import Rank1, layout_of, rule_of

inits = st.sampled_from(["normal", "random_sign", "ones"])


def _without_rule(layer: nn.Module) -> nn.Module:
    """`layer` with a forward of its own that does the same, so that no rule serves it."""
    own = type(layer).forward
    layer.__class__ = type("Plain", (type(layer),), {"forward": lambda self, *args: own(self, *args)})
    assert rule_of(layer) is None
    return layer


@given(
    case=fast_layers,
    E=members,
    init=inits,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    side=st.sampled_from(SIDES),
    few=st.sampled_from([0, products.FEW]),
)
def test_fast_rules_equal_the_oracle_and_the_fallback(
    case: Case, E: int, init: str, dtype: torch.dtype, side: str, few: int
) -> None:
    case = case.to(dtype)
    params = fe.batchensemble_params(case.model, E, init=init)
    want = loop(case.model, params, *case.args)
    want_gradients = gradients(partial(loop, case.model), params, *case.args)

    def check(forward: fe.Forward) -> None:
        assert_same(forward(params, *case.args), want)
        assert_same(gradients(forward, params, *case.args), want_gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "FEW", few)
        check(fe.make_forward(case.model, strategy="vmap", rank1_side=side))
    check(fe.make_forward(case.model, strategy="loop", rank1_side=side))
    _without_rule(case.model)
    check(fe.make_forward(case.model, strategy="loop"))


def test_fast_rules_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(3, 2), torch.randn(4, 3)),
        (nn.Conv2d(3, 2, 2), torch.randn(4, 3, 5, 5)),
        (nn.ConvTranspose1d(3, 2, 2), torch.randn(4, 3, 5)),
        (nn.Embedding(3, 2), torch.tensor([0, 2])),
    ]

    def refuse(self: Rank1) -> Tensor:
        raise AssertionError("materialised")

    monkeypatch.setattr(Rank1, "materialise", refuse)
    for layer, x in layers:
        fe.make_forward(layer)(fe.batchensemble_params(layer, 2), x)
    attention = nn.MultiheadAttention(4, 2)
    fe.make_forward(attention)(fe.batchensemble_params(attention, 2), *[torch.randn(3, 1, 4)] * 3)
    for plain in (nn.Embedding(3, 2, max_norm=1.0), nn.Bilinear(3, 3, 2)):
        inputs = (torch.tensor([0]),) if isinstance(plain, nn.Embedding) else (torch.randn(1, 3), torch.randn(1, 3))
        with pytest.raises(AssertionError, match="materialised"):
            fe.make_forward(plain)(fe.batchensemble_params(plain, 2), *inputs)


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


@given(case=fast_layers, E=members, strategy=st.sampled_from(["vmap", "loop"]))
def test_fast_rules_in_bfloat16_are_near_the_float64_oracle(case: Case, E: int, strategy: str) -> None:
    rounded = case.to(torch.bfloat16)
    params = fe.batchensemble_params(rounded.model, E)
    forward = fe.make_forward(rounded.model, strategy=strategy)
    got, slopes = forward(params, *rounded.args), gradients(forward, params, *rounded.args)
    assert got.dtype == torch.bfloat16 and all(slope.dtype == torch.bfloat16 for slope in slopes.values())

    exact = rounded.to(torch.float64)
    twin = tree_map(lambda leaf: leaf.detach().double().requires_grad_(), params)
    # What is added up is of the size of 1; a sum that cancels is as wrong as its terms.
    near = partial(assert_same, tolerance=TOLERANCE[torch.bfloat16], floor=1.0)
    near(got.double(), loop(exact.model, twin, *exact.args))
    want = gradients(partial(loop, exact.model), twin, *exact.args)
    near({name: slope.double() for name, slope in slopes.items()}, want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"bias": "stacked"}, {"init": "random_sign", "stacked": "*bias*"}], ids=str)
def test_any_model_equals_the_oracle(name: str, options: dict[str, Any]) -> None:
    if "stacked" in options and name == "matrices":
        options = {"stacked": "offset"}
    if "stacked" in options and name in ("embedding bag",):
        options = {"stacked": "weight"}
    case = model_case(name)
    params = fe.batchensemble_params(case.model, 3, **options)
    want = loop(case.model, params, *case.args)
    want_gradients = gradients(partial(loop, case.model), params, *case.args)
    for strategy in ("auto", "loop"):
        forward = fe.make_forward(case.model, strategy=strategy)
        assert_same(forward(params, *case.args), want)
        assert_same(gradients(forward, params, *case.args), want_gradients)


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


def test_r_and_s_have_the_sizes_of_the_output_and_the_input() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 4),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "embedding": nn.Embedding(10, 7),
            "bilinear": nn.Bilinear(2, 3, 5),
            "attention": nn.MultiheadAttention(4, 2, kdim=6, vdim=8),
            "lstm": nn.LSTM(3, 5),
            "cell": nn.GRUCell(3, 5),
        }
    )
    stacked = fe.batchensemble_params(model, 2).stacked
    sizes = {name: stack.shape[1] for name, stack in stacked.items()}
    assert sizes == {
        **{"linear.weight_r": 4, "linear.weight_s": 3, "conv.weight_r": 6, "conv.weight_s": 4},
        **{"transposed.weight_r": 6, "transposed.weight_s": 4, "embedding.weight_r": 7, "embedding.weight_s": 10},
        **{"bilinear.weight_r": 5, "bilinear.weight_s": 2},
        **{"attention.q_proj_weight_r": 4, "attention.q_proj_weight_s": 4},
        **{"attention.k_proj_weight_r": 4, "attention.k_proj_weight_s": 6},
        **{"attention.v_proj_weight_r": 4, "attention.v_proj_weight_s": 8},
        **{"attention.out_proj.weight_r": 4, "attention.out_proj.weight_s": 4},
        **{"lstm.weight_ih_l0_r": 20, "lstm.weight_ih_l0_s": 3, "lstm.weight_hh_l0_r": 20, "lstm.weight_hh_l0_s": 5},
        **{"cell.weight_ih_r": 15, "cell.weight_ih_s": 3, "cell.weight_hh_r": 15, "cell.weight_hh_s": 5},
    }


class _Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.layer_scale = nn.Parameter(torch.ones(4, 1))
        self.matrix = nn.Parameter(torch.ones(4, 4))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Linear(4, 1), nn.ReLU())
        self.counts = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)


def _with_r_and_s(layers: Any) -> set[str]:
    stacked = fe.batchensemble_params(_Vision(), 2, layers=layers).stacked
    assert {name[:-2] for name in stacked if name.endswith("_s")} == {
        name[:-2] for name in stacked if name.endswith("_r")
    }
    return {name.removesuffix("_r") for name in stacked if name.endswith("_r")}


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(3, 2), torch.ones(7, 1)),
        (nn.Conv2d(3, 2, 3), torch.ones(7, 1, 8, 8)),
        (nn.ConvTranspose1d(3, 2, 3), torch.ones(7, 1, 8)),
        (nn.Linear(3, 2), torch.ones(7, 3, dtype=torch.int64)),
        (nn.Linear(3, 2), torch.ones(7, 3, dtype=torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_an_input_that_the_layer_refuses_is_refused(model: nn.Module, x: Tensor, strategy: str) -> None:
    """`x * s` would broadcast a single feature to all, and promote a dtype."""
    refusal = "cannot be multiplied|same dtype|expected input.* to have 3 channels"
    with pytest.raises(RuntimeError, match=refusal):
        model(x)
    with pytest.raises(RuntimeError, match=refusal):
        fe.make_forward(model, strategy=strategy)(fe.batchensemble_params(model, 4), x)


def test_which_weights_get_r_and_s() -> None:
    both = {"body.0.weight", "body.2.weight"}
    assert _with_r_and_s(None) == both | {"matrix"}
    assert _with_r_and_s("body.*") == both
    assert _with_r_and_s("body.0") == {"body.0.weight"}
    assert _with_r_and_s(["body.2", "position"]) == {"body.2.weight", "position"}
    assert _with_r_and_s("body.1") == {"body.1.weight"}
    assert _with_r_and_s("*.weight") == both | {"body.1.weight"}
    assert _with_r_and_s(lambda name, module: isinstance(module, nn.Linear) and name == "body.0") == {"body.0.weight"}
    assert _with_r_and_s(lambda name, module: True) == both | {"matrix"}


@pytest.mark.parametrize("layers", ["body", "bodi.*", ["body.0", "body.3"], "body.0.bias", "counts"])
def test_a_pattern_without_effect_is_an_error(layers: Any) -> None:
    named = layers if isinstance(layers, str) else layers[-1]
    with pytest.raises(ValueError, match=f"layers: pattern '{named.replace('*', '[*]')}'"):
        fe.batchensemble_params(_Vision(), 2, layers=layers)


@pytest.mark.parametrize("layers", [3, [nn.Linear], [1]])
def test_layers_of_another_kind_are_a_type_error(layers: Any) -> None:
    with pytest.raises(TypeError, match="layers: expected a name pattern"):
        fe.batchensemble_params(_Vision(), 2, layers=layers)


def test_a_user_layer_can_have_a_rule_and_a_layout() -> None:
    class Mix(nn.Module):
        """`x @ W`: axis 0 is the input."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    calls = []
    fe.rank1_layout(Mix, layout=lambda layer: fe.Layout(transposed=True))

    @fe.rank1_rule(Mix)
    def mix(layer: Mix, x: Tensor, *, weight: fe.Rank1) -> Tensor:
        calls.append(layer)
        return (x * weight.s) @ weight.weight * weight.r

    model, x = Mix().double(), randn(5, 3)
    params = fe.batchensemble_params(model, 2)
    r, s = params.stacked["weight_r"], params.stacked["weight_s"]
    assert r.shape == (2, 4) and s.shape == (2, 3)
    want = torch.stack([x @ (model.weight * s[i][:, None] * r[i]) for i in range(2)])
    assert_same(fe.make_forward(model)(params, x), want)
    assert calls
    assert_same(fe.member_params(model, params, 1)["weight"], model.weight * s[1][:, None] * r[1])


def test_a_user_layer_with_a_rule_or_a_layout_has_r_and_s_by_default() -> None:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 1, 3))
            self.kernel = nn.Parameter(torch.randn(2, 1, 3))

    assert_none = pytest.raises(ValueError, match="nothing in Kernel would get r and s")
    with assert_none:
        fe.batchensemble_params(Kernel(), 2)
    fe.rank1_layout(Kernel, layout=lambda layer: fe.Layout())
    assert set(fe.batchensemble_params(Kernel(), 2).stacked) == {"weight_r", "weight_s"}
    fe.rank1_rule(Kernel)(lambda layer, x, *, kernel: x)
    assert set(fe.batchensemble_params(Kernel(), 2).stacked) == {"weight_r", "weight_s", "kernel_r", "kernel_s"}


@pytest.mark.parametrize("kind", ["classic", "batchensemble"])
def test_layers_can_be_called_by_keyword(kind: str) -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4, max_norm=1.0)
            self.bag = nn.EmbeddingBag(5, 4, max_norm=1.0)
            self.words = nn.Embedding(5, 4)
            self.linear = nn.Linear(4, 4)
            self.conv = nn.Conv1d(2, 3, 1)
            self.up = nn.ConvTranspose1d(3, 2, 1)
            self.norm = nn.BatchNorm1d(2, momentum=None)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(input=x) + self.words(input=x) + self.bag(input=x)[:, None]
            h = self.up(input=self.conv(input=self.linear(input=h)), output_size=[4])
            return self.norm(input=h)

    model, x = ByKeyword().double().eval(), torch.tensor([[0, 1], [3, 4]])
    make = fe.ensemble_params if kind == "classic" else fe.batchensemble_params
    params = make(model, 3)
    for strategy in ("vmap", "loop"):
        assert_same(fe.make_forward(model, strategy=strategy)(params, x), loop(model, params, x))


def test_a_subclass_with_its_own_forward_is_not_served_by_its_parents_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Cosine(nn.Conv1d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight / weight.norm(), bias)

    for model, x in ((Doubled(3, 2).double(), randn(4, 3)), (Cosine(3, 2, 1).double(), randn(4, 3, 5))):
        params = fe.batchensemble_params(model, 3)
        assert_same(fe.make_forward(model)(params, x), loop(model, params, x))
    patched = nn.Linear(3, 2)
    vars(patched)["forward"] = lambda x: F.linear(x.abs(), patched.weight)
    assert rule_of(patched) is None


@pytest.mark.parametrize("wrong", [3, "Linear", dict])
def test_a_rule_for_what_is_no_module_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"layer_types: expected subclasses of torch\.nn\.Module"):
        fe.rank1_rule(wrong)
    with pytest.raises(TypeError, match=r"layer_types: expected subclasses of torch\.nn\.Module"):
        fe.rank1_layout(wrong, layout=lambda layer: fe.Layout())


def test_a_rule_that_names_no_weight_is_an_error() -> None:
    with pytest.raises(TypeError, match="keyword-only"):
        fe.rank1_rule(Matrices)(lambda layer, x: x)
