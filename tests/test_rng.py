"""Random state: drawn from elsewhere and put back, and the same or different numbers for the parts of a computation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from torch import nn

from functorch_ens.draws import Draws
from functorch_ens.rng import Drawing, Parts, RandomState, cpu_generator


def test_a_state_comes_back() -> None:
    tensors = [torch.ones(1)]
    before = RandomState.of(tensors)
    first = torch.rand(3)
    assert not before.equals(RandomState.of(tensors))
    before.restore()
    assert before.equals(RandomState.of(tensors)) and torch.equal(torch.rand(3), first)


ROWS = torch.ones(1, 4, 8)
_LAYER = nn.LSTM(3, 3, num_layers=2, dropout=0.5)
DRAWS: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(4),
    "randn, dtype": lambda: torch.randn(2, 3, dtype=torch.float64),
    "randint": lambda: torch.randint(3, 90, (5,)),
    "randperm": lambda: torch.randperm(9),
    "rand_like": lambda: torch.rand_like(torch.ones(4)),
    "randint_like": lambda: torch.randint_like(torch.ones(4), 3, 90),
    "normal_": lambda: torch.empty(20).normal_(1, 2),
    "normal": lambda: torch.normal(torch.zeros(4), torch.ones(4)),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(6), 4),
    "poisson": lambda: torch.poisson(torch.full((5,), 3.0)),
    "exponential_": lambda: torch.empty(4).exponential_(),
    "dropout": lambda: F.dropout(torch.ones(40), 0.3),
    "feature dropout": lambda: F.dropout2d(torch.ones(2, 9, 2, 2), 0.3),
    "alpha dropout": lambda: F.alpha_dropout(torch.ones(20), 0.3),
    "native dropout": lambda: torch.native_dropout(torch.ones(40), 0.3, True)[0],
    "rrelu": lambda: F.rrelu(-torch.ones(5), training=True),
    "LSTM": lambda: _LAYER(torch.ones(2, 1, 3))[0].detach(),
    "attention": lambda: F.scaled_dot_product_attention(ROWS, ROWS, ROWS, dropout_p=0.5),
    "init": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(9)),
    "gamma": lambda: torch.distributions.Gamma(2.0, 1.0).sample((4,)),
    "a seed inside": lambda: _seeded(),
}


def _seeded() -> list[torch.Tensor]:
    first = torch.rand(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        inner = torch.rand(3)
    return [first, inner, torch.rand(3)]


@pytest.mark.parametrize("name", DRAWS)
def test_draws_come_from_the_copy_alone_and_are_the_same_numbers(name: str) -> None:
    torch.manual_seed(3)
    torch.rand(7)
    start = RandomState.of([])
    want = [DRAWS[name](), torch.rand(3)]
    end = RandomState.of([])
    torch.manual_seed(4)
    torch.rand(2)
    there = torch.get_rng_state()
    with Drawing(start) as drawing:
        got = [DRAWS[name](), torch.rand(3)]
        within = RandomState.of([])
    assert_same(got, want, 0.0)
    assert drawing.drew and torch.equal(torch.get_rng_state(), there)
    assert drawing.state.equals(end) and within.equals(end)


def test_what_draws_nothing_is_known() -> None:
    own = torch.Generator().manual_seed(0)
    with Draws() as draws:
        F.dropout(torch.ones(3), 0.5, training=False)
        F.scaled_dot_product_attention(ROWS, ROWS, ROWS)
        torch.rand(3, generator=own)
        nn.Linear(3, 2, device="meta")
    assert not draws.drew
    with Draws() as draws:
        F.dropout(torch.ones(3), 0.5)
    assert draws.drew


def test_an_error_inside_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError), Drawing(RandomState.seeded(7)):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_parts_draw_different_numbers_or_the_same(randomness: str) -> None:
    torch.manual_seed(0)
    drawn, parts = [], Parts(randomness, torch.ones(1))
    for index in range(3):
        with parts.part(last=index == 2):
            drawn.append(torch.rand(4))
    after = torch.rand(4)
    torch.manual_seed(0)
    alone = torch.rand(4)
    assert torch.equal(drawn[0], alone)
    assert torch.equal(drawn[1], drawn[0]) is torch.equal(drawn[2], drawn[0]) is (randomness == "same")
    if randomness == "same":  # the last part leaves the state as one computation does
        assert torch.equal(after, torch.rand(4))


def test_any_draw_is_an_error_where_that_is_asked_for() -> None:
    with Parts("error", torch.ones(1)).part(last=False):
        torch.zeros(3)
    with pytest.raises(RuntimeError, match='randomness="error": the model drew'):
        with Parts("error", torch.ones(1)).part(last=True):
            torch.rand(1)


def test_where_another_thread_has_drawn_its_numbers_do_not_come_again() -> None:
    torch.manual_seed(0)
    parts = Parts("same", torch.ones(1))
    with parts.part(last=True):
        torch.rand(4)
        others: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: others.append(torch.rand(4)))
        thread.start()
        thread.join()
    assert not torch.equal(torch.rand(4), others[0])


def test_threads_that_draw_from_copies_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    torch.rand(2)
    start = RandomState.of([])
    wrong: list[int] = []
    works = [DRAWS["rand"], DRAWS["rand"], DRAWS["attention"]]  # the last one borrows the global generator

    def draw(work: Callable[[], Any]) -> Any:
        with Drawing(start):
            return [work() for _ in range(3)]

    def check(work: Callable[[], Any], want: Any) -> None:
        for _ in range(150):
            got = draw(work)
            wrong.extend(1 for a, b in zip(got, want, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=check, args=(work, draw(work))) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.initial_seed() == 0
    assert RandomState.of([]).equals(start)


def test_one_number_seeds_a_generator_on_the_cpu() -> None:
    def source() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    one, other = source(), source()
    torch.randint(2**63 - 1, (), generator=other)
    first, second = cpu_generator(one), cpu_generator(source())
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    assert torch.equal(one.get_state(), other.get_state())
