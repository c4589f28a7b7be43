"""Name patterns, lists and predicates."""

from typing import Any

import pytest

from functorch_ens.params.select import select

NAMES = {"net.0.weight": 1, "net.0.bias": 2, "head.weight": 3, "Head.weight": 4}


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("net.0.weight", {"net.0.weight"}),
        ("*.weight", {"net.0.weight", "head.weight", "Head.weight"}),
        ("net.?.*", {"net.0.weight", "net.0.bias"}),
        ("[hH]ead.*", {"head.weight", "Head.weight"}),
        ("head.*", {"head.weight"}),
        (["head.*", "net.0.bias"], {"head.weight", "net.0.bias"}),
        (("head.*",), {"head.weight"}),
        ([], set()),
        (lambda name, value: value > 2 and name.islower(), {"head.weight"}),
    ],
)
def test_select(selector: Any, chosen: set[str]) -> None:
    assert select(selector, NAMES, "stacked") == chosen


@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        ("tail.*", ValueError, r"stacked: pattern 'tail.\*' matches none of \['net.0.weight'"),
        (["head.*", "nothing"], ValueError, "stacked: pattern 'nothing'"),
        (5, TypeError, "stacked: expected a name pattern, a list of patterns or a predicate .* got 5"),
        (["head.*", 5], TypeError, r"got \['head.\*', 5\]"),
    ],
)
def test_what_selects_nothing_is_an_error(selector: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(selector, NAMES, "stacked")
