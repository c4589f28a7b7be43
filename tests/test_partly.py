"""A step that updates some members after others is the step that has all gradients first, in less memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from hypothesis import given
from hypothesis import strategies as st
from measure import peak_memory
from oracle import assert_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe

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
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9, dampening=0.5, nesterov=False, maximize=True),
}


def _net() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _batch() -> tuple[Tensor, Tensor]:
    return randn(6, 3), torch.randint(4, (6,))


def _copy(params: fe.EnsembleParams) -> fe.EnsembleParams:
    return fe.EnsembleParams({}, {k: v.detach().clone().requires_grad_() for k, v in params.stacked.items()})


def _state(optimizer: torch.optim.Optimizer) -> Any:
    """As plain values, in the order of the parameters."""
    return optimizer.state_dict()["state"]


@given(
    optimiser=st.sampled_from(sorted(BY_NUMBER)),
    E=st.integers(2, 5),
    chunk_size=st.integers(1, 4),
    clip=st.sampled_from([None, 0.1]),
    frozen=st.booleans(),
    whole_first=st.booleans(),
)
def test_partly_is_wholly(
    optimiser: str, E: int, chunk_size: int, clip: float | None, frozen: bool, whole_first: bool
) -> None:
    model = _net()
    start = fe.ensemble_params(model, E)
    runs = []
    for at_once in (True, False):
        params, buffers = _copy(start), fe.ensemble_buffers(model, E)
        trained = {k: v.requires_grad_(not (frozen and k == "1.bias")) for k, v in params.stacked.items()}
        optimizer = BY_NUMBER[optimiser](trained.values(), lr=0.01)
        forward = fe.make_forward(model, chunk_size=chunk_size)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, clip_norm=clip, compile=False)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        torch.manual_seed(1)
        losses = []
        for number in range(4):
            batch = _batch()
            if at_once or (whole_first and number == 0):
                found = step.compute(params, *batch, buffers=buffers)
                buffers = step.update(params, found, buffers)
                losses.append(found.losses)
            else:
                each, buffers = step(params, *batch, buffers=buffers)
                losses.append(each)
            scheduler.step()
        assert all(tensor.grad is None for tensor in trained.values())
        held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        assert [id(tensor) for tensor in held] == [id(tensor) for tensor in trained.values()]
        runs.append((tree_leaves(params), buffers, losses, _state(optimizer)))
    assert_same(runs[1], runs[0], tolerance=1e-12)


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
            if at_once:
                step.update(params, step.compute(params, *(batch := _batch())))
            else:
                step(params, *(batch := _batch()))
        assert batch
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
    ],
)
def test_only_what_is_the_same_is_done_partly(make: Any, options: dict[str, Any], rows: list[int]) -> None:
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = make(tree_leaves(params))
    found: list[int] = []
    optimizer.register_step_pre_hook(lambda it, *_: found.append(len(it.param_groups[0]["params"][0])))
    step = fe.make_train_step(
        fe.make_forward(model, strategy="loop"), F.cross_entropy, optimizer, compile=False, **options
    )
    step(params, *_batch())
    assert found == rows
    step.stopped.add(1)
    step(params, *_batch())
    assert found == [*rows, 3]


def test_what_all_share_is_updated_once() -> None:
    model = _net().eval()
    params = fe.batchensemble_params(model, 3)
    optimizer = torch.optim.Adam(tree_leaves(params))
    found: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: found.append(1))
    step = fe.make_train_step(fe.make_forward(model, strategy="loop"), F.cross_entropy, optimizer, compile=False)
    step(params, *_batch())
    assert found == [1]


def test_an_error_of_the_optimiser_leaves_it_whole() -> None:
    model = _net().eval()
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.Adam(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model, strategy="loop"), F.cross_entropy, optimizer, compile=False)
    step(params, *_batch())
    before, tensors = _state(optimizer), [id(tensor) for tensor in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0]["lr"] = "much"
    with pytest.raises(TypeError):
        step(params, *_batch())
    assert [id(tensor) for tensor in optimizer.param_groups[0]["params"]] == tensors
    assert all(tensor.grad is None for tensor in tree_leaves(params))
    assert_same(_state(optimizer), before, tolerance=0)


@pytest.mark.parametrize("slices", [False, True])
def test_the_gradients_of_one_member_are_in_memory(slices: bool) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    params, x = fe.ensemble_params(model, 8), torch.randn(4, 64)
    rates = torch.full((8,), 0.1)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=rates) if slices else tree_leaves(params), lr=0.1)
    step = fe.make_train_step(fe.make_forward(model, chunk_size=1), F.mse_loss, optimizer, compile=False)
    one = sum(tensor[0].nbytes for tensor in tree_leaves(params))
    assert peak_memory(partial(step, params, x, x), torch.device("cpu")) < 2.5 * one


def test_a_part_of_a_sweep_steps_the_members_of_it() -> None:
    """Slices of an optimiser are stepped with the part that their member is in, others not at all."""
    model = _net().eval()
    params = fe.ensemble_params(model, 5)
    start, rates = _copy(params), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=rates))
    step = fe.make_train_step(fe.make_forward(model, chunk_size=2), F.cross_entropy, optimizer, compile=False)
    batch = _batch()
    gradients = {name: gradient.clone() for name, gradient in step.gradients(params, *batch).gradients.items()}
    counts: list[int] = []
    optimizer.register_step_pre_hook(
        lambda it, *_: counts.append(sum(t.grad is not None for group in it.param_groups for t in group["params"]))
    )
    step(params, *batch)
    assert counts == [2 * len(gradients), 2 * len(gradients), len(gradients)]
    for name, stack in params.stacked.items():
        by_member = rates.reshape(-1, *[1] * (stack.ndim - 1))
        assert_same(stack.detach(), (start.stacked[name] - by_member * gradients[name]).detach(), tolerance=1e-12)


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
        assert optimizer.param_groups[0]["fused"]
        for _ in range(3):
            step(params, x, y)
        trained.append(params)
    assert_same(trained[1], trained[0], tolerance=1e-12)
