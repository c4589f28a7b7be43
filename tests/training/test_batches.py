"""What each member sees: every row as often as it should be, and never a neighbour's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import functorch_ens as fe


def _sorted(batches: list[Tensor]) -> list[int]:
    return sorted(torch.cat([batch.flatten() for batch in batches]).tolist())


@given(N=st.integers(1, 40), size=st.integers(1, 12), E=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_epoch_shows_every_row_once(N: int, size: int, E: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    same = fe.index_batches(N, size, drop_last=False, generator=source)
    assert _sorted(same) == list(range(N))
    assert all(len(batch) == size for batch in same[:-1])
    own = fe.index_batches(N, size, E=E, sees="own", drop_last=False, generator=source)
    assert all(batch.shape[0] == E for batch in own)
    for i in range(E):
        assert _sorted([batch[i] for batch in own]) == list(range(N))
    if size <= N:
        full = fe.index_batches(N, size, generator=source)
        assert [len(batch) for batch in full] == [size] * (N // size)
        assert len(set(_sorted(full))) == N // size * size
    if E * size <= N:
        split = fe.index_batches(N, E * size, E=E, sees="split", generator=source)
        assert all(batch.shape == (E, size) for batch in split)
        assert len(set(_sorted(split))) == N // (E * size) * E * size


@given(N=st.integers(1, 40), E=st.integers(1, 4), data=st.data())
def test_a_bootstrap_sample_stays_each_members_own(N: int, E: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, N))
    rows = fe.bootstrap(N, E, size=size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert rows.shape == (E, size) and rows.dtype == torch.long
    assert 0 <= int(rows.min()) and int(rows.max()) < N
    batches = fe.index_batches(rows, data.draw(st.integers(1, size)), drop_last=False)
    for i in range(E):
        assert _sorted([batch[i] for batch in batches]) == sorted(rows[i].tolist())


def test_orders_differ_between_members_and_epochs_and_the_seed_repeats_them() -> None:
    def epochs() -> list[list[Tensor]]:
        source = torch.Generator().manual_seed(3)
        return [fe.index_batches(100, 50, E=2, sees="own", generator=source) for _ in range(2)]

    first, second = epochs()
    assert not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, epochs()[0], strict=True))


def test_a_bootstrap_sample_holds_what_chance_gives() -> None:
    """1 - 1/e of the rows, .632; and members that are not alike."""
    rows = fe.bootstrap(10_000, 2, generator=torch.Generator().manual_seed(0))
    assert all(abs(len(own.unique()) / 10_000 - 0.632) < 0.02 for own in rows)
    assert (rows[0] == rows[1]).double().mean() < 0.01


def test_rows_may_be_chosen() -> None:
    chosen = torch.tensor([3, 5, 8, 13])
    for sees, E in (("same", None), ("own", 2), ("split", 2)):
        batches = fe.index_batches(chosen, 2, E=E, sees=sees)
        assert set(_sorted(batches)) == {3, 5, 8, 13}
    assert fe.index_batches(chosen, 2, device="meta")[0].device.type == "meta"
    assert fe.index_batches(chosen.to(torch.uint8), 2)[0].dtype == torch.int64  # of bytes torch makes a mask


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((10, 20), {}, ValueError, "batch_size: expected at most 10, the number of rows, got 20"),
        ((10, 0), {}, ValueError, "batch_size: expected a positive int, got 0"),
        ((0, 2), {}, ValueError, "rows: expected a positive int, got 0"),
        ((torch.ones(3), 2), {}, TypeError, "rows: expected whole numbers, got torch.float32"),
        ((torch.tensor([1, -1]), 2), {}, ValueError, "rows: expected numbers from 0, got -1"),
        ((torch.ones(1, 2, 3).long(), 2), {}, ValueError, r"rows: expected \[N\] or, .* got the shape \[1, 2, 3\]"),
        ((torch.ones(2, 3).long(), 2), {"E": 3}, ValueError, "E: the rows are those of 2 members, got 3"),
        ((torch.ones(2, 4).long(), 2), {"sees": "split"}, ValueError, 'sees: "split" deals one batch out'),
        ((10, 4), {"sees": "own"}, ValueError, "E: the number of members is needed for sees='own'"),
        ((10, 4), {"sees": "all"}, ValueError, "sees: expected one of .*, got 'all'"),
        ((10, 4), {"sees": "split", "E": 3}, ValueError, "batch_size: expected a multiple of E = 3 .* got 4"),
        ((10, 4), {"sees": "split", "E": 4, "drop_last": False}, ValueError, "the last batch: expected a multiple of"),
        ((10, 4), {"drop_last": 1}, TypeError, "drop_last: expected True or False, got 1"),
        ((10, 4), {"generator": 1}, TypeError, "generator: expected a torch.Generator or None, got 1"),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fe.index_batches(*arguments, **options)


def test_a_bootstrap_larger_than_the_data() -> None:
    with pytest.raises(ValueError, match="size: a bootstrap sample is no larger than the data of 10 rows, got 11"):
        fe.bootstrap(10, 2, size=11)
    with pytest.raises(TypeError, match=r"N: expected a positive int, got 1.5"):
        fe.bootstrap(1.5, 2)  # type: ignore[arg-type]
