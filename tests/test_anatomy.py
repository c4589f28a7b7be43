"""Anatomy: names, ties, layouts; and the models that cannot be made an ensemble."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import model_case
from torch import nn

import functorch_ens as fe
from functorch_ens._torch import common_base
from functorch_ens.anatomy import Anatomy


@pytest.mark.parametrize("where", ["list", "partial", "closure"])
def test_parameters_that_a_forward_cannot_replace_are_an_error(where: str) -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            layer = self.layer
            self.hidden = {
                "list": {"deep": [layer.weight]},
                "partial": partial(F.linear, weight=layer.weight),
                "closure": lambda x: layer(x),
            }[where]

    with pytest.raises(
        ValueError, match="model: Hiding '' keeps parameters or buffers of the model in its attribute 'hidden'"
    ):
        fe.make_forward(Hiding())


@pytest.mark.parametrize("make", [fe.ensemble_params, fe.batchensemble_params, fe.ensemble_buffers])
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet18", TypeError, "model: expected a torch.nn.Module, got 'resnet18'"),
        (nn.Linear, TypeError, "model: expected a torch.nn.Module, got the class"),
        (nn.ReLU(), ValueError, "model: ReLU has no parameters"),
        (
            nn.Sequential(nn.LazyLinear(3)),
            ValueError,
            r"lazy parameters.*\['0.weight', '0.bias'\]; call the model once",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_models_that_cannot_be_made_an_ensemble(make: Any, model: Any, error: type[Exception], message: str) -> None:
    for call in (lambda: make(model, 2), lambda: fe.make_forward(model)):
        with pytest.raises(error, match=message):
            call()


def test_torchscript_is_an_error() -> None:
    with warnings.catch_warnings(action="ignore"):
        scripted: Any = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: '0' is a RecursiveScriptModule"):
        fe.make_forward(nn.Sequential(scripted, nn.Linear(2, 2)))


def test_names_and_shapes_are_in_the_order_of_the_model() -> None:
    model = model_case("convnet, batch norm").model
    found = Anatomy(model)
    assert found.model is model and found.kind == "Sequential"
    own, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert list(found.parameters) == list(found.sites) == list(found.shapes) == list(own)
    assert list(found.buffers) == list(found.buffer_sites) == list(found.buffer_shapes) == list(buffers)
    assert all(found.parameters[name] is own[name] and found.shapes[name] == tuple(own[name].shape) for name in own)
    assert all(found.buffer_sites[name][0].buffer is buffers[name] for name in buffers)
    assert list(found.modules.items()) == list(model.named_modules())
    assert list(found.instances(nn.Linear)) == ["4"] and list(found.instances(nn.BatchNorm2d)) == ["1"]


def test_a_tied_parameter_has_one_name_and_all_its_sites() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": shared, "third": nn.Linear(3, 3), "words": nn.Embedding(3, 3)})
    model["third"].weight = shared.weight
    model["words"].weight = shared.weight
    found = Anatomy(model)
    assert [site.name for site in found.sites["first.weight"]] == ["first.weight", "third.weight", "words.weight"]
    assert [site.name for site in found.sites["first.bias"]] == ["first.bias"]  # one module is one site
    assert list(found.parameters) == ["first.weight", "first.bias", "third.bias"]
    assert found.names == {
        **{"first.weight": "first.weight", "first.bias": "first.bias"},
        **{"second.weight": "first.weight", "second.bias": "first.bias"},
        **{"third.weight": "first.weight", "third.bias": "third.bias", "words.weight": "first.weight"},
    }
    assert found.weights == {layer: {"weight": "first.weight"} for layer in (shared, model["third"], model["words"])}
    # The first layer decides how r and s run over the weight.
    assert found.layouts == {"first.weight": fe.Layout()}
    assert found.layouts_of(model["words"]) == {"weight": fe.Layout()} and found.layouts_of(model) == {}


def test_layouts_and_vectors_are_those_of_the_layers() -> None:
    model = nn.ModuleDict(
        {"up": nn.ConvTranspose1d(4, 6, 2, groups=2), "words": nn.Embedding(5, 3), "norm": nn.LayerNorm(2)}
    )
    model.scale = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    found = Anatomy(model)
    assert found.layouts == {"up.weight": fe.Layout(2, transposed=True), "words.weight": fe.Layout(transposed=True)}
    assert found.vectors == {"up.weight_r": (6,), "up.weight_s": (4,), "words.weight_r": (3,), "words.weight_s": (5,)}


def test_a_weight_whose_vectors_would_take_the_name_of_a_parameter_has_no_layout() -> None:
    model = nn.Linear(2, 2)
    model.weight_r = nn.Parameter(torch.ones(2))
    found = Anatomy(model)
    assert found.layouts == {} == found.vectors and found.layouts_of(model) == {}


def test_the_kind_is_that_of_the_model_as_it_was_written() -> None:
    compiled: Any = torch.compile(nn.Linear(2, 2))
    assert Anatomy(compiled).kind == Anatomy(nn.Linear(2, 2)).kind == "Linear"


def test_common_base_finds_torchs_private_bases() -> None:
    assert common_base(nn.Linear) is nn.Linear
    assert common_base(nn.Linear, nn.ReLU) is nn.Module
    assert common_base(nn.LSTM, nn.GRU) is nn.RNNBase
    for first, second, third, other in (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Conv1d),
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d),
        (nn.BatchNorm1d, nn.InstanceNorm1d, nn.InstanceNorm3d, nn.GroupNorm),
    ):
        base = common_base(first, second)
        assert base is not nn.Module and issubclass(third, base) and not issubclass(other, base)
