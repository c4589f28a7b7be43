"""Hyperparameters of each member's own are those of separate runs; groups for r and s; what an optimiser trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe

# Of the last two, one step depends on a tensor as a whole: a stack would not be E tensors to them.
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "Adam foreach": partial(torch.optim.Adam, foreach=True),
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "Muon": torch.optim.Muon,
}
LR, DECAY = torch.tensor([0.1, 0.01, 0.003]), torch.tensor([0.0, 0.1, 0.3])


def _net(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)).double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [(randn(6, 3), torch.randint(4, (6,))) for _ in range(10)]


@pytest.mark.parametrize(
    ("optimiser", "chunk_size", "compile"),
    [(name, chunk_size, False) for name in OPTIMISERS for chunk_size in (None, 1)] + [("Adam", None, True)],
)
def test_a_sweep_is_as_many_separate_runs(optimiser: str, chunk_size: int | None, compile: bool) -> None:
    make, model = OPTIMISERS[optimiser], _net(bias=optimiser != "Muon")  # Muon trains matrices only
    start = fe.ensemble_params(model, 3)
    params = fe.EnsembleParams({}, {k: v.detach().clone().requires_grad_() for k, v in start.stacked.items()})
    optimizer = make(fe.param_groups(params, lr=LR, weight_decay=DECAY))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    forward = fe.make_forward(model, chunk_size=chunk_size)
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile={"backend": "eager"} if compile else False)
    for x, y in _batches():
        step(params, x, y)
        scheduler.step()
    for i in range(3):
        alone = _net(bias=optimiser != "Muon")
        alone.load_state_dict(fe.member_params(model, start, i))
        optimizer = make(alone.parameters(), lr=LR[i].item(), weight_decay=DECAY[i].item())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for x, y in _batches():
            optimizer.zero_grad()
            F.cross_entropy(alone(x), y).backward()
            optimizer.step()
            scheduler.step()
        # Muon computes in bfloat16, where rounding may go either way.
        assert_same(
            fe.member_params(model, params, i),
            dict(alone.named_parameters()),
            tolerance=1e-9 if optimiser != "Muon" else 1e-3,
        )


def test_the_groups_of_a_batchensemble() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    model[1].weight.requires_grad_(False)
    params = fe.batchensemble_params(model, 3, stacked="2.bias")
    shared, rank1, own = fe.param_groups(params, lr=0.1, weight_decay=0.2, rank1_lr_factor=0.5, betas=(0.8, 0.9))
    vectors = [name for name in params.stacked if name.endswith(("_r", "_s"))]
    assert [shared["name"], rank1["name"], own["name"]] == ["shared", "rank-1", "stacked"]
    for group, tensors, lr, decay in (
        (shared, [t for name, t in params.shared.items() if name != "1.weight"], 0.1, 0.2),
        (rank1, [params.stacked[name] for name in vectors], 0.05, 0.0),
        (own, [params.stacked["2.bias"]], 0.1, 0.2),
    ):
        assert len(group["params"]) == len(tensors)
        assert all(a is b for a, b in zip(group["params"], tensors, strict=True))
        assert (group["lr"], group["weight_decay"], group["betas"]) == (lr, decay, (0.8, 0.9))
    assert fe.param_groups(params)[0].keys() == {"name", "params"}
    by_default = torch.optim.AdamW(fe.param_groups(params), weight_decay=0.3)
    assert [group["weight_decay"] for group in by_default.param_groups] == [0.3, 0.0, 0.3]
    assert fe.param_groups(params, lr=0.1, weight_decay=0.2, rank1_weight_decay=0.3)[1]["weight_decay"] == 0.3


def test_r_and_s_do_not_decay_and_learn_at_their_own_rate() -> None:
    """By hand: an SGD step is p - lr (g + decay p)."""
    model, x, y = _net(bias=True), randn(6, 3), torch.randint(4, (6,))
    params = fe.batchensemble_params(model, 3)
    before = {name: tensor.detach().clone() for part in params for name, tensor in part.items()}
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.1, weight_decay=0.5, rank1_lr_factor=3.0))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    slopes = step.gradients(params, x, y).gradients
    step(params, x, y)
    for part in params:
        for name, tensor in part.items():
            lr, decay = (0.3, 0.0) if name in params.stacked else (0.1, 0.5)
            want = before[name] - lr * (slopes[name] + decay * before[name])
            assert_same(tensor.detach(), want, tolerance=1e-12)


def test_some_members_alone_may_be_trained() -> None:
    model, x, y = _net(bias=True), randn(6, 3), torch.randint(4, (6,))
    params = fe.ensemble_params(model, 3)
    before = {name: stack.detach().clone() for name, stack in params.stacked.items()}
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=LR)[1:2])
    fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)(params, x, y)
    for name, stack in params.stacked.items():
        changed = (stack != before[name]).flatten(1).any(1)
        assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("kind", [list, np.array])
def test_numbers_for_each_member_may_be_a_list_or_an_array(kind: Any) -> None:
    params = fe.ensemble_params(_net(bias=True), 3)
    groups = fe.param_groups(params, lr=kind([0.1, 0.2, 0.3]), betas=[0.8, 0.9])
    assert [(group["lr"], group["betas"]) for group in groups] == [(lr, [0.8, 0.9]) for lr in (0.1, 0.2, 0.3)]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *(("lr", bad, ValueError) for bad in (float("nan"), float("inf"), -0.1)),
        *(("weight_decay", bad, TypeError) for bad in (True, 1j, "x", None)),
        ("momentum", torch.tensor([0.1, float("nan"), 0.1]), ValueError),
        ("momentum", [0.1, -0.1, 0.1], ValueError),
        ("lr", torch.ones(3, dtype=torch.complex64), TypeError),
        ("betas", (0.9, float("nan")), ValueError),
        ("anything", 1j, TypeError),
    ],
)
def test_numbers_that_no_optimiser_takes(name: str, value: Any, error: type[Exception]) -> None:
    params = fe.ensemble_params(_net(bias=True), 3)
    with pytest.raises(error, match=f"^{name}: expected "):
        fe.param_groups(params, **{name: value})
    if not isinstance(value, Tensor | list) and name != "anything":
        group = {"params": tree_leaves(params), "lr": 0.1, name: value}
        with pytest.raises((TypeError, ValueError)):  # torch's own, or of the step where torch has none
            optimizer = torch.optim.SGD([group]) if name != "betas" else torch.optim.Adam([group])
            fe.make_train_step(fe.make_forward(_net(bias=True)), F.cross_entropy, optimizer)


def test_a_hyperparameter_that_the_optimiser_does_not_have() -> None:
    model = _net(bias=True)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)

    class Own(torch.optim.SGD):
        """An optimiser with a key in its groups that its defaults do not have."""

    Own.__module__ = "mine"
    for make, values, message in (
        (torch.optim.AdamW, {"wieght_decay": 0.1}, r"'wieght_decay', which group 0 \(stacked\) has; is 'weight_decay'"),
        (torch.optim.AdamW, {"momentum": 0.1}, "AdamW has no hyperparameter 'momentum'"),
        (Own, {"momentun": 0.1}, "Own has no hyperparameter 'momentun', .* is 'momentum' meant?"),
    ):
        optimizer = make(fe.param_groups(params, lr=0.1, **values))
        with pytest.raises(ValueError, match=f"optimizer: .*{message}"):
            fe.make_train_step(forward, F.cross_entropy, optimizer)
    fe.make_train_step(forward, F.cross_entropy, Own(fe.param_groups(params, lr=0.1, depth=3)))
    rank1 = fe.param_groups(fe.batchensemble_params(model, 3), lr=0.1)
    fe.make_train_step(forward, F.cross_entropy, torch.optim.Rprop(rank1))  # which has no weight decay
    optimizer = torch.optim.AdamW(fe.param_groups(params, lr=torch.ones(3), betas=[0.8, 0.9]))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    fe.make_train_step(forward, F.cross_entropy, optimizer)
    with pytest.raises(ValueError, match="name: param_groups names its groups itself, got 'mine'"):
        fe.param_groups(params, lr=0.1, name="mine")


def test_bad_arguments() -> None:
    model = _net(bias=True)
    classic, batch = fe.ensemble_params(model, 3), fe.batchensemble_params(model, 3)
    with pytest.raises(TypeError, match="params: expected EnsembleParams, got dict"):
        fe.param_groups(classic.stacked)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ValueError, match=r"lr: expected \[3, ...\], one for each member, got the shape \[4\]"):
        fe.param_groups(classic, lr=torch.ones(4))
    with pytest.raises(ValueError, match=r"lr: expected one number for each member, got the shape \[3, 1\]"):
        fe.param_groups(classic, lr=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"lr: expected one number, got \[3\], .* all members share 4 trained tensors"):
        fe.param_groups(batch, lr=torch.ones(3))
    with pytest.raises(TypeError, match="rank1_weight_decay: expected a finite number >= 0, got 'no'"):
        fe.param_groups(batch, rank1_weight_decay="no")  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ValueError, match="rank1_lr_factor: expected lr too"):
        fe.param_groups(batch, rank1_lr_factor=0.5)
    with pytest.raises(ValueError, match="rank1_lr_factor: expected a finite number >= 0, got -1"):
        fe.param_groups(batch, lr=1.0, rank1_lr_factor=-1)
    twice = torch.optim.SGD([*tree_leaves(classic), *fe.param_groups(classic, lr=torch.ones(3))[0]["params"]], lr=0.1)
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, twice, compile=False)
    with pytest.raises(ValueError, match=r"the optimizer trains 0.weight twice: as a whole and by members, or"):
        step(classic, randn(6, 3), torch.zeros(6).long())
    groups = [fe.param_groups(classic, lr=torch.ones(3))[1] for _ in range(2)]
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, torch.optim.SGD(groups), compile=False)
    with pytest.raises(ValueError, match=r"the optimizer trains 0.weight twice: as a whole and by members, or"):
        step(classic, randn(6, 3), torch.zeros(6).long())
    other: Any = fe.param_groups(fe.ensemble_params(model, 3), lr=LR)
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, torch.optim.SGD(other), compile=False)
    with pytest.raises(ValueError, match="the optimizer trains 12 of its 12 tensors elsewhere"):
        step(classic, randn(6, 3), torch.zeros(6).long())
