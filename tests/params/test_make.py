"""ensemble_params, batchensemble_params, ensemble_buffers: what is in them, whence it comes, whose memory it is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import MODELS, members, model_case, small_net, source
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, assert_untouched, loop, snapshot, tensors_of
from torch import Tensor, nn
from torchvision.models import resnet18
from zoo_written import Matrices, Tied

import functorch_ens as fe


def _quietly(make: Any, *args: Any, **options: Any) -> fe.EnsembleParams:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params: fe.EnsembleParams = make(*args, **options)
    return params


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# --------------------------------------------------------------------------------------------------------------------
# What is in them


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_kinds(name: str) -> None:
    model = model_case(name).model
    own = dict(model.named_parameters())
    classic = _quietly(fe.ensemble_params, model, 3)
    assert classic.E == 3 and classic.shared == {}
    assert {k: v.shape for k, v in classic.stacked.items()} == {k: (3, *v.shape) for k, v in own.items()}
    be = fe.batchensemble_params(model, 3)
    assert {k: v.shape for k, v in be.shared.items()} == {k: v.shape for k, v in own.items()}
    assert all(torch.equal(be.shared[k], own[k]) for k in own)
    assert be.E == 3 and be.stacked and all(k.endswith(("_r", "_s")) and v.shape[0] == 3 for k, v in be.stacked.items())
    for params in (classic, be):
        for tensor in tensors_of(params).values():
            assert tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float64 and tensor.is_contiguous()


@given(E=members, seed=st.integers(0, 2**40), double=st.booleans())
def test_the_generator_decides_alone(E: int, seed: int, double: bool) -> None:
    model = small_net().double() if double else small_net()

    def make(g: torch.Generator | None) -> list[fe.EnsembleParams]:
        return [
            fe.ensemble_params(model, E, generator=g),
            fe.ensemble_params(model, E, reset=small_net, generator=g),
            fe.batchensemble_params(model, E, generator=g),
            fe.batchensemble_params(model, E, init="random_sign", use_base_weights=False, stacked="3.*", generator=g),
        ]

    before = torch.get_rng_state()
    first = make(source(seed))
    assert torch.equal(before, torch.get_rng_state()), "the global random state was touched"
    torch.rand(3)
    second = make(source(seed))
    other = make(source(seed + 1))
    torch.manual_seed(seed)
    third = make(None)
    torch.manual_seed(seed)
    fourth = make(None)
    for a, b, c, d, e in zip(first, second, other, third, fourth, strict=True):
        for name, tensor in tensors_of(a).items():
            assert torch.equal(tensor, tensors_of(b)[name]) and torch.equal(tensors_of(d)[name], tensors_of(e)[name])
        assert any(not torch.equal(tensor, tensors_of(c)[name]) for name, tensor in tensors_of(a).items())
    two = fe.ensemble_params(model, E), fe.ensemble_params(model, E)
    assert not torch.equal(two[0].stacked["0.weight"], two[1].stacked["0.weight"]), (
        "the global generator did not advance"
    )


def test_members_start_apart() -> None:
    for params in (fe.ensemble_params(small_net(), 4), fe.ensemble_params(small_net(), 4, reset=small_net)):
        for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
            stack = params.stacked[name]
            assert all(not torch.equal(stack[i], stack[j]) for i in range(4) for j in range(i))
    params = fe.batchensemble_params(nn.Linear(64, 64), 4)
    for stack in params.stacked.values():
        assert all(not torch.equal(stack[i], stack[j]) for i in range(4) for j in range(i))


# --------------------------------------------------------------------------------------------------------------------
# reset


# --------------------------------------------------------------------------------------------------------------------
# stacked, bias, use_base_weights


@pytest.mark.parametrize("stacked", ["3.*", ["3.weight", "3.bias"], lambda name, p: name.startswith("3")])
def test_a_sub_ensemble_shares_the_models_trunk(stacked: Any) -> None:
    model = small_net()
    params = fe.ensemble_params(model, 3, stacked=stacked)
    assert set(params.stacked) == {"3.weight", "3.bias"}
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in params.shared.items())
    assert set(params.shared) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert not torch.equal(params.stacked["3.weight"][0], params.stacked["3.weight"][1])


def test_stacked_in_a_batchensemble_is_a_whole_copy() -> None:
    model = small_net()
    params = fe.batchensemble_params(model, 3, stacked=["3.weight", "1.*"])
    assert set(params.stacked) == {"0.weight_r", "0.weight_s", "3.weight", "1.weight", "1.bias"}
    assert all(torch.equal(member, model.get_parameter("3.weight")) for member in params.stacked["3.weight"])
    only = fe.batchensemble_params(model, 3, layers=[], stacked="1.*")
    assert set(only.stacked) == {"1.weight", "1.bias"}


def test_a_batchensemble_of_16_is_hardly_larger_than_one_network() -> None:
    model = resnet18(num_classes=10)
    params = fe.batchensemble_params(model, 16)
    bytes_of_one = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(tensor.nbytes for part in params for tensor in part.values()) < 1.15 * bytes_of_one


def test_stacked_biases_are_those_of_the_rank1_layers_and_start_from_the_models() -> None:
    model = nn.ModuleDict({"net": small_net(), "attention": nn.MultiheadAttention(4, 2), "rnn": nn.GRU(2, 2)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    params = fe.batchensemble_params(model, 3, bias="stacked", layers=["net.0", "attention*", "rnn"])
    biases = {name for name in params.stacked if not name.endswith(("_r", "_s"))}
    attention = {"attention.in_proj_bias", "attention.out_proj.bias"}
    assert biases == {"net.0.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0"} | attention
    assert all(torch.equal(member, model.get_parameter(name)) for name in biases for member in params.stacked[name])
    assert "net.1.bias" in params.shared and "net.3.bias" in params.shared


def test_without_base_weights_everything_is_drawn_afresh() -> None:
    model = small_net()
    params = fe.batchensemble_params(model, 3, use_base_weights=False, bias="stacked", stacked="3.weight")
    assert not torch.equal(params.shared["0.weight"], model.get_parameter("0.weight"))
    assert params.shared["0.weight"].abs().max() <= 3**-0.5
    assert not torch.equal(params.stacked["3.weight"][0], params.stacked["3.weight"][1])
    bias = params.stacked["0.bias"]
    assert torch.equal(bias[0], bias[1]) and not torch.equal(bias[0], model.get_parameter("0.bias"))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_dtype_follows_the_model_and_numbers_are_the_same_in_each(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 4).to(dtype)
    for params in (fe.ensemble_params(model, 2, reset=False), fe.batchensemble_params(model, 2, generator=source())):
        assert all(tensor.dtype == dtype and tensor.requires_grad for tensor in tensors_of(params).values())
    exact = fe.batchensemble_params(nn.Linear(3, 4).double(), 2, generator=source()).stacked["weight_r"]
    assert torch.equal(params.stacked["weight_r"], exact.to(dtype))


# --------------------------------------------------------------------------------------------------------------------
# Memory, ties, frozen parts, integers


@pytest.mark.parametrize("name", MODELS)
def test_params_own_their_memory_and_the_model_is_untouched(name: str) -> None:
    model = model_case(name).model
    before = snapshot(model)
    for params in (
        _quietly(fe.ensemble_params, model, 2),
        fe.ensemble_params(model, 1, reset=False),
        fe.ensemble_params(model, 1, reset=False, stacked=[next(iter(dict(model.named_parameters())))]),
        fe.batchensemble_params(model, 1, bias="stacked"),
        _quietly(fe.batchensemble_params, model, 2, use_base_weights=False),
    ):
        tensors = list(tensors_of(params).values())
        assert not any(_overlap(a, b) for i, a in enumerate(tensors) for b in [*model.parameters(), *tensors[:i]])
    buffers = fe.ensemble_buffers(model, 1)
    assert not any(_overlap(a, b) for a in buffers.values() for b in model.buffers())
    assert_untouched(before, model)


def test_tied_parameters_are_one_leaf() -> None:
    model = Tied()
    assert "score.weight" not in tensors_of(fe.ensemble_params(model, 2))
    stacked = fe.batchensemble_params(model, 2).stacked
    assert {"embed.weight_r", "embed.weight_s"} <= set(stacked) and "score.weight_r" not in stacked
    assert set(fe.batchensemble_params(model, 2, layers="score").stacked) == {"embed.weight_r", "embed.weight_s"}
    assert set(fe.ensemble_params(model, 2, stacked="score.weight").stacked) == {"embed.weight"}
    layer = nn.Linear(2, 2)
    twice = nn.ModuleDict({"first": layer, "second": layer})
    assert set(fe.ensemble_params(twice, 2, stacked="second.*").stacked) == {"first.weight", "first.bias"}
    assert set(fe.batchensemble_params(twice, 2, layers="second").stacked) == {"first.weight_r", "first.weight_s"}


def test_frozen_parameters_stay_in_and_stay_frozen() -> None:
    model = small_net()
    model[0].requires_grad_(False)
    classic, be = fe.ensemble_params(model, 2), fe.batchensemble_params(model, 2)
    assert not classic.stacked["0.weight"].requires_grad and classic.stacked["3.weight"].requires_grad
    assert not be.shared["0.bias"].requires_grad
    assert be.stacked["0.weight_r"].requires_grad and be.stacked["0.weight_s"].requires_grad


def test_integer_parameters_are_left_as_they_are() -> None:
    model = nn.Linear(2, 3)
    model.codes = nn.Parameter(torch.arange(6).reshape(2, 3), requires_grad=False)
    for params in (fe.ensemble_params(model, 2), fe.ensemble_params(model, 2, reset=lambda: model)):
        assert all(torch.equal(codes, model.codes) for codes in params.stacked["codes"])
    be = fe.batchensemble_params(model, 2)
    assert torch.equal(be.shared["codes"], model.codes) and "codes_r" not in be.stacked
    assert not be.shared["codes"].requires_grad
    fresh = fe.batchensemble_params(model, 2, use_base_weights=False)
    assert torch.equal(fresh.shared["codes"], model.codes)
    x = torch.ones(1, 2)
    assert fe.make_forward(model)(be, x).shape == (2, 1, 3)


class _Quantised(nn.Module):
    """A linear layer, and after it a quantised weight: a parameter that no one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        weight = torch.quantize_per_tensor(torch.rand(4, 3), 0.1, 0, torch.qint8)
        self.quantised = nn.Linear(3, 4, bias=False)
        self.quantised.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.quantised.weight.dequantize().T


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights_are_left_as_they_are() -> None:
    model, x = _Quantised(), torch.ones(1, 2)
    classic, fresh = fe.ensemble_params(model, 2, stacked="layer.*"), fe.ensemble_params(model, 2)
    be = fe.batchensemble_params(model, 2)
    assert set(be.stacked) == {"layer.weight_r", "layer.weight_s"}
    for params in (classic, be):
        assert torch.equal(params.shared["quantised.weight"], model.quantised.weight)
        assert_same(fe.make_forward(model)(params, x), loop(model, params, x))
    assert torch.equal(fresh.shared["quantised.weight"], model.quantised.weight)


def test_buffers_are_stacked() -> None:
    model = small_net()
    model.register_buffer("mask", torch.tensor([True, False]), persistent=False)
    buffers = fe.ensemble_buffers(model, 3)
    assert {name: (tuple(b.shape), b.dtype) for name, b in buffers.items()} == {
        "mask": ((3, 2), torch.bool),
        "1.running_mean": ((3, 4), torch.float32),
        "1.running_var": ((3, 4), torch.float32),
        "1.num_batches_tracked": ((3,), torch.int64),
    }
    assert all(torch.equal(member, model.get_buffer(name)) for name, stack in buffers.items() for member in stack)
    assert fe.ensemble_buffers(nn.Linear(2, 2), 3) == {}


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("make", [fe.ensemble_params, fe.batchensemble_params, fe.ensemble_buffers])
@pytest.mark.parametrize(
    ("E", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("3", TypeError), (None, TypeError)],
)
def test_E_must_be_a_positive_int(make: Any, E: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"E: expected a positive int, got {E!r}"):
        make(small_net(), E)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "gaussian"}, ValueError, "init: expected one of .*'random_sign'.* got 'gaussian'"),
        ({"bias": True}, ValueError, "bias: expected one of .*'shared', 'stacked'.* got True"),
        ({"r_std": -0.1}, ValueError, r"r_std: expected a finite number >= 0, got -0\.1"),
        ({"s_std": float("nan")}, ValueError, "s_std: expected a finite number >= 0, got nan"),
        ({"r_mean": float("inf")}, ValueError, "r_mean: expected a finite number, got inf"),
        ({"s_mean": "1"}, TypeError, "s_mean: expected a finite number, got '1'"),
        ({"use_base_weights": 1}, TypeError, "use_base_weights: expected True or False, got 1"),
        ({"generator": 0}, TypeError, "generator: expected a torch.Generator or None, got 0"),
        ({"stacked": 3}, TypeError, "stacked: expected a name pattern"),
        ({"stacked": "4.*"}, ValueError, r"stacked: pattern '4.\*' matches none of \['0.weight'"),
        ({"layers": []}, ValueError, "layers, stacked: nothing in Sequential"),
        ({"layers": lambda name, module: False}, ValueError, "layers, stacked: nothing in Sequential"),
    ],
)
def test_bad_options_of_batchensemble_params(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small_net()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        fe.batchensemble_params(model, 2, **options)
    assert_untouched(before, model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reset": "yes"}, ValueError, "reset: pattern 'yes' matches none of"),
        ({"reset": ["0.*", "9"]}, ValueError, "reset: pattern '9' matches none of"),
        ({"reset": nn.Linear(3, 2)}, TypeError, "reset: expected True, False, a name pattern, .* got Linear"),
        ({"reset": 1}, TypeError, "reset: expected True, False, a name pattern, .* got 1"),
        ({"stacked": nn.Linear}, TypeError, "stacked: expected a name pattern, a list of patterns or a predicate"),
        ({"stacked": []}, ValueError, r"stacked: chooses no parameter of the model, got \[\]"),
        ({"stacked": ["0.*", "9"]}, ValueError, "stacked: pattern '9'"),
        ({"generator": 0}, TypeError, "generator: expected a torch.Generator or None, got 0"),
    ],
)
def test_bad_options_of_ensemble_params(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fe.ensemble_params(small_net(), 2, **options)


def test_nothing_to_vary_is_an_error() -> None:
    with pytest.raises(ValueError, match="layers, stacked: nothing in LayerNorm would get r and s or be stacked"):
        fe.batchensemble_params(nn.LayerNorm(3), 2)


def test_a_name_that_r_or_s_would_take_is_an_error() -> None:
    model = nn.Linear(2, 2)
    model.weight_r = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="already has a parameter named weight_r; leave weight out"):
        fe.batchensemble_params(model, 2)
    assert fe.ensemble_params(model, 2, reset=False).stacked["weight_r"].shape == (2, 2)


def test_matrices_in_lists_and_dicts_get_r_and_s() -> None:
    names = {name[:-2] for name in fe.batchensemble_params(Matrices(), 2).stacked}
    assert names == {"matrix", "many.0", "many.1", "named.a"}


def _by_inference() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    return {
        "ensemble_params": lambda: fe.ensemble_params(model, 2, generator=source()),
        "copies": lambda: fe.ensemble_params(model, 2, reset=False),
        "batchensemble_params": lambda: fe.batchensemble_params(model, 2, generator=source()),
        "fresh base": lambda: fe.batchensemble_params(model, 2, use_base_weights=False, generator=source()),
        "stack_params": lambda: fe.stack_params([model, model]),
        "ensemble_buffers": lambda: fe.EnsembleParams({}, fe.ensemble_buffers(model, 2)),
    }


@pytest.mark.parametrize("name", _by_inference())
def test_what_is_made_in_inference_mode_can_be_trained_afterwards(name: str) -> None:
    make = _by_inference()[name]
    torch.manual_seed(0)
    want = make()
    torch.manual_seed(0)
    with torch.inference_mode():
        got = make()
    assert not any(tensor.is_inference() for tensor in tensors_of(got).values())
    assert [t.requires_grad for t in tensors_of(got).values()] == [t.requires_grad for t in tensors_of(want).values()]
    assert {name: tensor.shape for name, tensor in tensors_of(got).items()} == {
        name: tensor.shape for name, tensor in tensors_of(want).items()
    }


def test_a_forward_made_in_inference_mode_trains_afterwards_and_one_used_in_it_too() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.ones(5, 3).double(), 0
    params = fe.ensemble_params(model, 2)
    with torch.inference_mode():
        forward = fe.make_forward(model)
        want = forward(params, x)
    optimizer = torch.optim.SGD(tensors_of(params).values(), lr=0.1)
    step = fe.make_train_step(forward, lambda out, y: out.square().mean(), optimizer, compile=False)
    assert_same(forward(params, x), want)
    step(params, x, torch.tensor(y))
    with torch.inference_mode():
        frozen = params._replace(stacked={name: tensor.clone() for name, tensor in params.stacked.items()})
        assert_same(forward(frozen, x), forward(params, x))
        with pytest.raises(ValueError, match=r"no gradient.*inference_mode"):
            step(params, x.clone(), torch.tensor(y))
    assert_same(forward(frozen, x).detach(), forward(params, x).detach())
    with pytest.raises(ValueError, match=r"params: 0.weight was made under torch.inference_mode\(\)"):
        fe.make_train_step(
            forward, lambda out, y: out.square().mean(), torch.optim.SGD(tensors_of(frozen).values()), compile=False
        )(frozen, x, torch.tensor(y))
