"""aligned: every line of a table has the same length, and the rulers are where they belong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functorch_ens.tables import aligned

_WORDS = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=8)


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(_WORDS, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_all_lines_have_one_length_and_every_cell_is_there(rows: list[list[str]]) -> None:
    head, ruler, *body = aligned(rows).split("\n")
    assert len({len(line) for line in (head, ruler, *body)}) == 1 and set(ruler) <= {"-"}
    for line, row in zip((head, *body), rows, strict=True):
        assert line.split() == [cell for cell in row if cell]


def test_columns_are_aligned_left_and_then_right() -> None:
    rows = [["a", "bb", "c"], ["long", "b", "100"]]
    assert aligned(rows).splitlines() == ["a     bb    c", "-------------", "long   b  100"]
    assert aligned(rows, left=2).splitlines() == ["a     bb    c", "-------------", "long  b   100"]
    assert aligned(rows, left=0).splitlines() == ["   a  bb    c", "-------------", "long   b  100"]
    assert aligned(rows, left=3).splitlines() == ["a     bb  c  ", "-------------", "long  b   100"]


def test_a_second_ruler_is_above_the_totals() -> None:
    lines = aligned([["a"], ["b"], ["c"], ["d"]], totals=2).splitlines()
    assert lines == ["a", "-", "b", "-", "c", "d"]


def test_empty_tables() -> None:
    assert aligned([]) == ""
    assert aligned([["name", "ms"]]) == "name  ms\n--------"


def test_rows_of_different_lengths_are_an_error() -> None:
    for rows in ([["a", "b"], ["c"]], [["a"], ["b", "c"]]):
        with pytest.raises(ValueError):
            aligned(rows)
