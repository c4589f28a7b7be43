"""Calls in threads equal serial calls, and nothing that other threads see is changed by a call."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo_written import Checkpointed

import functorch_ens as fe


def _in_threads(*works: Callable[[], Any]) -> None:
    """Run all at the same time, and raise what any of them raises."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class _Net(nn.Module):
    """It keeps things on itself, and shows its mode in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.last = nn.Linear(6, 2)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.first(x).tanh()
        return self.last(self.kept) + (100 if self.training else 0)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_calls_of_one_forward_in_any_mode_equal_serial_calls(strategy: str, chunk: int | None) -> None:
    model = _Net().double()
    params, xs = fe.batchensemble_params(model, 3), [randn(n, 3) for n in (4, 5, 6)]
    forward = fe.make_forward(model, strategy=strategy, chunk_size=chunk)
    own = fe.make_forward(model, strategy="loop")
    want = [own(params, x) for x in xs]
    slopes = [torch.autograd.grad(y.square().sum(), tree_leaves(params)) for y in want]

    def train(i: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(8):
                y = forward(params, xs[i])
                assert_same(y, want[i])
                assert_same(torch.autograd.grad(y.square().sum(), tree_leaves(params)), slopes[i])

        return work

    def evaluate() -> None:
        for _ in range(8):
            assert_same(fe.predict(forward, params, xs[0], batch_size=3), want[0].detach() - 100)
            assert model.training

    _in_threads(train(0), train(1), train(2), evaluate, evaluate)
    assert model.training and model.kept is None


@pytest.mark.compile
def test_calls_while_another_thread_compiles_equal_serial_calls() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), torch.randn(6, 3)
    params, buffers = fe.ensemble_params(model, 3), fe.ensemble_buffers(model, 3)
    forward, y = fe.make_forward(model), torch.randn(6, 2)
    want = forward(params, x, buffers=buffers)
    trained = params._replace(stacked={name: t.detach().clone().requires_grad_() for name, t in params.stacked.items()})
    step = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(trained), 0.1))
    done = threading.Event()

    def compile_it() -> None:
        try:
            for _ in range(2):
                step(trained, x, y, buffers=buffers)
        finally:
            done.set()

    def call() -> None:
        while not done.is_set():
            assert_same(forward(params, x, buffers=buffers), want, 1e-6)
            time.sleep(0.02)

    _in_threads(compile_it, call, call)
    assert step.compiled_by != "eager" and forward.strategy == "vmap"


def test_a_model_may_wait_for_an_ensemble_in_another_thread() -> None:
    inner = nn.Linear(3, 3)
    others, x = fe.ensemble_params(inner, 2), torch.ones(2, 3)
    inside = fe.make_forward(inner)

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.append(inside(others, torch.ones(2, 3)).detach()))
            thread.start()
            thread.join(20)
            return self.layer(x) + found[0].mean()

    model = Waiting()
    params = fe.ensemble_params(model, 2)
    own = fe.make_forward(nn.Linear(3, 3))
    want = own(fe.EnsembleParams({}, {name[6:]: t for name, t in params.stacked.items()}), x)
    assert_same(fe.make_forward(model, strategy="loop")(params, x), want + inside(others, x).mean(), 1e-6)


def test_a_model_that_calls_its_own_ensemble() -> None:
    forward: Any = None

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, deep: bool) -> Tensor:
            return self.layer(x) + (forward(params, x, False).mean(0) if deep else 0)

    model, x = Nested().double(), randn(2, 3)
    params = fe.ensemble_params(model, 2)
    forward = fe.make_forward(model, strategy="loop")
    shallow = forward(params, x, False)
    assert_same(forward(params, x, True), shallow + shallow.mean(0))


def test_checkpoints_of_other_threads_are_computed_again() -> None:
    model, x, over = Checkpointed(False).eval(), torch.ones(2, 4), threading.Event()
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)
    counts = {False: 0, True: 0}

    def counted(reentrant: bool) -> Callable[[Tensor], Tensor]:
        def work(x: Tensor) -> Tensor:
            counts[reentrant] += 1
            return x.sin()

        return work

    def others() -> None:
        try:
            for _ in range(40):
                for reentrant in counts:
                    leaf = torch.ones(3, requires_grad=True)
                    checkpoint(counted(reentrant), leaf, use_reentrant=reentrant).sum().backward()
        finally:
            over.set()

    def calls() -> None:
        while not over.is_set():
            forward(params, x).sum().backward()

    _in_threads(others, calls, calls)
    assert counts == {False: 80, True: 80}


def test_what_draws_nothing_leaves_the_draws_of_other_threads_alone() -> None:
    """First calls, computing again, the loop with the same numbers for all, and new parameters."""
    model, x, over = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(2, 3), threading.Event()
    model.append(_Branching())
    drawn: list[Tensor] = []

    def draw() -> None:
        while not over.is_set():
            drawn.append(torch.rand(8))

    def calls() -> None:
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(15):
                params = fe.ensemble_params(model, 3, generator=generator)
                for options in ({}, {"chunk_size": 2}, {"strategy": "loop", "randomness": "same"}):
                    fe.make_forward(model, **options)(params, x).sum().backward()
        finally:
            over.set()

    _in_threads(draw, calls)
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn) > 100


class _Branching(nn.Module):
    """vmap cannot serve it, so that the first call falls back."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_parameters_made_in_threads_are_those_of_their_generators() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.LSTM(40, 8), nn.MultiheadAttention(8, 2))
    want = [fe.ensemble_params(model, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def make(i: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(5):
                assert_same(fe.ensemble_params(model, 3, generator=torch.Generator().manual_seed(i)), want[i], 0.0)

        return work

    state = torch.get_rng_state()
    _in_threads(*(make(i) for i in range(4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copy", [lambda x: pickle.loads(pickle.dumps(x)), __import__("copy").deepcopy])
def test_a_forward_and_a_step_can_be_pickled(copy: Any) -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(5, 3), randn(5, 2)
    params = fe.batchensemble_params(model, 3)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, torch.optim.Adam(tree_leaves(params)), compile=False)
    step(params, x, y)
    again, others = copy((step, params))
    for _ in range(2):
        assert_same(again(others, x, y), step(params, x, y))
    assert_same(others, params)
    assert_same(again.forward(others, x), step.forward(params, x))
