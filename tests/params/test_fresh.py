"""Fresh weights: reset_parameters, factories, and the generator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import small_net, source
from oracle import tensors_of
from sklearn.datasets import load_digits
from torch import nn
from zoo_written import Tied

import functorch_ens as fe


def test_a_default_device_changes_nothing() -> None:
    model = small_net()
    want = fe.ensemble_params(model, 2, generator=source()), fe.batchensemble_params(model, 2, generator=source())
    with torch.device("meta"):
        got = fe.ensemble_params(model, 2, generator=source()), fe.batchensemble_params(model, 2, generator=source())
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(tensor, tensors_of(theirs)[name]) for name, tensor in tensors_of(mine).items())


def test_reset_draws_as_reset_parameters_does() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50), nn.Embedding(30, 40, padding_idx=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    stacked = fe.ensemble_params(model, 8, reset="*").stacked
    weight = stacked["0.weight"]  # uniform in +-1/sqrt(in): standard deviation 1/sqrt(3 in)
    assert weight.abs().max() <= 0.1 and weight.std(unbiased=False).item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert stacked["0.bias"].abs().max() <= 0.1
    assert torch.equal(stacked["1.weight"], torch.ones(8, 50)) and torch.equal(stacked["1.bias"], torch.zeros(8, 50))
    assert not stacked["2.weight"][:, 3].any() and stacked["2.weight"].std().item() == pytest.approx(1, rel=0.05)


def test_reset_uses_torchs_underscored_ones_after_the_inner_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacked = fe.ensemble_params(nn.MultiheadAttention(4, 2), 3).stacked
    assert not torch.equal(stacked["in_proj_weight"][0], stacked["in_proj_weight"][1])
    assert not stacked["out_proj.bias"].any()  # as its constructor leaves it: zero


def test_reset_copies_what_nothing_initialises_and_says_so_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4))
            self.layer = nn.Linear(4, 2)
            self.part = _Part()

    class _Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(6.0).reshape(2, 3))

        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.table[0].normal_()

    model = Net()
    with pytest.warns(UserWarning, match=r"no reset_parameters initialises \['token', 'part.table'\]") as caught:
        stacked = fe.ensemble_params(model, 5).stacked
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(torch.equal(token, model.token) for token in stacked["token"])
    assert all(torch.equal(table[1], model.part.table[1]) for table in stacked["part.table"])
    assert not torch.equal(stacked["part.table"][0, 0], stacked["part.table"][1, 0])


def test_a_factory_keeps_what_the_constructor_does() -> None:
    def factory() -> nn.Module:
        model = small_net()
        nn.init.constant_(model.get_parameter("3.weight"), 0.25)
        return model

    params = fe.ensemble_params(small_net(), 3, reset=factory)
    assert torch.equal(params.stacked["3.weight"], torch.full((3, 2, 4), 0.25))
    assert not torch.equal(params.stacked["0.weight"][0], params.stacked["0.weight"][1])


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (lambda: 3, TypeError, "reset: expected a factory that returns a torch.nn.Module, it returned 3"),
        (lambda: nn.Linear(3, 4), ValueError, r"reset.*missing \['0.weight'.*unexpected \['weight', 'bias'\]"),
        (
            lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
            ValueError,
            r"reset: the shapes.*0.weight: \[4, 3\] != \[5, 3\]",
        ),
    ],
)
def test_a_factory_of_other_models_is_an_error(factory: Any, error: type[Exception], message: str) -> None:
    model, before = small_net(), torch.get_rng_state()
    with pytest.raises(error, match=message):
        fe.ensemble_params(model, 2, reset=factory, generator=source())
    assert torch.equal(before, torch.get_rng_state())


def test_reset_false_copies() -> None:
    model = small_net()
    params = fe.ensemble_params(model, 3, reset=False)
    for name, parameter in model.named_parameters():
        assert all(torch.equal(member, parameter) for member in params.stacked[name])


# --------------------------------------------------------------------------------------------------------------------
# What is kept, and what is told


@pytest.mark.parametrize("stacked", [None, "[02].*"])
def test_a_pattern_draws_what_it_names_alone(stacked: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for pattern in ("2.*", ["2.weight", "2.bias"]):
        params = fe.ensemble_params(model, 3, reset=pattern, stacked=stacked)
        for name in ("0.weight", "0.bias"):
            assert all(torch.equal(member, model.get_parameter(name)) for member in params.stacked[name])
        for name in ("2.weight", "2.bias"):
            members = [model.get_parameter(name), *params.stacked[name]]
            assert not any(torch.equal(a, b) for i, a in enumerate(members) for b in members[:i])
    whole = fe.ensemble_params(model, 3, generator=source()).stacked["2.weight"]
    assert torch.equal(fe.ensemble_params(model, 3, reset="2.*", generator=source()).stacked["2.weight"], whole)


def test_a_pattern_names_tied_parameters_by_every_name() -> None:
    model = Tied()
    for pattern in ("embed.weight", "score.weight"):
        stacked = fe.ensemble_params(model, 2, reset=pattern).stacked["embed.weight"]
        assert not torch.equal(stacked[0], stacked[1])


def test_what_is_frozen_is_kept_unless_it_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    nn.init.constant_(model.get_parameter("0.weight"), 7.0)
    model[0].requires_grad_(False)
    for params in (fe.ensemble_params(model, 2), fe.batchensemble_params(model, 2, use_base_weights=False)):
        tensors = tensors_of(params)
        assert (tensors["0.weight"] == 7).all() and not tensors["0.weight"].requires_grad
        assert all(torch.equal(bias, model.get_parameter("0.bias")) for bias in tensors["0.bias"].reshape(-1, 30))
    asked = fe.ensemble_params(model, 2, reset="0.weight").stacked["0.weight"]
    assert not (asked == 7).any() and not torch.equal(asked[0], asked[1]) and not asked.requires_grad

    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))

    with pytest.warns(UserWarning, match=r"values of \['0.weight', '0.bias'\] are lost: they are frozen") as told:
        fe.ensemble_params(model, 2, reset=factory)
    assert len(told) == 1 and told[0].filename == __file__


def _trained(model: nn.Module) -> nn.Module:
    """`model` after some steps of training on digits."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in torch.randperm(len(x), generator=source()).repeat(3)[:4800].split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(x[i].float() / 16), y[i]).backward()
        optimizer.step()
    return model


def test_pretrained_weights_that_are_drawn_anew_are_told() -> None:
    torch.manual_seed(0)
    model = _trained(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)))
    for make in (fe.ensemble_params, lambda m, E: fe.batchensemble_params(m, E, use_base_weights=False)):
        with pytest.warns(UserWarning, match="are lost: they are far from a fresh draw") as told:
            make(model, 2)
        assert len(told) == 1 and "'1.weight'" in str(told[0].message) and "'3.weight'" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.ensemble_params(model, 2, reset=False)
        fe.ensemble_params(model, 2, reset="3.*")
        fe.ensemble_params(model, 2, stacked="3.bias")
        fe.batchensemble_params(model, 2)


LARGE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Linear(200, 10)),
    "conv": lambda: nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ConvTranspose2d(64, 8, 3), nn.PReLU(64)),
    "embedding": lambda: nn.ModuleList([nn.Embedding(500, 40, padding_idx=0), nn.EmbeddingBag(200, 30)]),
    "attention": lambda: nn.TransformerDecoderLayer(64, 4, 128),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(40, 50, 2), nn.GRUCell(40, 50), nn.RNN(40, 50)]),
    "bilinear": lambda: nn.Bilinear(20, 30, 40),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_model_is_not_taken_for_a_pretrained_one(name: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        fe.ensemble_params(LARGE[name]().to(dtype), 2)  # a warning would be an error here


class _Decay(nn.Module):
    """A weight whose start differs along its last axis, and has no randomness, as in state space models."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.empty(512, 16))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.rates.copy_(torch.arange(1.0, 17.0).expand(512, 16))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize(
    "make",
    [_Decay, lambda: nn.Linear(0, 2), lambda: nn.Linear(4, 0), lambda: nn.Embedding(0, 3)],
    ids=["in place", "no inputs", "no outputs", "no words"],
)
def test_odd_weights_are_no_false_alarm(make: Callable[[], nn.Module]) -> None:
    for E in (2, 4):
        assert fe.ensemble_params(make(), E).E == E


def test_a_pattern_of_what_is_shared_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"reset: \['1.weight', '1.bias'\] are shared by all members"):
        fe.ensemble_params(model, 2, reset="1.*", stacked="0.*")
