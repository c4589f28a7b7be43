"""Sizes that are symbols, while torch.export, make_fx and torch.compile trace: no guard is put on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import assert_same, loop
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import functorch_ens as fe

OPTIONS: dict[str, dict[str, Any]] = {
    "vmap": {},
    "loop": {"strategy": "loop"},
    "chunks": {"chunk_size": 2},
    "loop_in_chunks": {"strategy": "loop", "chunk_size": 2},
}


class _Exported(nn.Module):
    def __init__(self, forward: fe.Forward, params: fe.EnsembleParams) -> None:
        super().__init__()
        self.ensemble, self.given = forward, params

    def forward(self, x: Tensor) -> Any:
        return self.ensemble(self.given, x)


class _Sized(nn.Module):
    """A model that also returns a size."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x), x.shape[0]


def _dense() -> nn.Module:
    return _Sized(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def _convolved() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def _tagger() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 2)).double()


def _input(model: nn.Module, size: int) -> Tensor:
    if isinstance(model, _Sized) or isinstance(next(model.children()), nn.Linear):
        return torch.randn(size, 3, dtype=torch.float64)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return torch.randint(10, (size, 3))
    return torch.randn(size, 3, 6, 6, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # functional_call undoes them
@pytest.mark.parametrize("make", [_dense, _convolved, _tagger])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [fe.ensemble_params, fe.batchensemble_params])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_ensemble_takes_any_batch(make: Any, options: str, kind: Any, strict: bool) -> None:
    model: Any = make()
    model = model.layers if strict and make is _dense else model  # a size that comes out is no constant to Dynamo
    params = tree_map(torch.detach, kind(model, 3))  # export warns of tensors that are trained
    forward = fe.make_forward(model, **OPTIONS[options])
    rows = Dim("rows", min=1, max=10000)
    exported = export(
        _Exported(forward, params), (_input(model, 7),), dynamic_shapes=({0: rows},), strict=strict
    ).module()
    for size in (1, 2, 3, 6, 500):
        x = _input(model, size)
        got, want = exported(x), loop(model, params, x)
        if make is _dense and not strict:
            assert got[1] == size
            got, want = got[0], want[0]
        assert_same(got.detach(), want.detach())


@pytest.mark.parametrize("make", [_convolved, _tagger])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_symbolic_trace_takes_any_batch(make: Any, options: str) -> None:
    model = make()
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, **OPTIONS[options])
    strategy = forward.strategy
    traced = make_fx(lambda params, x: forward(params, x), tracing_mode="symbolic")(params, _input(model, 7))
    assert forward.strategy == strategy
    for size in (2, 500):
        x = _input(model, size)
        assert_same(traced(params, x).detach(), loop(model, params, x).detach())


@pytest.mark.parametrize("make", [_convolved, _tagger])
@pytest.mark.parametrize("options", list(OPTIONS)[:3])
def test_no_more_graphs_than_a_loop_over_modules(make: Any, options: str) -> None:
    model = make()
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, **OPTIONS[options])
    alone = [copy.deepcopy(model) for _ in range(3)]
    for i, module in enumerate(alone):
        module.load_state_dict(fe.member_params(model, params, i))

    def count(function: Any) -> int:
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(function, backend=counter)
        for size in range(3, 15):
            x = _input(model, size)
            assert_same(compiled(x).detach(), torch.stack([module(x) for module in alone]).detach())
        return counter.frame_count

    assert count(lambda x: forward(params, x)) <= count(lambda x: torch.stack([module(x) for module in alone]))
