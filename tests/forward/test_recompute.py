"""chunk_size: what is kept in memory for a backward pass, and that computing it again changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import randn
from measure import peak_memory
from oracle import assert_same, both_kinds, gradients
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.utils import _pytree as pytree

import functorch_ens as fe

E = 8


def _deep_net() -> tuple[nn.Module, Tensor, int]:
    """A net, an input, and the bytes that the output of one of its layers takes for one member."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1))]
    x = torch.randn(500, 32)
    return nn.Sequential(*layers), x, x.numel() * x.element_size()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("way", ["autograd", "torch.func"])
@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble"])
def test_a_training_step_keeps_the_activations_of_one_chunk(kind: str, way: str, strategy: str) -> None:
    model, x, unit = _deep_net()
    params = both_kinds(model, E)[kind == "BatchEnsemble"]
    peaks = {}
    for chunk in (None, 4, 2, 1):
        forward = fe.make_forward(model, strategy=strategy, chunk_size=chunk)

        def loss(params: fe.EnsembleParams, forward: fe.Forward = forward) -> Tensor:
            return forward(params, x).square().mean()

        def step(loss: Any = loss) -> None:
            if way == "autograd":
                torch.autograd.grad(loss(params), [t for group in params for t in group.values()])
            else:
                with torch.no_grad():
                    grad(loss)(params)

        step()
        peaks[chunk] = peak_memory(step, torch.device("cpu")) / unit
    # The outputs of all members and the gradient of them are always there, a few times: 4 E. The activations are not.
    outputs = 4 * E
    activations = peaks[None] - outputs
    assert activations > 20 * E  # else there is nothing to save
    for chunk in (4, 2, 1):
        assert peaks[chunk] - outputs < 1.2 * activations * chunk / E


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_forward_without_gradient_computes_nothing_again(strategy: str) -> None:
    calls = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.layer(x)

    model = Counting()
    params = fe.ensemble_params(model, 4)
    forward = fe.make_forward(model, strategy=strategy, chunk_size=2)
    with torch.no_grad():
        forward(params, torch.ones(5, 3))
    assert len(calls) == (2 if strategy == "vmap" else 4)
    forward(params, torch.ones(5, 3)).sum().backward()
    assert len(calls) == 3 * (2 if strategy == "vmap" else 4)


def _noisy_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_what_is_computed_again_draws_the_same_random_numbers(strategy: str, randomness: str) -> None:
    model, x = _noisy_net(), randn(7, 4)
    params, buffers = fe.batchensemble_params(model, 5), fe.ensemble_buffers(model, 5)
    forward = fe.make_forward(model, strategy=strategy, chunk_size=2, randomness=randomness)
    x.requires_grad_()
    torch.manual_seed(1)
    output = forward(params, x, buffers=buffers)[0]
    torch.rand(5)  # the state at the backward pass is another one
    state = torch.get_rng_state()
    (got,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(torch.get_rng_state(), state)

    # The same noise, and its gradient, from a forward that keeps everything.
    def whole(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("functorch_ens.forward.run.recomputed", lambda function, argument, replay: function(argument))
            return forward(params, x, buffers=buffers)[0]

    assert_same(whole(x), output)
    (want,) = torch.autograd.grad(whole(x).square().sum(), x)
    assert_same(got, want)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_what_is_computed_again_is_in_the_modes_and_the_autocast_of_the_call(strategy: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)), torch.randn(6, 4)
    params = fe.ensemble_params(model, 4)
    seen: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append((module.training, output.dtype)))
    chunked = fe.make_forward(model, strategy=strategy, chunk_size=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = chunked(params, x)
    first = len(seen)
    model.eval()
    output.float().sum().backward()
    assert len(seen) == 2 * first and set(seen) == {(True, torch.bfloat16)}


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_under_transforms(chunk: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(5, 3)
    params = fe.batchensemble_params(model, 5)

    def results(size: int | None) -> list[Tensor]:
        forward = fe.make_forward(model, chunk_size=size)

        def slopes(x: Tensor) -> Tensor:
            found = grad(lambda params: forward(params, x).square().sum())(params)
            return torch.stack([slope.square().sum() for group in found for slope in group.values()]).sum()

        inner = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(forward(params, inner).square().sum(), inner, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), inner)
        return [
            grad(slopes)(x),
            vmap(lambda row: forward(params, row[None]))(x),
            vmap(grad(lambda row: forward(params, row[None]).square().sum()))(x),
            jacrev(lambda x: forward(params, x))(x),
            second,
        ]

    for got, want in zip(results(chunk), results(None), strict=True):
        assert_same(got, want)


def test_chunks_of_what_differs_in_shape_and_of_integers() -> None:
    class Found(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.layer(x)
            return {"found": y[y[:, 0] > 0], "classes": y.argmax(-1), "logits": y}

    model, x = Found().double(), randn(9, 2)
    params = fe.ensemble_params(model, 5)
    want = fe.make_forward(model, strategy="loop")(params, x)
    assert isinstance(want["found"], list) and want["classes"].shape == (5, 9)
    for chunk in (1, 2):
        forward = fe.make_forward(model, strategy="loop", chunk_size=chunk)
        got = forward(params, x)
        assert_same(got, want)
        assert_same(gradients(forward, params, x), gradients(fe.make_forward(model, strategy="loop"), params, x))


def test_a_model_that_torch_func_cannot_follow_is_computed_again_too() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 4, 1), nn.CrossMapLRN2d(2)).double(), randn(3, 2, 5, 5)
    params = fe.ensemble_params(model, 4)
    whole, chunked = fe.make_forward(model), fe.make_forward(model, chunk_size=2)
    assert whole.strategy == chunked.strategy == "loop"
    assert_same(gradients(chunked, params, x), gradients(partial(whole), params, x))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("way", ["autograd", "torch.func"])
def test_buffers_are_carried_from_step_to_step(strategy: str, way: str) -> None:
    model, x = _noisy_net(), randn(7, 4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    params = fe.ensemble_params(model, 5)
    states = {}
    for chunk in (None, 2):
        buffers, forward = fe.ensemble_buffers(model, 5), fe.make_forward(model, strategy=strategy, chunk_size=chunk)
        slopes: Any = None
        for _ in range(3):

            def loss(params: fe.EnsembleParams, buffers: Any = buffers, forward: Any = forward) -> Any:
                y, new = forward(params, x, buffers=buffers)
                return y.square().sum(), new

            if way == "autograd":
                value, new = loss(params)
                assert not any(buffer.requires_grad for buffer in new.values())
                for name, buffer in buffers.items():  # before the backward pass, which computes a chunk again
                    buffer.copy_(new[name])
                slopes = torch.autograd.grad(value, [t for group in params for t in group.values()])
            else:
                with torch.no_grad():
                    slopes, buffers = grad(loss, has_aux=True)(params)
        states[chunk] = slopes, buffers
    assert_same(states[2], states[None])


def test_only_what_is_trained_gets_a_gradient() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x), "x": x, "weight": self.a.weight, "constant": torch.ones(2)}

    model, x = Heads().double(), randn(4, 3)
    for strategy in ("vmap", "loop"):
        params = fe.ensemble_params(model, 4)
        output = fe.make_forward(model, strategy=strategy, chunk_size=2)(params, x)
        assert [name for name, value in output.items() if value.requires_grad] == ["a", "b", "weight"]
        output["a"].sum().backward()
        assert params.stacked["a.weight"].grad is not None and params.stacked["b.weight"].grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning")  # by torch's own forward mode
def test_forward_mode_derivatives_with_chunks() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), randn(2, 3)
    params = fe.batchensemble_params(model, 4)
    whole, chunked = fe.make_forward(model), fe.make_forward(model, chunk_size=2)
    second = [torch.func.hessian(lambda x, f=f: f(params, x).pow(3).sum())(x) for f in (chunked, whole)]
    assert_same(second[0], second[1])


class _PutsBack(nn.Module):
    """It draws the same dropout twice, so it is 0 everywhere."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.way == "fork_rng":
            with torch.random.fork_rng(devices=[]):
                first = F.dropout(h)
        else:
            state = torch.get_rng_state()
            first = F.dropout(h)
            torch.set_rng_state(state)
        return first - F.dropout(h)


@pytest.mark.parametrize("way", ["fork_rng", "set_rng_state"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"strategy": "loop", "randomness": "same"}], ids=str)
def test_a_model_that_puts_the_generator_back_draws_the_same_again(way: str, options: dict[str, Any]) -> None:
    model, x = _PutsBack(way).double(), randn(5, 4)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, **options)
    torch.manual_seed(1)
    torch.rand(3)
    for _ in range(3):
        output = forward(params, x)
        assert not output.any()
        (slope,) = torch.autograd.grad(output.sum(), [params.stacked["layer.weight"]])
        assert not slope.any()


class _Masked(nn.Module):
    """It drops inputs by the numbers of a generator outside of torch, and scales by a buffer of its own."""

    scale: Tensor

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.draw = draw
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x * self.scale * self.draw()).tanh())


GENERATORS: dict[str, tuple[Callable[[int], Any], Callable[[], float]]] = {
    "Python": (random.seed, lambda: random.random()),
    "NumPy": (np.random.seed, lambda: np.random.random()),
}


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("way", ["autograd", "torch.func"])
@pytest.mark.parametrize("name", GENERATORS)
def test_what_the_generators_outside_of_torch_gave_is_given_again(name: str, way: str, strategy: str) -> None:
    seed, draw = GENERATORS[name]
    model, x = _Masked(draw).double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, strategy=strategy, chunk_size=1)
    seed(7)
    given = [draw() for _ in range(3)]
    after = draw()
    leaves = pytree.tree_leaves(params)
    losses = [_own_loss(params, i, x * given[i]) for i in range(3)]
    wanted = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    seed(7)

    def loss(params: fe.EnsembleParams) -> Tensor:
        return forward(params, x).square().sum()

    got = torch.autograd.grad(loss(params), leaves) if way == "autograd" else pytree.tree_leaves(grad(loss)(params))
    assert draw() == after  # backward has left the generator where the forward left it
    assert_same(list(got), list(wanted))


def _own_loss(params: fe.EnsembleParams, i: int, x: Tensor) -> Tensor:
    return F.linear(x.tanh(), params.stacked["layer.weight"][i], params.stacked["layer.bias"][i]).square().sum()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_own_buffers_that_change_before_backward_change_no_gradient(strategy: str) -> None:
    model, x = _Masked(lambda: 1.0).double(), randn(5, 3)
    params = fe.ensemble_params(model, 4)
    leaves = pytree.tree_leaves(params)
    found = []
    for chunk in (None, 2):
        model.scale.fill_(2.0)
        loss = fe.make_forward(model, strategy=strategy, chunk_size=chunk)(params, x).square().mean()
        model.scale.add_(5.0)
        found.append(torch.autograd.grad(loss, leaves))
    assert_same(found[0], found[1])
