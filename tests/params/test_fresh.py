"""Fresh weights: reset_parameters, factories, and the generator."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import small_net, source
from oracle import tensors_of
from torch import nn

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
    stacked = fe.ensemble_params(model, 8).stacked
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
