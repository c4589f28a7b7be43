"""An update of some members after others is that of all at once, in less memory."""

from __future__ import annotations

from copy import deepcopy
from functools import partial, wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from hypothesis import given
from hypothesis import strategies as st
from measure import peak_memory
from oracle import assert_same, compiler
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens.training import update as updates
from functorch_ens.training.step import advance, gradients_in_place

BACKEND = compiler()

BY_NUMBER: dict[str, Any] = {
    "Adadelta": partial(torch.optim.Adadelta, weight_decay=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr_decay=0.1),
    "Adam": torch.optim.Adam,
    "Adam amsgrad": partial(torch.optim.Adam, amsgrad=True, foreach=True),
    "Adamax": torch.optim.Adamax,
    "AdamW": partial(torch.optim.AdamW, fused=False, weight_decay=0.3),
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": torch.optim.SGD,
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9, dampening=0.5, maximize=True),
}


pytestmark = pytest.mark.usefixtures("small_members_are_updated_in_parts")


def _net() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _batch() -> tuple[Tensor, Tensor]:
    return randn(6, 3), torch.randint(4, (6,))


def _copy(params: fe.EnsembleParams) -> fe.EnsembleParams:
    return fe.EnsembleParams({}, {k: v.detach().clone().requires_grad_() for k, v in params.stacked.items()})


def _state(optimizer: torch.optim.Optimizer) -> Any:
    """As plain values, in the order of the parameters."""
    state = deepcopy(optimizer.state_dict()["state"])
    return {number: dict(sorted(state[number].items())) for number in sorted(state)}


def _counted(optimizer: torch.optim.Optimizer) -> list[int]:
    """Filled with the members of each step of `optimizer`. (It has no hook: with hooks, nothing is parted.)"""
    rows: list[int] = []
    step = optimizer.step

    @wraps(step)
    def counting() -> None:
        rows.append(max(len(tensor) for tensor in optimizer.param_groups[0]["params"] if tensor.ndim == 3))
        step()

    optimizer.step = counting  # type: ignore[assignment, method-assign]
    return rows


@given(
    optimiser=st.sampled_from(sorted(BY_NUMBER)),
    E_and_size=st.integers(2, 5).flatmap(lambda E: st.tuples(st.just(E), st.integers(1, E - 1))),
    strategy=st.sampled_from(["vmap", "loop"]),
    clip=st.sampled_from([None, 0.1]),
    frozen=st.booleans(),
    whole_first=st.booleans(),
    loaded=st.booleans(),
    stopped=st.sets(st.integers(0, 1)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_partly_is_wholly(
    optimiser: str,
    E_and_size: tuple[int, int],
    strategy: str,
    clip: float | None,
    frozen: bool,
    whole_first: bool,
    loaded: bool,
    stopped: set[int],
    dtype: torch.dtype,
) -> None:
    """Parameters, statistics and state of the optimiser; also after a checkpoint of it was loaded in between."""
    (E, size), model = E_and_size, _net().to(dtype)
    start = fe.ensemble_params(model, E)
    runs = []
    for at_once in (True, False):
        params, buffers = _copy(start), fe.ensemble_buffers(model, E)
        trained = {k: v.requires_grad_(not (frozen and k == "1.bias")) for k, v in params.stacked.items()}
        optimizer = BY_NUMBER[optimiser](trained.values(), lr=0.01)
        forward = fe.make_forward(model, strategy=strategy, chunk_size=size)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, clip_norm=clip, compile=False)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        rows = _counted(optimizer)
        torch.manual_seed(1)
        losses = []
        for number in range(4):
            x, y = _batch()
            if at_once or (whole_first and number == 0):
                found = gradients_in_place(step, params, x.to(dtype), y, buffers=buffers)
                buffers = step.update(params, found, buffers)
                losses.append(found.losses)
            else:
                each, buffers = step(params, x.to(dtype), y, buffers=buffers)
                losses.append(each)
            scheduler.step()
            step.stopped = set(stopped) if number else set()
            if loaded and number == 1:
                optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        assert set(rows[1:]) == ({E} if at_once else {1} if strategy == "loop" else {size, E % size} - {0})
        assert all(tensor.grad is None for tensor in trained.values())
        held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        assert [id(tensor) for tensor in held] == [id(tensor) for tensor in trained.values()]
        runs.append((tree_leaves(params), buffers, losses, _state(optimizer)))
    assert_same(runs[1], runs[0], tolerance=1e-12 if dtype == torch.float64 else 1e-5)


def test_an_optimiser_that_begins_a_state_later() -> None:
    """Momentum that is turned on after a step without: the first gradient becomes it, as torch has it."""
    runs = []
    model = _net().eval()
    start = fe.ensemble_params(model, 3)
    for at_once in (True, False):
        params = _copy(start)
        optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1, dampening=0.5)
        step = fe.make_train_step(fe.make_forward(model, chunk_size=1), F.cross_entropy, optimizer, compile=False)
        torch.manual_seed(1)
        for number in range(4):
            optimizer.param_groups[0]["momentum"] = 0.9 if number else 0.0
            batch = _batch()
            if at_once:
                step.update(params, gradients_in_place(step, params, *batch))
            else:
                step(params, *batch)
        runs.append((tree_leaves(params), _state(optimizer)))
    assert_same(runs[1], runs[0], tolerance=1e-12)


class _OfOnesOwn(torch.optim.Adam):
    """It could compute anything."""


@pytest.mark.parametrize(
    ("make", "options", "rows"),
    [
        (torch.optim.Adam, {}, [1, 1, 1]),
        (torch.optim.Adam, {"clip_norm": 1.0}, [1, 1, 1]),
        (torch.optim.Adam, {"clip_norm": 1.0, "clip_by": "ensemble"}, [3]),
        (torch.optim.Adam, {"accumulate": 2}, [3]),
        (torch.optim.Adafactor, {}, [3]),
        (_OfOnesOwn, {}, [3]),
        (partial(torch.optim.Adam, differentiable=True, foreach=False), {}, [3]),
    ],
)
def test_only_what_is_the_same_is_done_partly(make: Any, options: dict[str, Any], rows: list[int]) -> None:
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = make(tree_leaves(params))
    found = _counted(optimizer)
    step = fe.make_train_step(
        fe.make_forward(model, strategy="loop"), F.cross_entropy, optimizer, compile=False, **options
    )
    if optimizer.defaults.get("differentiable"):  # torch: a leaf cannot be updated in place then
        with pytest.raises(RuntimeError, match="leaf Variable"):
            step(params, *_batch())
    else:
        step(params, *_batch())
    assert found == rows


@pytest.mark.parametrize("of_all", [False, True])
def test_hooks_see_a_whole_step(of_all: bool) -> None:
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.Adam(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model, strategy="loop"), F.cross_entropy, optimizer, compile=False)
    norms: list[float] = []

    def look(*_: Any) -> None:
        norms.append(torch.nn.utils.clip_grad_norm_(tree_leaves(params), 1.0).item())

    handle = register_optimizer_step_pre_hook(look) if of_all else optimizer.register_step_pre_hook(look)
    batch = _batch()
    gradients = step.gradients(params, *batch).gradients.values()
    step(params, *batch)
    handle.remove()
    assert norms == [pytest.approx(torch.nn.utils.get_total_norm(gradients).item())]


def test_small_members_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 2, bias=False))  # 96 and 64 bytes
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.Adam(tree_leaves(params))
    rows = _counted(optimizer)
    step = fe.make_train_step(fe.make_forward(model, chunk_size=1), F.mse_loss, optimizer, compile=False)
    for small, expected in ((80, [1, 1, 1]), (81, [3])):
        monkeypatch.setattr(updates, "SMALL", small)
        rows.clear()
        step(params, torch.ones(4, 3), torch.ones(4, 2))
        assert rows == expected


def test_what_all_share_is_updated_once() -> None:
    """Also a single number, trained or not."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)).double()
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float64)))
    params = fe.ensemble_params(model, 3, stacked="[01].*", reset=False)
    optimizer = torch.optim.Adam(tree_leaves(params))
    rows = _counted(optimizer)
    step = fe.make_train_step(fe.make_forward(model, strategy="loop"), F.cross_entropy, optimizer, compile=False)
    step(params, *_batch())
    assert rows == [3]
    params.shared["scale"].requires_grad_(False)
    step(params, *_batch())
    assert rows == [3, 1, 1, 1]


def test_an_error_on_the_way_leaves_the_optimiser_whole() -> None:
    """In the second part: the first has been updated, but its step is not counted."""
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.Adam(tree_leaves(params))
    forward = fe.make_forward(model, strategy="loop", member_inputs=True)
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=False)
    x, y = randn(3, 6, 3), torch.randint(4, (3, 6))
    step(params, x, y)
    before, start = _state(optimizer), _copy(params)
    wrong = y.clone()
    wrong[1, 2] = 9
    with pytest.raises(ValueError, match="labels: expected 0 <= y < 4"):
        step(params, x, wrong)
    assert [id(t) for t in optimizer.param_groups[0]["params"]] == [id(t) for t in tree_leaves(params)]
    assert all(tensor.grad is None for tensor in tree_leaves(params))
    for (number, now), tensor, was in zip(
        _state(optimizer).items(), tree_leaves(params), tree_leaves(start), strict=True
    ):
        assert not torch.equal(tensor[0], was[0])
        assert_same(tensor[1:].detach(), was[1:].detach(), tolerance=0)
        assert_same(now["exp_avg"][1:], before[number]["exp_avg"][1:], tolerance=0)
        assert now["step"] == before[number]["step"] == 1


# Adagrad has its state from the start, in which the parts before the error have been counted.
@pytest.mark.parametrize("optimiser", sorted(BY_NUMBER.keys() - {"Adagrad"}))
def test_a_first_step_that_fails_half_way_leaves_no_state(optimiser: str) -> None:
    """... so the next one is a first step."""
    model = _net().eval()
    params, (x, y) = fe.ensemble_params(model, 3), (randn(3, 6, 3), torch.randint(4, (3, 6)))
    forward, wrong = fe.make_forward(model, chunk_size=1, member_inputs=True), y.clone()
    wrong[2, 2] = 9
    optimizer = BY_NUMBER[optimiser](tree_leaves(params), lr=0.01)
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=False)
    with pytest.raises(ValueError, match="labels: expected 0 <= y < 4"):
        step(params, x, wrong)
    start = _copy(params)
    other = BY_NUMBER[optimiser](tree_leaves(start), lr=0.01)
    whole = fe.make_train_step(forward, F.cross_entropy, other, compile=False)
    for _ in range(2):
        step(params, x, y)
        whole.update(start, gradients_in_place(whole, start, x, y))
    assert_same((tree_leaves(params), _state(optimizer)), (tree_leaves(start), _state(other)), tolerance=1e-12)


def test_a_frozen_tensor_with_an_old_gradient_stays() -> None:
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    frozen = params.stacked["1.bias"].requires_grad_(False)
    frozen.grad, before = torch.ones_like(frozen), frozen.clone()
    rows = _counted(optimizer)
    fe.make_train_step(fe.make_forward(model, chunk_size=2), F.cross_entropy, optimizer, compile=False)(
        params, *_batch()
    )
    assert rows == [2, 1] and torch.equal(frozen, before)


def test_members_that_stop_when_their_losses_are_seen_stay_as_they_were() -> None:
    model = _net().train()
    for chunk_size, seen in ((1, [0, 1, 2]), (2, [0, 2]), (None, [0])):
        params, buffers = fe.ensemble_params(model, 3), fe.ensemble_buffers(model, 3)
        optimizer = torch.optim.Adam(tree_leaves(params))
        forward = fe.make_forward(model, chunk_size=chunk_size)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=False)
        start, firsts = _copy(params), []

        def look(first: int, losses: Tensor) -> None:
            firsts.append(first)  # noqa: B023
            step.stopped.update({1} & set(range(first, first + len(losses))))  # noqa: B023

        _, new = advance(step, params, _batch(), buffers, {}, look=look)
        assert firsts == seen
        for now, before in (
            *((params.stacked[name].detach(), start.stacked[name].detach()) for name in params.stacked),
            *((new[name], buffers[name]) for name in buffers),
        ):
            same = [torch.equal(now[i], before[i]) for i in range(3)]
            assert same == [False, True, False]
        step.stopped = {7}
        moved = _copy(params)
        with pytest.raises(ValueError, match=r"stopped: expected numbers of members, from 0 to 2, got \[7\]"):
            step(params, *_batch(), buffers=new)
        assert_same(tree_leaves(params), tree_leaves(moved), tolerance=0)


def test_a_stopped_member_leaves_no_nan_in_the_state() -> None:
    model = _net().eval()
    for chunk_size in (1, None):
        params = fe.ensemble_params(model, 2)
        optimizer = torch.optim.Adam(tree_leaves(params))
        forward = fe.make_forward(model, chunk_size=chunk_size, member_inputs=True)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=False)
        x, y = randn(2, 6, 3), torch.randint(4, (2, 6))
        x[1] = float("nan")
        step.stopped = {1}
        found = gradients_in_place(step, params, x, y)
        assert found.gradients["1.weight"][1].isnan().all()
        step.update(params, found)
        assert found.gradients["1.weight"][1].isnan().all()  # it is the caller's
        step(params, x, y)
        assert all(value.isfinite().all() for state in _state(optimizer).values() for value in state.values())


def test_compiled_parts_are_updated_as_the_whole() -> None:
    model = _net().train()
    start, runs = fe.ensemble_params(model, 3), []
    for at_once in (True, False):
        params, buffers = _copy(start), fe.ensemble_buffers(model, 3)
        optimizer = torch.optim.Adam(tree_leaves(params))
        rows = _counted(optimizer)
        forward = fe.make_forward(model, chunk_size=2)
        step = fe.make_train_step(
            forward, F.cross_entropy, optimizer, compile=False if at_once else {"backend": BACKEND}
        )
        torch.manual_seed(1)
        for _ in range(3):
            batch = _batch()
            if at_once:
                buffers = step.update(params, gradients_in_place(step, params, *batch, buffers=buffers), buffers)
            else:
                _, buffers = step(params, *batch, buffers=buffers)
        runs.append((tree_leaves(params), buffers, _state(optimizer)))
    assert step.compiled_by == ("functorch_ens" if BACKEND == "inductor" else step.compiled_by), step.reason
    assert rows == [2, 1] * 3
    assert_same(runs[1], runs[0], tolerance=1e-9)


def test_a_state_stays_the_same_tensors_and_an_old_gradient_is_not_used() -> None:
    """As by a step of torch; a CUDA graph would know them by their place."""
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.Adam(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model, chunk_size=2), F.cross_entropy, optimizer, compile=False)
    rows = _counted(optimizer)
    step(params, *_batch())
    before = {number: dict(state) for number, state in optimizer.state_dict()["state"].items()}
    params.stacked["1.weight"].grad = old = torch.full_like(params.stacked["1.weight"], 9.0)
    step(params, *_batch())
    assert rows == [2, 1, 2, 1] and [x.grad for x in params.stacked.values() if x.grad is not None] == [old]
    for number, state in optimizer.state_dict()["state"].items():
        assert state["step"] == 2 and all(value is before[number][key] for key, value in state.items())


def test_the_gradients_of_one_member_are_in_memory() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    params, x = fe.ensemble_params(model, 8), torch.randn(4, 64)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    step = fe.make_train_step(fe.make_forward(model, chunk_size=1), F.mse_loss, optimizer, compile=False)
    one = sum(tensor[0].nbytes for tensor in tree_leaves(params))
    assert peak_memory(partial(step, params, x, x), torch.device("cpu")) < 2.5 * one


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_a_sweep_keeps_its_state_and_leaves_what_is_frozen(chunk_size: int | None) -> None:
    """Slices and whole stacks in one optimiser, stepped together."""
    model = _net().eval()
    start, runs = fe.batchensemble_params(model, 3, bias="stacked"), []
    for tensor in start.shared.values():
        tensor.requires_grad_(False)
    for chunk in (None, chunk_size):
        params = fe.EnsembleParams(
            start.shared, {name: stack.detach().clone().requires_grad_() for name, stack in start.stacked.items()}
        )
        optimizer = torch.optim.AdamW(
            fe.param_groups(params, lr=1e-2, rank1_weight_decay=torch.tensor([0.0, 0.1, 0.2]))
        )
        params.stacked["3.weight_r"].requires_grad_(False)
        step = fe.make_train_step(fe.make_forward(model, chunk_size=chunk), F.cross_entropy, optimizer, compile=False)
        torch.manual_seed(1)
        for _ in range(4):
            step(params, *_batch())
        runs.append((params.stacked, _state(optimizer)))
    assert_same(runs[1], runs[0], tolerance=1e-12)


def test_members_that_do_not_lie_one_after_another_in_memory_are_updated_together() -> None:
    """Rows of such a stack have gaps, which a fused kernel would write to."""
    model, x, y = nn.Linear(3, 2).double(), randn(5, 3), randn(5, 2)
    start, trained = fe.ensemble_params(model, 4), []
    for apart in (True, False):
        params = _copy(start)
        if not apart:
            weight = params.stacked["weight"].detach()
            params.stacked["weight"] = weight.permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
        optimizer = torch.optim.Adam(tree_leaves(params), lr=0.1)
        step = fe.make_train_step(fe.make_forward(model, chunk_size=1), F.mse_loss, optimizer, compile=False)
        for _ in range(3):
            step(params, x, y)
        trained.append(params)
    assert_same(trained[1], trained[0], tolerance=1e-12)
