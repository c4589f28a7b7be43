"""chunk_size: what is kept in memory for a backward pass, and that computing it again changes nothing."""

from __future__ import annotations

import itertools
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
from oracle import assert_same, both_kinds, gradients, loop
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.utils import _pytree as pytree

import functorch_ens as fe
from functorch_ens.holds import generator, held

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
            patch.setattr("functorch_ens.forward.run.recomputed", lambda function, argument, *_: function(argument))
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


def _partial_of(rng: random.Random) -> Callable[[], float]:
    return partial(rng.uniform, 0.5, 2.0)


class _Held:
    """An object that draws."""

    def __init__(self, rng: Any) -> None:
        self.inside = {"rng": [rng]}

    def __call__(self) -> float:
        return float(self.inside["rng"][0].random())


HELD: dict[str, Callable[[], Callable[[], float]]] = {
    "Python": lambda: random.Random(3).random,
    "Python, normal": lambda: partial(random.Random(3).gauss, 2.0, 1.0),
    "Python in an object": lambda: _Held(random.Random(3)),
    "partial": lambda: _partial_of(random.Random(3)),
    "NumPy in an object": lambda: _Held(np.random.default_rng(3)),
    **{
        kind.__name__: lambda kind=kind: _Held(np.random.Generator(kind(3)))  # type: ignore[misc]
        for kind in (np.random.MT19937, np.random.Philox, np.random.SFC64)
    },
    "NumPy, old": lambda: _Held(np.random.RandomState(3)),
    "count": lambda: partial(next, itertools.count(1)),
    "method of count": lambda: itertools.count(1).__next__,
    "cycle": lambda: partial(next, itertools.cycle([0.5, 2.0, 3.0])),
    "iterator of a list": lambda: iter([0.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).__next__,
    "islice": lambda: partial(next, itertools.islice(itertools.count(1), 1, None, 2)),
}
NOT_COPIED = {"Python"}  # a method of a built-in class: copy.deepcopy leaves it, and the generator, as they are
ITERATORS = {"count", "method of count", "cycle", "iterator of a list", "islice"}


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("way", ["autograd", "torch.func"])
@pytest.mark.parametrize("name", HELD)
def test_what_the_model_holds_gives_the_same_to_all_members_and_again(name: str, way: str, strategy: str) -> None:
    model, x, fresh = _Masked(HELD[name]()).double(), randn(5, 3), HELD[name]()
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, strategy=strategy, chunk_size=1)
    leaves = pytree.tree_leaves(params)
    for _ in range(3):
        first = fresh()
        given = [first, fresh(), fresh()] if name in NOT_COPIED else [first] * 3
        if name in ITERATORS:  # memory of the model, with which each call begins anew; generators go on
            fresh = HELD[name]()
        losses = [_own_loss(params, i, x * given[i]) for i in range(3)]
        wanted = torch.autograd.grad(torch.stack(losses).sum(), leaves)

        def loss(params: fe.EnsembleParams) -> Tensor:
            return forward(params, x).square().sum()

        got = torch.autograd.grad(loss(params), leaves) if way == "autograd" else pytree.tree_leaves(grad(loss)(params))
        assert_same(list(got), list(wanted))
    if name not in NOT_COPIED:
        assert model.draw() == HELD[name]()()  # the user's own has given nothing


@pytest.mark.parametrize("make", [lambda: torch.Generator().manual_seed(3), lambda: random.Random(3)])
def test_generators_go_on_in_any_copy_of_the_model(make: Callable[[], Any]) -> None:
    def draw(rng: Any) -> float:
        return rng.random() if isinstance(rng, random.Random) else torch.empty(1).normal_(generator=rng).item()

    model, x, rng = _Masked(partial(draw, make())).double(), randn(5, 3), make()
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model, strategy="loop", chunk_size=1)
    leaves = pytree.tree_leaves(params)
    for _ in range(3):
        given = draw(rng)
        want = torch.autograd.grad(sum(_own_loss(params, i, x * given) for i in range(2)), leaves)  # type: ignore[arg-type]
        loss = forward(params, x).square().sum()
        held_by_another_thread = forward._known.templates.take()
        assert_same(list(torch.autograd.grad(loss, leaves)), list(want))
        del held_by_another_thread
        model.register_forward_hook(lambda *_: None)  # so that the forward is made anew


RNG = np.random.default_rng(0)


def _of_a_class() -> type[_Masked]:
    class Of(_Masked):
        rng = random.Random(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x * self.rng.random()).tanh())

    return Of


def _of_a_global() -> float:
    return float(RNG.random())


def _of_a_closure() -> Callable[[], float]:
    held = [random.Random(4)]
    return lambda: held[0].random()


def _of_a_default() -> Callable[[], float]:
    rng = random.Random(4)

    def draw(*, own: random.Random = rng) -> float:
        return own.random()

    return draw


BY_CODE: dict[str, Callable[[], _Masked]] = {
    "attribute of the class": lambda: _of_a_class()(float),
    "global variable": lambda: _Masked(_of_a_global),
    "global variable, further on": lambda: _Masked(lambda: _of_a_global()),
    "closure": lambda: _Masked(_of_a_closure()),
    "default": lambda: _Masked(_of_a_default()),
}


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("name", BY_CODE)
def test_what_the_code_draws_from_is_given_again_in_backward(name: str, strategy: str) -> None:
    model, x = BY_CODE[name]().double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, strategy=strategy, chunk_size=1)
    found = next(each for _, value in held(model, by_code=True) if (each := generator(value)))
    start, leaves = found.read(), pytree.tree_leaves(params)
    want = torch.autograd.grad(loop(model, params, x).square().sum(), leaves)
    end = found.read()
    found.write(start)
    got = torch.autograd.grad(forward(params, x).square().sum(), leaves)
    assert_same(list(got), list(want))
    assert found.read() == end


def test_an_iterator_that_cannot_be_set_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    numbers = (float(i) for i in range(9))
    model = nn.Sequential(nn.Linear(3, 2), _Masked(lambda: next(numbers)))
    fe.make_forward(model)
    assert not caplog.messages
    fe.make_forward(model, chunk_size=1)
    (message,) = caplog.messages
    assert "the iterator in 1.draw is no attribute, and cannot be set back" in message


def test_an_iterator_in_an_attribute_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    model: Any = nn.Sequential(_Masked(itertools.count(1.0).__next__))
    model.noise = iter(draw.random, None)
    forward, params = fe.make_forward(model), fe.ensemble_params(model, 2)
    for i in range(2):
        model.setting = i  # the forward is made anew
        forward(params, torch.randn(4, 3))
    (message,) = [each for each in caplog.messages if "iterator" in each]
    assert "Sequential: the iterator in 0.draw, noise begins anew in every call" in message


def test_an_iterator_that_cannot_be_copied_is_an_error_that_names_it() -> None:
    model = nn.Sequential(_Masked(partial(next, (float(i) for i in range(9)))))
    with pytest.raises(TypeError) as error:
        fe.make_forward(model)
    assert "0.draw of Sequential could not be copied" in error.value.__notes__[0]


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
