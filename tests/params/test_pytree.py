"""Parameters and buffers that are not the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import norm_net, randn
from oracle import assert_untouched, snapshot
from torch import nn

import functorch_ens as fe


def _bad_params(change: str) -> Any:
    good = fe.batchensemble_params(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3)
    shared: Any
    stacked: Any
    shared, stacked = dict(good.shared), dict(good.stacked)
    match change:
        case "a plain dict":
            return shared
        case "nothing stacked":
            stacked = {}
        case "missing":
            del shared["1.bias"]
        case "unexpected":
            shared["2.weight"] = torch.ones(2, 2)
        case "no tensor":
            shared["1.bias"] = 3.0
        case "no dicts":
            shared = None
        case "r without s":
            del stacked["0.weight_s"]
        case "A without B":
            stacked["0.weight_lora_A"] = torch.ones(3, 2, 3)
        case "two ranks":
            stacked |= {"0.weight_lora_A": torch.ones(3, 2, 3), "0.weight_lora_B": torch.ones(3, 4, 1)}
        case "rank 0":
            stacked |= {"0.weight_lora_A": torch.ones(3, 0, 3), "0.weight_lora_B": torch.ones(3, 4, 0)}
        case "a wrong side":
            stacked |= {"0.weight_lora_A": torch.ones(3, 2, 4), "0.weight_lora_B": torch.ones(3, 4)}
        case "twice":
            stacked["0.bias"] = torch.ones(3, 4)
        case "member axis":
            stacked["1.weight_r"] = torch.ones(2, 2)
        case "no member axis":
            stacked = {name: stack[0, 0] for name, stack in stacked.items()}
        case "transposed":
            shared["0.weight"] = shared["0.weight"].T
    return fe.EnsembleParams(shared, stacked)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("a plain dict", TypeError, "params: expected EnsembleParams.*got dict"),
        ("nothing stacked", ValueError, "params: nothing is stacked"),
        ("missing", ValueError, r"params.*missing \['1.bias'\], unexpected \[\]"),
        ("unexpected", ValueError, r"params.*missing \[\], unexpected \['2.weight'\]"),
        ("no tensor", TypeError, r"params: expected tensors, got \{'1.bias': 'float'\}"),
        ("no dicts", TypeError, "params: expected EnsembleParams of two dicts, got NoneType and dict"),
        (
            "r without s",
            ValueError,
            r"params: r and s come in pairs.*one is missing of \[\('0.weight_r', '0.weight_s'\)\]",
        ),
        ("A without B", ValueError, r"params: r and s come in pairs, and so do lora_A and lora_B.*\('0.weight_lora_A'"),
        ("two ranks", ValueError, r"0.weight_lora_A, 0.weight_lora_B: expected one rank of 1 or more, got 2 and 1"),
        ("rank 0", ValueError, r"0.weight_lora_A, 0.weight_lora_B: expected one rank of 1 or more, got 0 and 0"),
        (
            "a wrong side",
            ValueError,
            r"A: expected \[3, rank, 3\], got \[3, 2, 4\]; .*B: expected \[3, 4, rank\], got \[3, 4\]",
        ),
        ("twice", ValueError, r"params: both shared and stacked: \['0.bias'\]"),
        ("member axis", ValueError, r"params: wrong shape.*1.weight_r: expected \[3, 2\], got \[2, 2\]"),
        ("no member axis", ValueError, r"params: 0.weight_r: expected a leading member axis"),
        ("transposed", ValueError, r"params: wrong shape: 0.weight: expected \[4, 3\], got \[3, 4\]"),
    ],
)
def test_parameters_that_do_not_fit(change: str, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fe.make_forward(model)(_bad_params(change), torch.ones(1, 3))
    with pytest.raises(error, match=message):
        fe.member_params(model, _bad_params(change), 0)
    assert_untouched(before, model)


def test_parameters_of_another_model_are_named() -> None:
    params = fe.ensemble_params(nn.ModuleDict({"head": nn.Linear(2, 2)}), 2)
    with pytest.raises(
        ValueError, match=r"Linear.*missing \['weight', 'bias'\], unexpected \['head.weight', 'head.bias'\]"
    ):
        fe.make_forward(nn.Linear(2, 2))(params, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ([], TypeError, "buffers: expected a dict.*got list"),
        ({}, ValueError, r"buffers.*missing \['1.running_mean'"),
        ({"x": torch.ones(2)}, ValueError, r"unexpected \['x'\]"),
        (
            "one member",
            ValueError,
            r"buffers: wrong shape with a leading member axis of 2: 1.running_mean: expected \[2, 3\], got \[1, 3\]",
        ),
    ],
)
def test_buffers_that_do_not_fit(buffers: Any, error: type[Exception], message: str) -> None:
    model = norm_net(nn.BatchNorm1d)
    if buffers == "one member":
        buffers = fe.ensemble_buffers(model, 1)
    with pytest.raises(error, match=message):
        fe.make_forward(model)(fe.ensemble_params(model, 2), randn(4, 2, 6), buffers=buffers)
