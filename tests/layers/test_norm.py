"""Norms, and spectral norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import norm_net, randn
from oracle import assert_same, both_kinds, loop
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import functorch_ens as fe
from functorch_ens.layers.norm import NORMS, RUNNING_NORM

EVERY_NORM = [
    nn.BatchNorm2d(2),
    nn.InstanceNorm1d(2),
    nn.SyncBatchNorm(2),
    nn.LayerNorm(2),
    nn.GroupNorm(1, 2),
    nn.RMSNorm(2),
]


def test_norms_are_told_from_other_layers() -> None:
    assert all(isinstance(norm, NORMS) for norm in EVERY_NORM) and not isinstance(nn.Linear(2, 2), NORMS)
    assert [isinstance(norm, RUNNING_NORM) for norm in EVERY_NORM] == [True] * 3 + [False] * 3


def test_norms_have_no_r_and_s() -> None:
    model = nn.ModuleList([nn.Linear(4, 3), nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4))])
    assert set(fe.batchensemble_params(model, 2).stacked) == {"0.weight_r", "0.weight_s"}


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_batch_norm_keeps_the_statistics_of_every_member(momentum: float | None, strategy: str) -> None:
    model: Any = norm_net(nn.BatchNorm1d)
    model[1].momentum = momentum
    x = randn(5, 2, 6)
    for params in both_kinds(model, 3):
        buffers = fe.ensemble_buffers(model, 3)
        for _ in range(3):  # a plain average weighs the n-th batch by 1 / n
            want = loop(model, params, x, buffers=buffers)
            got = fe.make_forward(model, strategy=strategy)(params, x, buffers=buffers)
            assert_same(got, want)
            buffers = got[1]
    norm = model[1]
    params, buffers = fe.ensemble_params(norm, 2), fe.ensemble_buffers(norm, 2)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        fe.make_forward(norm, strategy=strategy)(params, randn(3), buffers=buffers)


def test_spectral_norm_equals_the_oracle_under_vmap() -> None:
    model, x = spectral_norm(nn.Linear(4, 3)).double().train(), randn(5, 4)
    for params in both_kinds(model, 2):
        buffers = fe.ensemble_buffers(model, 2)
        got = fe.make_forward(model, strategy="vmap")(params, x, buffers=buffers)
        assert_same(got, loop(model, params, x, buffers=buffers))
        name = "parametrizations.weight.0._u"
        assert not torch.equal(got[1][name][0], model.get_buffer(name))
