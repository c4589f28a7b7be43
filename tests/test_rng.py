"""Random state: drawn from elsewhere and put back, and the same or different numbers for the parts of a computation."""

from __future__ import annotations

import pytest
import torch

from functorch_ens.rng import RandomState, cpu_generator, drawing_from, repeatable


def test_a_state_comes_back() -> None:
    tensors = [torch.ones(1)]
    before = RandomState.of(tensors)
    first = torch.rand(3)
    assert not before.equals(RandomState.of(tensors))
    before.restore()
    assert before.equals(RandomState.of(tensors)) and torch.equal(torch.rand(3), first)


def test_draws_inside_leave_the_global_generator_alone() -> None:
    state = RandomState.of(torch.ones(1))
    want = torch.rand(2)
    state.restore()
    with drawing_from(7):
        by_seed = torch.rand(2)
    with drawing_from(state):
        by_state = torch.rand(2)
    assert torch.equal(by_state, want) and torch.equal(torch.rand(2), want)
    assert torch.equal(by_seed, torch.rand(2, generator=torch.Generator().manual_seed(7)))
    with pytest.raises(KeyError), drawing_from(7):
        raise KeyError
    assert not torch.equal(torch.rand(2), by_seed)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_parts_draw_different_numbers_or_the_same(randomness: str) -> None:
    torch.manual_seed(0)
    parts = []
    for index in range(3):
        with repeatable(randomness, torch.ones(1), last=index == 2):
            parts.append(torch.rand(4))
    after = torch.rand(4)
    torch.manual_seed(0)
    alone = torch.rand(4)
    assert torch.equal(parts[0], alone)
    assert torch.equal(parts[1], parts[0]) is torch.equal(parts[2], parts[0]) is (randomness == "same")
    if randomness == "same":  # the last part leaves the state as one computation does
        assert torch.equal(after, torch.rand(4))


def test_any_draw_is_an_error_where_that_is_asked_for() -> None:
    with repeatable("error", torch.ones(1), last=False):
        torch.zeros(3)
    with pytest.raises(RuntimeError, match='randomness="error": the model drew'):
        with repeatable("error", torch.ones(1), last=True):
            torch.rand(1)


def test_one_number_seeds_a_generator_on_the_cpu() -> None:
    def source() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    one, other = source(), source()
    torch.randint(2**63 - 1, (), generator=other)
    first, second = cpu_generator(one), cpu_generator(source())
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    assert torch.equal(one.get_state(), other.get_state())
