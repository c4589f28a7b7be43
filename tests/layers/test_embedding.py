"""Embedding and EmbeddingBag."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from oracle import assert_same, assert_untouched, both_kinds, gradients, loop, snapshot
from torch import nn

import functorch_ens as fe


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_does_not_renormalise_the_parameters(kind: type[nn.Module], strategy: str) -> None:
    model = kind(5, 3, max_norm=0.1).double()
    x = torch.tensor([[0], [2], [2]])
    for params in both_kinds(model, 2):
        before = snapshot(model, params)
        forward = fe.make_forward(model, strategy=strategy)
        y = forward(params, x)
        assert (y.norm(dim=-1) < 0.1 + 1e-6).all()
        assert_same(y, loop(model, params, x))
        assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
        assert_untouched(before, model, params)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_the_gradient_of_a_sparse_layer_is_dense(kind: Any) -> None:
    model, x = kind(5, 3, sparse=True).double(), torch.tensor([[0], [2], [2]])
    dense = kind(5, 3, _weight=model.weight).double()
    for params in both_kinds(model, 2):
        got = gradients(fe.make_forward(model, strategy="vmap"), params, x)
        assert all(slope.layout == torch.strided for slope in got.values())
        assert_same(got, gradients(partial(loop, dense), params, x))
    assert model.sparse
