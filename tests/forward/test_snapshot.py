"""What a model keeps on itself between calls (caches, counters, lists) is undone after each."""

from __future__ import annotations

import itertools
from collections import deque
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import randn
from oracle import assert_same, compile_whole, gradients, loop
from torch import Tensor, nn

import functorch_ens as fe
from functorch_ens.forward.snapshot import TRACES_DICT


class _Caching(nn.Module):
    """Keeps tensors, numbers and lists on itself between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.cached: Tensor | None = None
        self.history: list[Tensor] = []
        self.seen = {"calls": 0}
        self.constant = torch.ones(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.layer(x)
            self.register_buffer("late", self.cached.detach())
        self.history.append(self.cached)
        self.seen["calls"] += 1
        self.constant += 1
        return self.layer(x) + self.cached + len(self.history) + self.seen["calls"] + self.constant


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_what_a_model_keeps_on_itself_does_not_leak(strategy: str) -> None:
    model = _Caching().double()
    forward = fe.make_forward(model, strategy=strategy)
    params = fe.batchensemble_params(model, 3)
    for _ in range(3):
        x = randn(4, 3)
        assert_same(forward(params, x), loop(model, params, x))
    assert model.cached is None and model.history == [] and model.seen == {"calls": 0}
    assert torch.equal(model.constant, torch.ones(3, dtype=torch.float64)) and "late" not in dict(model.named_buffers())
    (template,) = forward._known.templates.idle
    kept = [value for module in template._module.modules() for value in vars(module).values()]
    assert not [
        value for value in kept if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
    ]


class _Store:
    """A plain object in which two modules keep things."""

    value: Tensor


class _Sharing(nn.Module):
    """Caches in a dict, an object and a deque that a child module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.cache: dict[str, Tensor] = {}
        self.store = _Store()
        self.queue: deque[Tensor] = deque()
        self.child: Any = nn.Module()
        vars(self.child).update(cache=self.cache, store=self.store, queue=self.queue)

    def forward(self, x: Tensor) -> Tensor:
        if "hidden" not in self.cache:
            self.cache["hidden"] = self.layer(x)
        if not hasattr(self.store, "value"):
            self.store.value = self.layer(x).tanh()
        self.queue.append(self.layer(x).exp())
        return self.child.cache["hidden"] + self.child.store.value + len(self.child.queue) * self.child.queue[0]


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_caches_that_modules_share_stay_shared_and_do_not_leak(strategy: str) -> None:
    model = _Sharing().double()
    forward, params = fe.make_forward(model, strategy=strategy), fe.batchensemble_params(model, 3)
    for _ in range(3):
        x = randn(4, 3)
        assert_same(forward(params, x), loop(model, params, x))
    assert not model.cache and not vars(model.store) and not model.queue


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_caches_do_not_leak_from_compiled_calls(strategy: str) -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.cached: Tensor | None = None
            self.named: dict[str, Tensor] = {}
            self.history: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            if self.cached is None:
                self.cached = self.layer(x)
            if "late" not in self.named:
                self.named["late"] = self.layer(x).tanh()
            self.history.append(self.cached)
            y = self.cached + self.named["late"] + len(self.history)
            if not TRACES_DICT:  # an attribute made in a forward is undone from torch 2.15 on
                return y
            if not hasattr(self, "late"):
                self.late = self.layer(x).exp()
            return y + self.late

    model = Cached().double()
    params = fe.batchensemble_params(model, 3)
    forward = fe.make_forward(model, strategy=strategy)
    compiled = compile_whole(forward)
    for _ in range(2):
        x = randn(4, 3)
        assert_same(compiled(params, x), loop(model, params, x))
        assert_same(forward(params, x), loop(model, params, x))


def test_inference_mode_leaves_nothing_behind() -> None:
    model, x = _Caching().double(), randn(4, 3)
    forward, params = fe.make_forward(model), fe.batchensemble_params(model, 2)
    with torch.inference_mode():
        first = forward(params, x)
    assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
    assert_same(forward(params, x), first.clone())
    assert forward.strategy == "vmap"


class _Counting(nn.Module):
    """Counts in an object and by an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.inside = _Calls()
        self.count = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        self.inside.number += 1
        return self.layer(x) * self.inside.number + next(self.count)


class _Calls:
    def __init__(self) -> None:
        self.number = 2


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_objects_and_iterators_do_not_leak_from_compiled_calls(strategy: str) -> None:
    model, x = _Counting().double(), randn(4, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, strategy=strategy)
    want, compiled = forward(params, x), compile_whole(forward)
    for _ in range(3):
        assert_same(compiled(params, x), want)
        assert_same(forward(params, x), want)
