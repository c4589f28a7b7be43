"""What a model is made of, and what cannot be made an ensemble."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functorch_ens as fe


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
        (nn.Linear, TypeError, "model: expected a torch.nn.Module, got <class"),
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
