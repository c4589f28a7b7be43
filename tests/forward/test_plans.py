"""Plans: their order, how many members they compute at a time, and what they say when they are fallen back to."""

from __future__ import annotations

import pytest

from functorch_ens.forward.plans import HelpedVmap, Loop, Plan, Vmap, plans_for


@pytest.mark.parametrize(
    ("strategy", "obstacle", "kinds"),
    [
        ("auto", None, [Vmap, HelpedVmap, Loop]),
        ("auto", "it is a GRU", [Loop]),
        ("vmap", None, [Vmap, HelpedVmap, Loop]),
        ("loop", None, [Loop]),
        ("loop", "it is a GRU", [Loop]),
    ],
)
def test_the_plans_in_order(strategy: str, obstacle: str | None, kinds: list[type[Plan]]) -> None:
    plans = plans_for(strategy, "different", 2, obstacle)
    assert [type(plan) for plan in plans] == kinds
    assert all((plan.randomness, plan.chunk_size) == ("different", 2) for plan in plans)
    assert [plan.probe for plan in plans] == [False] * (len(plans) - 1) + [strategy == "vmap"]


def test_vmap_against_an_obstacle_is_refused() -> None:
    with pytest.raises(RuntimeError, match='strategy: got "vmap", but it is a GRU; strategy="loop" can'):
        plans_for("vmap", "different", None, "it is a GRU")


@pytest.mark.parametrize(
    ("plan", "at_a_time"),
    [
        (Vmap("different", None), 5),
        (Vmap("different", 2), 2),
        (Vmap("different", 9), 5),
        (Vmap("same", 2), 5),
        (HelpedVmap("different", 3), 3),
        (Loop("different", None), 1),
        (Loop("error", None), 5),
    ],
)
def test_members_at_a_time(plan: Plan, at_a_time: int) -> None:
    assert plan.at_a_time(5) == at_a_time
    assert plan.one_by_one is isinstance(plan, Loop)


def test_convolutions_of_their_own_are_looped_over_by_vmap_alone() -> None:
    assert isinstance(Vmap("same", 2).for_own_convolutions(), Loop)
    assert Vmap("same", 2).for_own_convolutions().chunk_size == 2
    loop = Loop("different", None)
    assert loop.for_own_convolutions() is loop


def test_a_fallback_says_where_vmap_failed() -> None:
    assert Loop("different", None).reason("body (GRU)") == "vmap failed in body (GRU)"
    assert "body (GRU)" in HelpedVmap("different", None).reason("body (GRU)")
