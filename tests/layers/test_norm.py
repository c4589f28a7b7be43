"""Norms, and spectral norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import norm_net, randn
from oracle import assert_same, both_kinds, loop
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_leaves as leaves

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


NORM_CASES = [
    (nn.BatchNorm1d, (), {}),
    (nn.BatchNorm1d, (7,), {"momentum": None}),
    (nn.BatchNorm2d, (3, 4), {}),
    (nn.BatchNorm2d, (3, 4), {"affine": False, "eps": 0.1}),
    (nn.BatchNorm2d, (3, 4), {"momentum": 0.7, "eps": 1e-8}),
    (nn.BatchNorm2d, (3, 4), {"track_running_stats": False}),
    (nn.BatchNorm3d, (2, 3, 2), {"momentum": None, "affine": False}),
]


@pytest.mark.compile
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "places", "options"), NORM_CASES)
def test_compiled_batch_norm_equals_the_loop(kind: Any, places: tuple[int, ...], options: Any, training: bool) -> None:
    """Compiled code has a BatchNorm of its own: outputs, gradients of all that is trained, and new statistics."""
    model = nn.Sequential(nn.Linear(places[-1] if places else 3, places[-1] if places else 3), kind(3, **options))
    model = model.double().train(training)
    x = randn(5, 3, *places)
    for params in both_kinds(model, 2):
        forward, buffers = fe.make_forward(model, strategy="vmap"), fe.ensemble_buffers(model, 2)
        found = []
        for called in (torch.compile(forward, backend="aot_eager", fullgraph=True), partial(loop, model)):
            out, new = called(params, x, buffers=buffers)
            slopes = torch.autograd.grad(
                (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum(), leaves(params)
            )
            found.append((out, new, slopes))
        assert_same(found[0], found[1])


def test_compiled_batch_norm_computes_its_statistics_in_float32() -> None:
    norm, x = nn.BatchNorm2d(2).train(), (randn(4, 2, 9, 9) * 0.1 + 5).bfloat16()
    params, buffers = fe.ensemble_params(norm, 2), fe.ensemble_buffers(norm, 2)
    forward = fe.make_forward(norm)
    got, new = torch.compile(forward, backend="eager", fullgraph=True)(params, x, buffers=buffers)
    want, old = forward(params, x, buffers=buffers)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(new, old)


def test_compiled_batch_norm_refuses_a_single_value() -> None:
    norm = nn.BatchNorm1d(3).train()
    params, buffers = fe.ensemble_params(norm, 2), fe.ensemble_buffers(norm, 2)
    compiled = torch.compile(fe.make_forward(norm), backend="eager")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        compiled(params, torch.ones(1, 3), buffers=buffers)


def test_spectral_norm_equals_the_oracle_under_vmap() -> None:
    model, x = spectral_norm(nn.Linear(4, 3)).double().train(), randn(5, 4)
    for params in both_kinds(model, 2):
        buffers = fe.ensemble_buffers(model, 2)
        got = fe.make_forward(model, strategy="vmap")(params, x, buffers=buffers)
        assert_same(got, loop(model, params, x, buffers=buffers))
        name = "parametrizations.weight.0._u"
        assert not torch.equal(got[1][name][0], model.get_buffer(name))
