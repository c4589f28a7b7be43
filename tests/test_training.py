"""Training the pytree: equal to training every member alone, and the trap in Adam's fused CPU kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same, compile_whole, materialise
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_leaves

import functorch_ens as fe

OPTIMISERS: dict[str, Any] = {
    "SGD": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda tensors: torch.optim.Adam(tensors, lr=1e-2),
    "fused Adam": lambda tensors: torch.optim.Adam(tensors, lr=1e-2, fused=True),
}


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)
    ).double()


def _batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 2, 6, generator=source, dtype=torch.float64), torch.randint(4, (6,), generator=source))
        for _ in range(steps)
    ]


def _train(
    model: nn.Module, params: fe.EnsembleParams, optimiser: str, strategy: str, compiled: bool = False
) -> tuple[fe.EnsembleParams, dict[str, Tensor], list[Tensor]]:
    """20 steps of README's functional loop on a copy of `params`; also the loss of each member at each step."""
    params = fe.EnsembleParams(*({k: v.detach().clone().requires_grad_() for k, v in part.items()} for part in params))
    buffers, losses = fe.ensemble_buffers(model, params.E), []
    forward = fe.make_forward(model, strategy=strategy)
    optimizer = OPTIMISERS[optimiser](tree_leaves(params))

    def loss(p: fe.EnsembleParams, b: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        logits, b = forward(p, x, buffers=b)
        each = vmap(F.cross_entropy, in_dims=(0, None))(logits, y)
        return each.sum(), (each, b)

    step = grad_and_value(loss, has_aux=True)
    if compiled:
        step = compile_whole(step)
    with torch.no_grad():
        for x, y in _batches(20):
            grads, (_, (each, buffers)) = step(params, buffers, x, y)
            for leaf, gradient in zip(tree_leaves(params), tree_leaves(grads), strict=True):
                leaf.grad = gradient.contiguous()
            optimizer.step()
            losses.append(each)
    return params, buffers, losses


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_classic_ensemble_trains_as_its_members_alone(strategy: str, optimiser: str) -> None:
    models = [_net().train() for _ in range(3)]
    params, buffers, losses = _train(models[0], fe.stack_params(models), optimiser, strategy)
    for i, model in enumerate(models):
        optimizer = OPTIMISERS[optimiser](model.parameters())
        for (x, y), each in zip(_batches(20), losses, strict=True):
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            optimizer.step()
            assert_same(each[i], value.detach(), tolerance=1e-9)
        assert_same(fe.member_params(model, params, i), dict(model.named_parameters()), tolerance=1e-9)
        assert_same({name: stack[i] for name, stack in buffers.items()}, dict(model.named_buffers()), tolerance=1e-9)


class _ByHand(nn.Module):
    """A BatchEnsemble of `_net` by hand: E ordinary networks whose weights are computed from shared ones."""

    def __init__(self, model: nn.Module, params: fe.EnsembleParams) -> None:
        super().__init__()
        self.tensors = {k: nn.Parameter(v.detach().clone()) for k, v in {**params.shared, **params.stacked}.items()}
        self.model = model

    def forward(self, x: Tensor, i: int, statistics: dict[str, Tensor]) -> Tensor:
        weights = dict(statistics)
        for name, _ in self.model.named_parameters():
            weights[name] = self.tensors[name]
            if f"{name}_r" in self.tensors:
                owner = self.model.get_submodule(name.rpartition(".")[0])
                weights[name] = materialise(
                    owner, weights[name], self.tensors[f"{name}_r"][i], self.tensors[f"{name}_s"][i]
                )
        y: Tensor = torch.func.functional_call(self.model, weights, (x,))
        statistics.update({name: weights[name] for name in statistics})
        return y


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_batchensemble_trains_as_explicit_weights_do(strategy: str, optimiser: str) -> None:
    model = _net().train()
    start = fe.batchensemble_params(model, 3, init="random_sign")
    params, buffers, losses = _train(model, start, optimiser, strategy)
    by_hand = _ByHand(model, start)
    optimizer = OPTIMISERS[optimiser](by_hand.tensors.values())
    statistics = [{name: buffer.clone() for name, buffer in model.named_buffers()} for _ in range(3)]
    for (x, y), each in zip(_batches(20), losses, strict=True):
        optimizer.zero_grad()
        values = torch.stack([F.cross_entropy(by_hand(x, i, statistics[i]), y) for i in range(3)])
        values.sum().backward()
        optimizer.step()
        assert_same(each, values.detach(), tolerance=1e-8)
    for name, tensor in {**params.shared, **params.stacked}.items():
        assert_same(tensor.detach(), by_hand.tensors[name].detach(), tolerance=1e-8)
    assert_same(buffers, {name: torch.stack([s[name] for s in statistics]) for name in buffers}, tolerance=1e-8)


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_adam_equals_unfused_on_the_train_step(compiled: bool) -> None:
    """The gradients of stacked Linear weights have other strides than the weights: fused Adam on CPU misreads those."""
    model = _net().train()
    params = fe.ensemble_params(model, 3)
    fused, *_ = _train(model, params, "fused Adam", "vmap", compiled)
    plain, *_ = _train(model, params, "Adam", "vmap")
    assert_same(fused, plain, tolerance=1e-9)


def test_members_of_a_batchensemble_that_start_equal_stay_equal() -> None:
    """What makes members differ is r and s, and nothing else: with all ones, they are one network."""
    model = _net().train()
    start = fe.batchensemble_params(model, 2, init="ones")
    params, _, losses = _train(model, start, "SGD", "vmap")
    assert not torch.allclose(params.stacked["4.weight_r"], start.stacked["4.weight_r"])
    assert all(torch.allclose(each[0], each[1], rtol=1e-9) for each in losses)
    model.eval()
    x = randn(3, 2, 6)
    outputs = fe.make_forward(model)(params, x)
    assert_same(outputs[0], outputs[1], tolerance=1e-9)
