"""The table of kinds of layers: rules, layouts, and every kind against the oracle and the exact fallback."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, Case, ScaledWordEmbedding, fast_layers, members, model_case, randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import TOLERANCE, assert_same, both_kinds, gradients, loop, low_rank
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from zoo_written import Matrices, Tied

import functorch_ens as fe
from functorch_ens import anatomy, layers
from functorch_ens.anatomy import Anatomy
from functorch_ens.layers import operators, registry
from functorch_ens.layers.operators import SIDES
from functorch_ens.layers.registry import rule_of

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
    few=st.sampled_from([0, operators.FEW]),
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
        patch.setattr(operators, "FEW", few)
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

    def refuse(self: fe.Rank1) -> Tensor:
        raise AssertionError("materialised")

    monkeypatch.setattr(fe.Rank1, "materialise", refuse)
    for layer, x in layers:
        fe.make_forward(layer)(fe.batchensemble_params(layer, 2), x)
    attention = nn.MultiheadAttention(4, 2)
    fe.make_forward(attention)(fe.batchensemble_params(attention, 2), *[torch.randn(3, 1, 4)] * 3)
    for plain in (nn.Embedding(3, 2, max_norm=1.0), nn.Bilinear(3, 3, 2)):
        inputs = (torch.tensor([0]),) if isinstance(plain, nn.Embedding) else (torch.randn(1, 3), torch.randn(1, 3))
        with pytest.raises(AssertionError, match="materialised"):
            fe.make_forward(plain)(fe.batchensemble_params(plain, 2), *inputs)


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
        assert weight.r is not None and weight.s is not None
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


def test_a_users_rule_comes_before_that_of_a_pattern_of_names() -> None:
    class Mine(ScaledWordEmbedding):
        __module__ = "transformers.models.mine"
        __qualname__ = "MineScaledWordEmbedding"

    assert rule_of(Mine(3, 2)) == rule_of(ScaledWordEmbedding(3, 2)) is not None

    @fe.rank1_rule(Mine)
    def mine(layer: Mine, x: Tensor, *, weight: fe.Rank1) -> Tensor:
        return layer.embed_scale * F.embedding(x, weight.materialise())

    found = rule_of(Mine(3, 2))
    assert found is not None and found.forward is mine


@pytest.mark.parametrize("wrong", [3, "Linear", dict])
def test_a_rule_for_what_is_no_module_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"layer_types: expected subclasses of torch\.nn\.Module"):
        fe.rank1_rule(wrong)
    with pytest.raises(TypeError, match=r"layer_types: expected subclasses of torch\.nn\.Module"):
        fe.rank1_layout(wrong, layout=lambda layer: fe.Layout())


def test_a_rule_that_names_no_weight_is_an_error() -> None:
    with pytest.raises(TypeError, match="keyword-only"):
        fe.rank1_rule(Matrices)(lambda layer, x: x)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(8, 4), (2, 3, 8)),
        (nn.Conv1d(8, 4, 2), (2, 8, 5)),
        (nn.Conv2d(8, 4, 2, padding=1, padding_mode="circular"), (2, 8, 5, 5)),
        (nn.ConvTranspose1d(8, 4, 2), (2, 8, 5)),
        (_Attention(), (2, 3, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_autocast_computes_in_its_dtype(model: nn.Module, shape: tuple[int, ...], strategy: str) -> None:
    """Inside vmap, autocast does not reach convolutions, and the bias of a linear layer is added in float32."""
    x = torch.randn(shape)
    for params in both_kinds(model, 2):
        forward = fe.make_forward(model, strategy=strategy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = forward(params, x), loop(model, params, x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0.05)
        assert forward(params, x).dtype == torch.float32


def test_every_kind_of_layer_is_one_row_in_one_file() -> None:
    rows: dict[str, list[str]] = {}
    for path in Path(layers.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
                for given in call.args:
                    names = [str(given.value)] if isinstance(given, ast.Constant) else []
                    for kind in names or re.findall(r"[\w.]+", ast.unparse(given)):
                        rows.setdefault(kind, []).append(path.stem)
    assert {"nn.Linear", "nn.Conv2d", "nn.LSTMCell", "nn.RReLU"} < rows.keys()
    assert all(len(places) == 1 for places in rows.values()), rows
    files = {file for places in rows.values() for file in places}
    assert (
        files
        == {"attention", "conv", "embedding", "experts", "linear", "norm", "other", "recurrent"}
        == set(layers.__all__)
    )
    for key, row in registry._kinds.items():
        functions = [*row.pure.values(), *([] if row.rule is None else [row.rule.forward])]
        if isinstance(key, type) and key in anatomy._layouts:
            functions.append(anatomy._layouts[key])
        assert len({function.__module__ for function in functions}) <= 1, key


def test_the_first_obstacle_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.RReLU()), nn.GRU(2, 2))
    assert registry.obstacle(Anatomy(model)) == "1.0 (RReLU) calls aten::rrelu, which vmap has no rule for"
    assert registry.obstacle(Anatomy(model[0])) is None
    model[0].register_full_backward_hook(lambda *args: None)
    assert registry.obstacle(Anatomy(model)) == "0 (Linear) has backward hooks, which vmap passes by"
    assert registry.obstacle(Anatomy(nn.LSTM(2, 2))) == (
        "the model (LSTM) calls a fused RNN kernel, which vmap has no rule for"
    )


def test_layers_that_are_alike_share_a_class() -> None:
    """torch.compile guards on the class of a layer: it can reuse its code only where that is the same."""
    copies = [fe.make_forward(nn.Linear(3, 2))._known.templates.traced._module for _ in range(2)]
    other = fe.make_forward(nn.Linear(3, 2), rank1_side="activation")._known.templates.traced._module
    assert type(copies[0]) is type(copies[1]) is not type(other)
    assert isinstance(other, nn.Linear) and type(other).__name__ == "Linear"


class _TiedConvolutions(nn.Module):
    """An autoencoder whose decoder has the weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 3, 2)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).tanh())


class _Sizes(TorchDispatchMode):
    """Notes the largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["embedding", "convolution"])
def test_a_tied_weight_is_fast_wherever_it_is_used(name: str, strategy: str, lora: bool, rank1: bool) -> None:
    model = (Tied() if name == "embedding" else _TiedConvolutions()).double()
    x = torch.randint(5, (4, 2)) if name == "embedding" else torch.randn(4, 3, 6, dtype=torch.float64)
    params = low_rank(model, 3, 2, rank1) if lora else both_kinds(model, 3)[rank1]
    assert {row.rule for row in fe.describe(model, params).rows if row.held.startswith("shared +")} <= {"fast"}
    forward = fe.make_forward(model, strategy=strategy)
    assert_same(forward(params, x), loop(model, params, x))
    assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))


def test_a_tied_vocabulary_is_not_multiplied_out() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(1000, 8), "score": nn.Linear(8, 1000, bias=False)})
    model["score"].weight = model["embed"].weight

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["score"](self.parts["embed"](x))

    forward, params = fe.make_forward(Language(), strategy="vmap"), fe.batchensemble_params(Language(), 4)
    for _ in range(2):
        with _Sizes() as sizes:
            forward(params, torch.randint(1000, (2,))).sum().backward()
    assert sizes.largest <= 4 * 2 * 1000  # the logits; E weights would be 4 * 1000 * 8
