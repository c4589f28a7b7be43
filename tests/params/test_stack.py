"""stack_params, stack_buffers and member_params: from separate models to an ensemble and back."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from cases import MODELS, Case, fast_layers, members, model_case, randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, assert_untouched, gradients, loop, member_weights, snapshot
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from zoo_written import Tied

import functorch_ens as fe


def _different(model: nn.Module, E: int) -> list[nn.Module]:
    """E copies of `model` with parameters and statistics of their own."""
    models = [copy.deepcopy(model) for _ in range(E)]
    with torch.no_grad():
        for each in models:
            for tensor in [*each.parameters(), *each.buffers()]:
                if tensor.is_floating_point():
                    tensor += torch.rand_like(tensor)
    return models


@pytest.mark.parametrize("name", MODELS)
def test_stacked_models_give_their_own_outputs(name: str) -> None:
    case = model_case(name)
    models = _different(case.model, 3)
    before = snapshot(*models)
    params, buffers = fe.stack_params(models), fe.stack_buffers(models)
    assert params.shared == {} and all(leaf.is_leaf and leaf.requires_grad for leaf in params.stacked.values())
    got, _ = fe.make_forward(case.model)(params, *case.args, buffers=buffers)
    for i, model in enumerate(models):
        assert_same([leaf[i] for leaf in tree_leaves(got)], tree_leaves(model(*case.args)))
    assert_untouched(before, *models)
    states = [model.state_dict() for model in models]
    again = fe.stack_params(states, model=case.model)
    assert again.stacked.keys() == params.stacked.keys()
    assert_same(again, params, tolerance=0.0)
    assert_same(fe.stack_buffers(states, model=case.model), buffers, tolerance=0.0)


def test_state_dicts_without_buffers_need_no_model() -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    params = fe.stack_params([model.state_dict() for model in models])
    assert_same(params, fe.stack_params(models), tolerance=0.0)
    assert all(leaf.requires_grad for leaf in params.stacked.values())


def test_frozen_parts_stay_frozen() -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        model.bias.requires_grad_(False)
    for params in (
        fe.stack_params(models),
        fe.stack_params([model.state_dict() for model in models], model=models[0]),
    ):
        assert params.stacked["weight"].requires_grad and not params.stacked["bias"].requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_member_params_make_an_ordinary_network(name: str) -> None:
    case = model_case(name)
    for params in (fe.stack_params(_different(case.model, 2)), fe.batchensemble_params(case.model, 2)):
        outputs = fe.make_forward(case.model)(params, *case.args)
        for i in range(2):
            network = copy.deepcopy(case.model)
            weights = fe.member_params(case.model, params, i)
            network.load_state_dict(weights, strict=not dict(case.model.named_buffers()))
            assert_same(tree_leaves(network(*case.args)), [leaf[i] for leaf in tree_leaves(outputs)])


@given(case=fast_layers, E=members, i=st.integers(0, 3), bias=st.sampled_from(["shared", "stacked"]))
def test_member_params_are_the_effective_weights(case: Case, E: int, i: int, bias: str) -> None:
    i %= E
    params = fe.batchensemble_params(case.model, E, bias=bias)
    got = fe.member_params(case.model, params, i)
    assert_same(got, member_weights(case.model, params, i), tolerance=1e-15)
    memory = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(params)}
    assert not any(weight.untyped_storage().data_ptr() in memory for weight in got.values())


def test_gradients_flow_through_member_params() -> None:
    case = model_case("tied")
    params = fe.batchensemble_params(case.model, 2)

    def by_members(p: fe.EnsembleParams) -> Any:
        each = [
            functional_call(copy.deepcopy(case.model), fe.member_params(case.model, p, i), case.args) for i in range(2)
        ]
        return torch.stack(each)

    want = gradients(partial(loop, case.model), params, *case.args)
    assert_same(gradients(by_members, params), want)


def test_one_classic_member_is_the_model_it_came_from() -> None:
    models = _different(Tied().double(), 3)
    params = fe.stack_params(models)
    for i, model in enumerate(models):
        assert_same(fe.member_params(models[0], params, i), dict(model.state_dict()), tolerance=0.0)


@pytest.mark.parametrize(
    ("i", "error", "message"),
    [
        (2, ValueError, "i: expected 0 <= i < 2, got 2"),
        (-1, ValueError, "i: expected 0 <= i < 2, got -1"),
        (0.0, TypeError, r"i: expected an int, got 0\.0"),
        (True, TypeError, "i: expected an int, got True"),
    ],
)
def test_a_member_that_is_not_there(i: Any, error: type[Exception], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        fe.member_params(model, fe.batchensemble_params(model, 2), i)


def _frozen(model: nn.Linear) -> nn.Linear:
    model.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([], ValueError, "members: expected at least one"),
        (nn.Linear(2, 2), TypeError, "members: expected a list of modules or state_dicts, got Linear"),
        ([nn.Linear(2, 2), 3], TypeError, "members: expected modules or state_dicts, member 1 is int"),
        ([{"weight": 3}], TypeError, "member 0 is dict"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], ValueError, r"member 1: missing \['bias'\], unexpected \[\]"),
        ([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)], ValueError, r"member 1: missing \[\], unexpected \['bias'\]"),
        (
            [nn.Linear(2, 2), nn.Linear(3, 2), nn.Linear(2, 2).double()],
            ValueError,
            r"member 1: weight: shape \[2, 3\], member 0 has \[2, 2\].*member 2: weight: dtype torch.float64",
        ),
        ([nn.Linear(2, 2), _frozen(nn.Linear(2, 2))], ValueError, "member 1: weight: requires_grad False"),
        ([nn.BatchNorm1d(2).state_dict()], ValueError, r"model: got None.*buffers \(as \['running_mean'"),
    ],
)
def test_members_that_do_not_go_together(members: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fe.stack_params(members)


def test_state_dicts_of_another_model_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"state_dict 0 is not one of model: missing \['bias'\], unexpected \['extra'\]"
    ):
        fe.stack_params([{"weight": randn(2, 2), "extra": randn(1)}], model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: got None"):
        fe.stack_buffers([nn.BatchNorm1d(2).state_dict()])
