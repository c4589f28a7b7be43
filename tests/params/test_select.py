"""Name patterns, lists and predicates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import functorch_ens as fe
from functorch_ens.params.select import select

NAMES = {"net.0.weight": 1, "net.0.bias": 2, "head.weight": 3, "Head.weight": 4}


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("net.0.weight", {"net.0.weight"}),
        ("*.weight", {"net.0.weight", "head.weight", "Head.weight"}),
        ("net.?.*", {"net.0.weight", "net.0.bias"}),
        ("[hH]ead.*", {"head.weight", "Head.weight"}),
        ("head.*", {"head.weight"}),
        (["head.*", "net.0.bias"], {"head.weight", "net.0.bias"}),
        (("head.*",), {"head.weight"}),
        ([], set()),
        (lambda name, value: value > 2 and name.islower(), {"head.weight"}),
    ],
)
def test_select(selector: Any, chosen: set[str]) -> None:
    assert select(selector, NAMES, "stacked") == chosen


@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        ("tail.*", ValueError, r"stacked: pattern 'tail.\*' matches none of \['net.0.weight'"),
        (["head.*", "nothing"], ValueError, "stacked: pattern 'nothing'"),
        (5, TypeError, "stacked: expected a name pattern, a list of patterns or a predicate .* got 5"),
        (["head.*", 5], TypeError, r"got \['head.\*', 5\]"),
    ],
)
def test_what_selects_nothing_is_an_error(selector: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(selector, NAMES, "stacked")


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
