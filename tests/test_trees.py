"""Slices of members, and pytrees taken apart and rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from functorch_ens.trees import Static, members, take_apart


@dataclass(frozen=True)
class _Output:
    logits: Tensor
    name: str


def test_members_are_sliced_out_of_every_stacked_tensor() -> None:
    tree: Any = {"a": torch.arange(6.0).view(3, 2), "b": [torch.arange(3)]}
    one, some, two = members(tree, 1), members(tree, slice(1, 3)), members(tree, [2, 0])
    assert one["a"].tolist() == [2.0, 3.0] and one["b"][0].item() == 1
    assert some["a"].tolist() == [[2.0, 3.0], [4.0, 5.0]] and some["a"].data_ptr() == tree["a"][1].data_ptr()
    assert two["b"][0].tolist() == [2, 0]


def test_what_is_taken_apart_is_put_together_again() -> None:
    tree: Any = {"x": (torch.ones(2), None, 3), "y": [_Output(torch.zeros(1), "z")]}
    tensors, form = take_apart(tree)
    assert [tensor.shape for tensor in tensors] == [(2,), (1,)]
    again = form.rebuild(iter([tensor + 1 for tensor in tensors]))
    assert again["x"][0].tolist() == [2.0, 2.0] and again["x"][1:] == (None, 3)
    assert isinstance(again["y"][0], _Output) and again["y"][0].logits.tolist() == [1.0] and again["y"][0].name == "z"


def test_only_constants_may_stand_beside_tensors_in_an_output() -> None:
    take_apart({"a": torch.ones(1), "n": 1.5, "s": "text", "d": torch.float32}, constants_only=True)
    with pytest.raises(TypeError, match=r"output: expected tensors, numbers, text or None .* got object"):
        take_apart([object()], constants_only=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_value_passes_through_vmap_unchanged(compiled: bool) -> None:
    def call(x: Tensor) -> tuple[Tensor, Any]:
        doubled, static = vmap(lambda row: (2 * row, Static(("form", float("nan")))))(x)
        return doubled, static.value[0]

    function: Any = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
    doubled, value = function(torch.ones(3, 2))
    assert doubled.tolist() == [[2.0, 2.0]] * 3 and value == "form"
