"""`chunk_size="auto"`: what it chooses and tells, and that results are those of all members at once."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn, small_net
from oracle import assert_same, both_kinds, compile_whole, gradients
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens.forward import chunks

E = 7


@pytest.fixture(autouse=True)
def budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk may take 1 KiB: two members of the nets below in float64, or one."""
    monkeypatch.setattr(chunks, "ON_CPU", 2**10)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("kind", [0, 1], ids=["classic", "BatchEnsemble"])
@pytest.mark.parametrize("member_inputs", [False, True])
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_values_and_gradients_are_those_of_all_members(kind: int, member_inputs: bool, strategy: str) -> None:
    model = _net()
    params = both_kinds(model, E)[kind]
    x = randn(E, 5, 3) if member_inputs else randn(5, 3)
    forward = fe.make_forward(model, strategy=strategy, chunk_size="auto", member_inputs=member_inputs)
    whole = fe.make_forward(model, strategy=strategy, member_inputs=member_inputs)
    assert_same(forward(params, x), whole(params, x))
    assert_same(gradients(forward, params, x), gradients(whole, params, x))
    assert forward.chunk_size == (None if strategy == "loop" else 1 if kind == 0 else forward.chunk_size)
    assert strategy == "loop" or (forward.chunk_size or E) < E


def test_the_size_follows_from_the_memory_of_a_member() -> None:
    """A member writes two products, the sums with the biases and a tanh, and has the gradients of 26 numbers."""
    model, x, one = _net(), randn(5, 3), (5 * (3 * 4 + 2 * 2) + 26) * 8
    for E, most, size in ((100, 1, 1), (100, 50, 50), (100, 67, 50), (97, 50, 49), (7, 3, 3), (7, 6, 4), (9, 9, None)):
        chunks.ON_CPU = most * one  # the fixture sets it back
        forward = fe.make_forward(model, chunk_size="auto")
        forward(fe.ensemble_params(model, E), x)
        assert forward.chunk_size == size
    own = fe.make_forward(model, chunk_size="auto", member_inputs=True)
    chunks.ON_CPU = 10 * (one + 5 * 3 * 8)  # the copy of its own input, too
    own(fe.ensemble_params(model, 100), randn(100, 5, 3))
    assert own.chunk_size == 10


def test_it_is_told_once_and_measured_once_for_each_kind_of_call(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    model = Counting(3, 2).double()
    forward, params = fe.make_forward(model, chunk_size="auto"), fe.ensemble_params(model, E)
    assert forward.chunk_size is None
    with caplog.at_level(logging.INFO, logger="functorch_ens"):
        for rows in (5, 5, 5, 40, 40):
            forward(params, randn(rows, 3))
    told = [record.getMessage() for record in caplog.records if "at a time" in record.getMessage()]
    assert len(told) == 2 and "one takes" in told[0] and "chunk on cpu may take" in told[0]
    assert forward.chunk_size == 1 and "one takes" in forward.reason and "vmap" not in told[0]
    assert calls.count(40) == 1 + 2 * E  # measured, and computed twice by vmap of one member


def test_measuring_leaves_all_random_state_as_it_was() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.own = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand(4, generator=self.own, dtype=x.dtype) + random.random()
            return self.layer(F.dropout(x, 0.5)) + noise

    model = Noisy().double()
    params, x = fe.ensemble_params(model, E), randn(5, 3)
    results = []
    for chunk_size in ("auto", 1):
        forward = fe.make_forward(model, strategy="vmap", chunk_size=chunk_size)
        torch.manual_seed(1)
        random.seed(1)
        results.append([forward(params, x), forward(params, x), torch.rand(2), random.random()])
        assert forward.chunk_size == 1
    assert_same(results[0], results[1])


def test_copies_and_pickles_choose_anew() -> None:
    model = _net()
    forward, params, x = fe.make_forward(model, chunk_size="auto"), fe.ensemble_params(model, E), randn(5, 3)
    forward(params, x)
    for again in (copy.copy(forward), copy.deepcopy(forward), pickle.loads(pickle.dumps(forward))):
        assert again.chunk_size is None
        assert_same(again(params, x), forward(params, x))
        assert again.chunk_size == forward.chunk_size == 1


def test_two_members_and_transforms_of_the_users_are_not_measured() -> None:
    model = _net()
    forward, x = fe.make_forward(model, chunk_size="auto"), randn(5, 3)
    forward(fe.ensemble_params(model, 2), x)
    assert forward.chunk_size is None
    params = fe.ensemble_params(model, E)
    got = torch.func.grad(lambda params: forward(params, x).square().sum())(params)
    assert forward.chunk_size is None
    forward(params, x)
    assert_same(torch.func.grad(lambda params: forward(params, x).square().sum())(params), got)


def test_an_error_of_the_models_own_comes_through() -> None:
    model = _net()
    forward, params = fe.make_forward(model, chunk_size="auto"), fe.ensemble_params(model, E)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        forward(params, randn(5, 9))
    assert "the model raised this for one member" in caught.value.__notes__[0]


def test_a_model_that_vmap_cannot_serve_goes_to_the_loop() -> None:
    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    model = Asking(3, 2).double()
    forward, params, x = fe.make_forward(model, chunk_size="auto"), fe.ensemble_params(model, E), randn(5, 3)
    assert_same(forward(params, x), fe.make_forward(model, strategy="loop")(params, x))
    assert forward.strategy == "loop" and forward.chunk_size is None and "by the loop" in forward.reason


def test_predict() -> None:
    model = small_net().double().train()
    params, buffers, x = fe.ensemble_params(model, E), fe.ensemble_buffers(model, E), randn(11, 3)
    forward = fe.make_forward(model, chunk_size="auto")
    got = fe.predict(forward, params, x, buffers=buffers, batch_size=4, progress=False)
    assert_same(got, fe.predict(fe.make_forward(model), params, x, buffers=buffers, progress=False))
    assert forward.chunk_size == 1


@pytest.mark.parametrize("kind", [0, 1], ids=["classic", "BatchEnsemble"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_computes_members_in_parts(kind: int, accumulate: int, prepared: bool) -> None:
    model = small_net().double().train()
    params, buffers = both_kinds(model, E)[kind], fe.ensemble_buffers(model, E)
    x, y = randn(6, 3), torch.randint(2, (6,))
    found = []
    for chunk_size in ("auto", None):
        step = fe.make_train_step(
            fe.make_forward(model, chunk_size=chunk_size),
            F.cross_entropy,
            torch.optim.SGD(tree_leaves(params), 0.1),
            prepare=(lambda x, y: (x + torch.rand(()), y)) if prepared else None,
            accumulate=accumulate,
            compile=False,
        )
        torch.manual_seed(0)
        found.append(step.gradients(params, x, y, buffers=buffers))
        assert (step.forward.chunk_size is None) is (chunk_size is None)
    got, want = found
    assert_same(dict(sorted(got.gradients.items())), dict(sorted(want.gradients.items())))
    assert_same([got.losses, got.buffers], [want.losses, want.buffers])


@pytest.mark.compile
@pytest.mark.parametrize("kind", [0, 1], ids=["classic", "BatchEnsemble"])
def test_a_compiled_step_computes_members_in_parts(kind: int) -> None:
    model = _net()
    x, y = randn(6, 3), torch.randint(2, (6,))
    before, results = both_kinds(model, E)[kind], []
    for chunk_size in ("auto", None):
        params = fe.EnsembleParams(*({n: t.detach().clone().requires_grad_() for n, t in p.items()} for p in before))
        forward = fe.make_forward(model, chunk_size=chunk_size)
        optimizer = torch.optim.Adam(tree_leaves(params), 0.1)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=chunk_size == "auto")
        for _ in range(3):
            step(params, x, y)
        results.append(params)
        assert chunk_size is None or ((forward.chunk_size or E) < E and step.compiled_by != "eager")
    assert_same(results[0], results[1])
    again: Any = pickle.loads(pickle.dumps((step, params)))
    assert again[0](again[1], x, y).shape == (E,)


@pytest.mark.compile
def test_a_compiled_forward_takes_the_size_of_an_eager_call() -> None:
    model = _net()
    forward, params, x = fe.make_forward(model, chunk_size="auto"), fe.ensemble_params(model, E), randn(5, 3)
    want = fe.make_forward(model)(params, x)
    compiled = compile_whole(forward)
    assert_same(compiled(params, x), want)
    assert forward.chunk_size is None
    forward(params, x)
    assert forward.chunk_size == 1
    assert_same(compiled(params, x), want)


@pytest.mark.parametrize("value", ["Auto", "", 0, -1, 2.0, True, torch.ones(2), ["auto"]])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="chunk_size: expected a positive int, None or 'auto', got "):
        fe.make_forward(_net(), chunk_size=value)
