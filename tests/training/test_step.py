"""Training the pytree: equal to training every member alone, and the trap in Adam's fused CPU kernel."""

from __future__ import annotations

import dataclasses
from functools import partial, wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Conv1D, randn
from hypothesis import given
from hypothesis import strategies as st
from measure import peak_memory
from oracle import assert_same, both_kinds, compile_whole, compiler, materialise, member_weights, tensors_of
from plain import with_weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens.training.step import gradients_in_place

OPTIMISERS: dict[str, Any] = {
    "SGD": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda tensors: torch.optim.Adam(tensors, lr=1e-2, foreach=True),
    "fused Adam": lambda tensors: torch.optim.Adam(tensors, lr=1e-2),  # left open, so the step fuses it
    "AdamW": lambda tensors: torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "Adagrad": lambda tensors: torch.optim.Adagrad(tensors, lr=1e-2),
    "RMSprop": lambda tensors: torch.optim.RMSprop(tensors, lr=1e-3, momentum=0.5, centered=True),
}


def _net() -> nn.Module:
    """Nothing comes right before the norm, where r and the bias have gradients of rounding alone."""
    return nn.Sequential(
        nn.BatchNorm1d(2), nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)
    ).double()


def _batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 2, 6, generator=source, dtype=torch.float64), torch.randint(4, (6,), generator=source))
        for _ in range(steps)
    ]


def _copy(params: fe.EnsembleParams) -> fe.EnsembleParams:
    return fe.EnsembleParams(
        *({k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in part.items()} for part in params)
    )


def _train(
    model: nn.Module,
    params: fe.EnsembleParams,
    optimiser: str,
    strategy: str,
    compile: bool = False,
    reduction: str = "sum",
) -> tuple[fe.EnsembleParams, dict[str, Tensor], list[Tensor]]:
    """20 steps on a copy of `params`; also the loss of each member at each step."""
    params = _copy(params)
    buffers, losses = fe.ensemble_buffers(model, params.E), []
    optimizer = OPTIMISERS[optimiser](tree_leaves(params))
    forward = fe.make_forward(model, strategy=strategy)
    options = {"fullgraph": True, "backend": compiler()} if compile else False
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, reduction=reduction, compile=options)
    for x, y in _batches(20):
        each, buffers = step(params, x, y, buffers=buffers)
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
        assert_same(fe.member_params(model, params, i), dict(model.named_parameters()), tolerance=1e-8)
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
@pytest.mark.parametrize(("strategy", "reduction"), [("vmap", "sum"), ("vmap", "mean"), ("loop", "mean")])
def test_a_batchensemble_trains_as_explicit_weights_do(strategy: str, reduction: str, optimiser: str) -> None:
    model = _net().train()
    start = fe.batchensemble_params(model, 3, init="random_sign")
    params, buffers, losses = _train(model, start, optimiser, strategy, reduction=reduction)
    by_hand = _ByHand(model, start)
    optimizer = OPTIMISERS[optimiser](by_hand.tensors.values())
    statistics = [{name: buffer.clone() for name, buffer in model.named_buffers()} for _ in range(3)]
    for (x, y), each in zip(_batches(20), losses, strict=True):
        optimizer.zero_grad()
        values = torch.stack([F.cross_entropy(by_hand(x, i, statistics[i]), y) for i in range(3)])
        getattr(values, reduction)().backward()
        optimizer.step()
        assert_same(each, values.detach(), tolerance=1e-8)
    for name, tensor in {**params.shared, **params.stacked}.items():
        assert_same(tensor.detach(), by_hand.tensors[name].detach(), tolerance=1e-7)
    assert_same(buffers, {name: torch.stack([s[name] for s in statistics]) for name in buffers}, tolerance=1e-8)


@pytest.mark.parametrize("compile", [False, True])
def test_fused_adam_equals_unfused_on_the_train_step(compile: bool) -> None:
    """The gradients of stacked Linear weights have other strides than the weights: fused Adam on CPU misreads those."""
    model = _net().train()
    params = fe.ensemble_params(model, 3)
    fused, *_ = _train(model, params, "fused Adam", "vmap", compile)
    plain, *_ = _train(model, params, "Adam", "vmap")
    assert_same(fused, plain, tolerance=1e-9)


def test_a_parameter_that_is_not_contiguous_gets_a_gradient_of_its_strides() -> None:
    model = nn.Conv2d(3, 4, 2).double()
    start = fe.ensemble_params(model, 2)
    images, y = randn(5, 3, 4, 4), randn(5, 4, 3, 3)
    trained: list[fe.EnsembleParams] = []
    for optimiser, turned in (("fused Adam", True), ("Adam", False)):
        params = _copy(start)
        if turned:
            weight = params.stacked["weight"].detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
            params.stacked["weight"] = weight.requires_grad_()
        optimizer = OPTIMISERS[optimiser](tree_leaves(params))
        step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=False)
        for _ in range(5):
            step(params, images, y)
        trained.append(params)
    assert not trained[0].stacked["weight"].is_contiguous()
    assert_same(trained[0], trained[1], tolerance=1e-9)


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (torch.optim.Adam, True),
        (partial(torch.optim.Adam, fused=False), False),
        (partial(torch.optim.AdamW, foreach=True), None),
    ],
)
def test_fused_is_on_for_the_step_alone_where_it_was_left_open(make: Any, inside: bool | None) -> None:
    model = nn.Linear(3, 2)
    params = fe.ensemble_params(model, 2)
    optimizer, seen = make(tree_leaves(params)), []
    optimizer.register_step_pre_hook(lambda held, *_: seen.append(held.param_groups[0]["fused"]))
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=False)
    before = optimizer.param_groups[0]["fused"]
    step(params, torch.ones(4, 3), torch.ones(4, 2))
    assert seen == [inside] and optimizer.param_groups[0]["fused"] is before


def test_the_optimiser_works_in_a_loop_of_the_users_own_after_a_step() -> None:
    """The fused kernel on a CPU goes wrong on gradients of other strides, as torch.func gives them."""
    model, x = nn.Linear(6, 5).double(), randn(16, 6)
    y, trained = x @ randn(6, 5), []
    for first in (True, False):
        torch.manual_seed(0)
        params = fe.ensemble_params(model, 3, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(tree_leaves(params), lr=0.05)
        forward = fe.make_forward(model)
        step = fe.make_train_step(forward, F.mse_loss, optimizer, compile=False)
        if first:
            step(params, x, y)
        else:
            fe.member_losses(F.mse_loss, forward(params, x), y).sum().backward()
            optimizer.step()
        for _ in range(20):
            optimizer.zero_grad()
            losses = fe.member_losses(F.mse_loss, forward(params, x), y)
            leaves = tree_leaves(params)
            for tensor, slope in zip(leaves, torch.autograd.grad(losses.sum(), leaves), strict=True):
                tensor.grad = slope.transpose(-1, -2).contiguous().transpose(-1, -2) if slope.ndim == 3 else slope
            optimizer.step()
        trained.append(params)
    assert_same(trained[0], trained[1], tolerance=1e-9)


@pytest.mark.parametrize("chunk", [None, 1])
def test_gradients_that_the_user_keeps_on_parameters_stay(chunk: int | None) -> None:
    model = nn.Linear(300, 200)
    params = fe.ensemble_params(model, 2)
    kept = {name: torch.ones_like(tensor) for name, tensor in params.stacked.items()}
    for name, tensor in params.stacked.items():
        tensor.grad = kept[name]
    step = fe.make_train_step(
        fe.make_forward(model, chunk_size=chunk), F.mse_loss, torch.optim.SGD(tree_leaves(params), 0.1), compile=False
    )
    step(params, torch.ones(4, 300), torch.ones(4, 200))
    assert all(tensor.grad is kept[name] for name, tensor in params.stacked.items())
    assert all((gradient == 1).all() for gradient in kept.values())


def test_only_what_the_optimiser_holds_is_trained() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    model[1].bias.requires_grad_(False)
    params = fe.batchensemble_params(model, 3)
    before = _copy(params)
    vectors = [tensor for name, tensor in params.stacked.items() if name.endswith(("_r", "_s"))]
    optimizer = torch.optim.SGD([*vectors, params.shared["1.bias"]], lr=0.1)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=False)
    assert step.gradients(params, randn(5, 3), randn(5, 2))[0].keys() == params.stacked.keys()
    step(params, randn(5, 3), randn(5, 2))
    assert_same(params.shared, before.shared)
    assert all(not torch.equal(params.stacked[name], before.stacked[name]) for name in params.stacked)
    assert all(tensor.grad is None for tensor in tree_leaves(params))


def test_inputs_and_targets_of_their_own_and_what_is_prepared_in_the_graph() -> None:
    """A bootstrap sample for each member, from one data set, by an index [E, B]."""
    model = nn.Linear(3, 2).double()
    images, y = torch.randint(256, (20, 3), dtype=torch.uint8), randn(20, 2)
    index = torch.randint(20, (4, 6))
    start = fe.ensemble_params(model, 4)
    together = _copy(start)
    optimizer = torch.optim.SGD(tree_leaves(together), lr=0.1)
    forward = fe.make_forward(model, member_inputs=True)
    options = {"fullgraph": True, "backend": compiler()}
    step = fe.make_train_step(
        forward, F.mse_loss, optimizer, prepare=lambda i: (images[i].double() / 255, y[i]), compile=options
    )
    losses = step(together, index)
    for i in range(4):
        alone = nn.Linear(3, 2).double()
        alone.load_state_dict(fe.member_params(model, start, i))
        value = F.mse_loss(alone(images[index[i]].double() / 255), y[index[i]])
        assert_same(losses[i], value.detach())
        value.backward()
        torch.optim.SGD(alone.parameters(), lr=0.1).step()
        assert_same(fe.member_params(model, together, i), dict(alone.named_parameters()))


@given(
    E=st.integers(1, 4),
    kind=st.sampled_from(["classic", "BatchEnsemble", "own head"]),
    strategy=st.sampled_from(["vmap", "loop"]),
    chunk_size=st.sampled_from([None, 1, 2, 3]),
    reduction=st.sampled_from(["sum", "mean"]),
    own_inputs=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_in_parts_or_whole_a_step_is_autograd_of_the_plain_loop(
    E: int, kind: str, strategy: str, chunk_size: int | None, reduction: str, own_inputs: bool, dtype: torch.dtype
) -> None:
    model = _net().to(dtype)
    make: Any = {
        "classic": fe.ensemble_params,
        "BatchEnsemble": fe.batchensemble_params,
        "own head": partial(fe.batchensemble_params, stacked="6.*"),
    }[kind]
    params, buffers = make(model, E), fe.ensemble_buffers(model, E)
    forward = fe.make_forward(model, strategy=strategy, chunk_size=chunk_size, member_inputs=own_inputs)
    x, y = randn(E, 6, 2, 6).to(dtype), torch.randint(4, (E, 6))
    x, y = (x, y) if own_inputs else (x[0], y[0])
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, reduction=reduction, compile=False)
    got, losses, new = step.gradients(params, x, y, buffers=buffers)

    values, states = [], []
    for i in range(E):
        weights = member_weights(model, params, i)
        state = {name: stack[i].clone() for name, stack in buffers.items()}
        member = with_weights(model, weights, state)
        values.append(F.cross_entropy(member(x[i] if own_inputs else x), y[i] if own_inputs else y))
        states.append(dict(member.named_buffers()))
    getattr(torch.stack(values), reduction)().backward()
    assert_same(losses, torch.stack(values).detach())
    assert_same(new, {name: torch.stack([state[name] for state in states]) for name in buffers})
    want = {name: tensor.grad for part in params for name, tensor in part.items()}
    assert_same({name: got[name] for name in want}, want, tolerance=1e-9 if dtype == torch.float64 else None)


def test_a_chunk_holds_the_memory_of_its_members() -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)])
    params, x = fe.ensemble_params(model, 8), torch.randn(2000, 32)
    peaks = {}
    for size in (None, 4, 1):
        forward = fe.make_forward(model, chunk_size=size)
        step = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params)), compile=False)
        peaks[size] = peak_memory(partial(step.gradients, params, x, x), torch.device("cpu"))
    assert peaks[4] < 0.6 * peaks[None] and peaks[1] < 0.2 * peaks[None]


def test_convolutions_of_their_own_are_compiled_one_member_after_another() -> None:
    """... on a CPU, where "auto" may choose; what they give is the same."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = randn(5, 2, 4, 4), torch.randint(4, (5,))
    buffers = fe.ensemble_buffers(model, 3)
    classic, shared = fe.ensemble_params(model, 3), fe.batchensemble_params(model, 3)
    auto, asked = fe.make_forward(model), fe.make_forward(model, strategy="vmap")
    assert auto.compiled_plan(classic).strategy == "loop" and auto.compiled_plan(shared).strategy == "vmap"
    assert asked.compiled_plan(classic).strategy == "vmap" and auto.strategy == "vmap"
    assert fe.make_forward(nn.Linear(3, 2)).compiled_plan(fe.ensemble_params(nn.Linear(3, 2), 2)).strategy == "vmap"
    results = []
    for compile in (True, False):
        optimizer = torch.optim.SGD(tree_leaves(classic))
        step = fe.make_train_step(auto, F.cross_entropy, optimizer, compile=compile)
        results.append([step.gradients(classic, x, y, buffers=buffers) for _ in range(2)])
    assert_same(results[0], results[1])
    whole = compile_whole(lambda params: auto(params, x, buffers=buffers))
    assert_same(whole(classic), auto(classic, x, buffers=buffers))


class _Viewed(nn.Module):
    """Looks at what its layer gives as at a longer row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.view(y.shape[0], -1)


def test_what_a_layer_gives_lies_as_it_does_alone() -> None:
    model = _Viewed().double()
    forward, params = fe.make_forward(model, strategy="vmap"), fe.ensemble_params(model, 3)
    x = randn(2, 2, 6)
    assert_same(compile_whole(forward)(params, x), forward(params, x))


def test_batches_of_many_sizes_are_served_by_few_graphs() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 2)).double()
    params = fe.ensemble_params(model, 3)
    backend = CompileCounterWithBackend("aot_eager")
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile={"backend": backend})
    for size in range(3, 9):
        step.gradients(params, randn(size, 8), randn(size, 2))
    assert backend.frame_count == 2, "one for the first size, and one for any"


def test_a_compiled_step_is_that_of_its_own_model_mode_and_loss() -> None:
    """Models that differ by a number alone, both modes, and a loss that changes: what was compiled is not mixed up."""
    x, y = randn(5, 3), randn(5, 2)
    weight = [1.0]
    first, second = (
        nn.Sequential(nn.Linear(3, 4), activation, nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
        for activation in (nn.LeakyReLU(0.1), nn.LeakyReLU(0.7))
    )
    params, buffers = fe.ensemble_params(first, 2), fe.ensemble_buffers(first, 2)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return weight[0] * F.mse_loss(output, y)

    def steps(compile: Any) -> list[fe.TrainStep]:
        optimizer = torch.optim.SGD(tree_leaves(params))
        return [
            fe.make_train_step(fe.make_forward(model), loss, optimizer, compile=compile) for model in (first, second)
        ]

    compiled, plain = steps({"backend": "eager", "fullgraph": True}), steps(False)
    for train, factor in ((True, 1.0), (False, 1.0), (False, 2.0), (True, 2.0)):
        first.train(train), second.train(train)
        weight[0] = factor
        results = [[step.gradients(params, x, y, buffers=buffers) for step in kind] for kind in (compiled, plain)]
        assert_same(results[0], results[1])
        assert not torch.allclose(results[0][0][1], results[0][1][1])


class _Scaled(nn.Module):
    """Reads what a compiled step must not take for fixed: an attribute of its class, and a function that it keeps."""

    factor = 1.0

    def __init__(self, box: list[float]) -> None:
        super().__init__()
        self.layer, self.norm, self.function = nn.Linear(3, 2), nn.BatchNorm1d(2), lambda x: x * box[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm(self.layer(x))) * self.factor


def test_a_compiled_step_sees_what_the_user_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    box = [1.0]
    model = _Scaled(box).double()
    model.norm.eval()
    params, x, y = fe.ensemble_params(model, 2), randn(5, 3), randn(5, 2)
    optimizer = torch.optim.SGD(tree_leaves(params))
    step, plain = (
        fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=compile)
        for compile in ({"backend": "eager", "fullgraph": True}, False)
    )
    seen = []

    def same() -> None:
        assert_same(step.gradients(params, x, y), plain.gradients(params, x, y))
        seen.append(step.gradients(params, x, y)[1].sum().item())

    same()
    monkeypatch.setattr(_Scaled, "factor", 2.0)
    same()
    box[0] = 3.0
    same()
    assert len(set(seen)) == 3
    model.norm.train()
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="buffers: got None"):
        step.gradients(params, x, y)


def test_shared_parameters_whose_gradients_are_one_tensor() -> None:
    """An LSTM adds its two biases, and goes by the loop: the parts are added up for each of them once."""
    model = nn.LSTM(3, 2, batch_first=True).double()
    params, forward = fe.batchensemble_params(model, 5), fe.make_forward(model)
    x, y = randn(7, 4, 3), randn(7, 4, 2)

    def loss(output: Any, y: Tensor) -> Tensor:
        return F.mse_loss(output[0], y)

    step = fe.make_train_step(forward, loss, torch.optim.SGD(tree_leaves(params)), compile=False)
    torch.stack([F.mse_loss(each, y) for each in forward(params, x)[0]]).sum().backward()
    got = step.gradients(params, x, y)[0]
    assert_same(got, {name: {**params.shared, **params.stacked}[name].grad for name in got})


def test_one_tensor_is_not_the_gradient_of_two_parameters() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.a, self.b = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + (self.a + self.b)

    model = Added().double()
    params = fe.batchensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    places: list[int] = []

    def look(*_: Any) -> None:
        places.extend(tensor.grad.data_ptr() for tensor in tree_leaves(params))

    optimizer.register_step_pre_hook(look)
    fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=False)(params, randn(5, 3), randn(5, 2))
    assert len(places) == len(set(places)) == len(tree_leaves(params))


def test_a_loss_that_the_compiler_refuses_is_computed_without(caplog: pytest.LogCaptureFixture) -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.mse_loss(output, y)

    model, x, y = nn.Linear(3, 2), torch.ones(5, 3), torch.ones(5, 2)
    params = fe.ensemble_params(model, 2)
    make = partial(fe.make_train_step, fe.make_forward(model), loss, torch.optim.SGD(tree_leaves(params), lr=0.0))
    step = make(compile={"backend": "eager"})
    assert_same(step(params, x, y), step(params, x, y))
    assert sum("training goes on without it" in record.message for record in caplog.records) <= 1
    whole = make(compile={"backend": "eager", "fullgraph": True})
    for _ in range(2):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            whole(params, x, y)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_batch_is_prepared_once_for_all_parts(chunk_size: int | None) -> None:
    """An index that all members share picks each member's own data; noise is the same in parts as whole."""
    model = nn.Linear(3, 2).double()
    x, y, index = randn(3, 9, 3), randn(3, 9, 2), torch.tensor([1, 5, 7])
    params = fe.ensemble_params(model, 3)
    forward = fe.make_forward(model, chunk_size=chunk_size, member_inputs=True)
    calls = []

    def prepare(index: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(index)
        return x[:, index], y[:, index]

    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(forward, F.mse_loss, optimizer, prepare=prepare, compile=False)
    got = step.gradients(params, index)
    whole = fe.make_train_step(fe.make_forward(model, member_inputs=True), F.mse_loss, optimizer, compile=False)
    assert_same(got, whole.gradients(params, x[:, index], y[:, index]))
    assert len(calls) == 1


def test_dropout_differs_from_step_to_step_and_the_seed_repeats_it() -> None:
    """Compiled or not: that the first step is also computed without the compiler draws no random numbers more."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()

    def losses(compile: Any) -> list[Tensor]:
        torch.manual_seed(3)
        params = fe.ensemble_params(model, 2, reset=False)
        optimizer = torch.optim.SGD(tree_leaves(params), lr=0.0)
        step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=compile)
        x = torch.ones(5, 3, dtype=torch.float64)
        return [step(params, x, x[:, :2]) for _ in range(3)]

    first, second = losses({"backend": "eager"}), losses(False)
    assert len({float(value) for each in first for value in each}) == 6
    assert_same(first, second)


def test_without_a_compiler_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = nn.Linear(3, 2)
    params = fe.ensemble_params(model, 2)
    step = fe.make_train_step(
        fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params)), compile={"backend": broken}
    )
    first, second = (step(params, torch.ones(5, 3), torch.ones(5, 2)) for _ in range(2))
    assert (second < first).all()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "torch.compile does not work here, so training goes on without it: no compiler here"
    ]


def test_a_model_that_the_compiler_refuses_is_trained_without(caplog: pytest.LogCaptureFixture) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    model = Last().double()
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    x, y = randn(5, 6, 3), randn(5, 2)
    steps = [
        fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params)), compile=compile)
        for compile in (True, False)
    ]
    results = [[step.gradients(params, x, y) for _ in range(2)] for step in steps]
    assert_same(results[0], results[1])
    told = [record.message for record in caplog.records if record.levelno >= 30 and "functorch_ens" in record.name]
    assert all("training goes on without it" in each or "is compiled in parts" in each for each in told)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_what_does_not_fit_is_an_error_also_in_parts(chunk_size: int | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    params, buffers = fe.ensemble_params(model, 3), fe.ensemble_buffers(model, 3)
    forward = fe.make_forward(model, chunk_size=chunk_size, member_inputs=True)
    step = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params)), compile=False)
    x, y = randn(4, 5, 3), randn(4, 5, 4)
    with pytest.raises(ValueError, match=r"leading member axis of 3, .* got \[\[4, 5, 3\]"):
        step(params, x, y, buffers=buffers)
    longer = {name: torch.cat([stack, stack[:1]]) for name, stack in buffers.items()}
    with pytest.raises(ValueError, match=r"buffers: wrong shape with a leading member axis of 3"):
        step(params, x[:3], y[:3], buffers=longer)
    params.stacked["1.bias"] = randn(4, 4)
    with pytest.raises(ValueError, match=r"1.bias: expected \[3, 4\], got \[4, 4\]"):
        fe.make_train_step(forward, F.mse_loss, torch.optim.SGD([params.stacked["0.weight"]]), compile=False)(
            params, x[:3], y[:3], buffers=buffers
        )


def test_bad_arguments() -> None:
    model, x, y = nn.Linear(3, 2), torch.ones(5, 3), torch.ones(5, 2)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    for arguments, error, message in (
        ((model, F.mse_loss, optimizer), TypeError, "forward: expected the forward of an ensemble .* got Linear"),
        ((forward, "mse", optimizer), TypeError, "loss: expected a function .* got 'mse'"),
        ((forward, F.mse_loss, torch.optim.Adam), TypeError, "optimizer: expected an optimizer of torch.optim, got"),
        ((forward, F.mse_loss, torch.optim.LBFGS([torch.ones(1)])), ValueError, "optimizer: got LBFGS"),
    ):
        with pytest.raises(error, match=message):
            fe.make_train_step(*arguments)
    for options, error, message in (
        ({"reduction": "none"}, ValueError, "reduction: expected one of .*, got 'none'"),
        ({"prepare": 1}, TypeError, "prepare: expected a function of the batch, got 1"),
        ({"values": {"beta": torch.tensor(1.0)}}, ValueError, r"values\['beta'\]: expected \[E, ...\].* shape \[\]"),
        ({"values": {"beta": torch.ones(2).requires_grad_()}}, ValueError, r"requires_grad: expected one of \(?.False"),
        ({"clip_norm": 0}, ValueError, "clip_norm: expected a number > 0, got 0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm: expected a finite number >= 0, got -1.0"),
        ({"clip_by": "layer"}, ValueError, "clip_by: expected one of .*, got 'layer'"),
        ({"accumulate": 0}, ValueError, "accumulate: expected a positive int, got 0"),
        ({"autocast": torch.float16}, ValueError, "autocast: expected one of .*, got torch.float16"),
        ({"compile": "max-autotune"}, TypeError, "compile: expected True, False or options .* got 'max-autotune'"),
    ):
        with pytest.raises(error, match=message):
            fe.make_train_step(forward, F.mse_loss, optimizer, **options)
    step = fe.make_train_step(forward, F.mse_loss, optimizer, compile=False)
    with pytest.raises(TypeError, match=r"the batch: expected a tuple, the inputs .* got \(\)"):
        step(params)
    with pytest.raises(TypeError, match=r"prepare: the batch .* expected a tuple, .* got a tensor \[5, 3\]"):
        fe.make_train_step(forward, F.mse_loss, optimizer, prepare=lambda x: x, compile=False)(params, x)
    with pytest.raises(TypeError, match="buffers: expected a dict"):
        step(params, x, y, buffers=3)  # type: ignore[call-overload]  # that is the test
    with pytest.raises(ValueError, match="params: one tensor has two names"):
        step(params._replace(stacked={**params.stacked, "again": params.stacked["bias"]}), x, y)
    with pytest.raises(ValueError, match="the optimizer trains 2 of its 2 tensors elsewhere"):
        step(_copy(params), x, y)
    with pytest.raises(TypeError, match="params: expected EnsembleParams, got dict"):
        step(params.stacked, x, y)  # type: ignore[call-overload]  # that is the test
    unreduced = fe.make_train_step(forward, partial(F.mse_loss, reduction="none"), optimizer, compile=False)
    with pytest.raises(ValueError, match=r"loss: expected one number for a member, got a tensor of shape \[5, 2\]"):
        unreduced(params, x, y)


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


# --------------------------------------------------------------------------------------------------------------------
# Options of a step


def _own_networks(params: fe.EnsembleParams) -> list[nn.Module]:
    """The members of a classic ensemble of `_net`, as ordinary networks in training mode."""
    networks = []
    for i in range(params.E):
        network = _net().train()
        network.load_state_dict(fe.member_params(network, params, i), strict=False)
        networks.append(network)
    return networks


def _slopes(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def _norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


@given(
    norm=st.floats(0.01, 3.0),
    by=st.sampled_from(["member", "ensemble"]),
    strategy=st.sampled_from(["vmap", "loop"]),
    seed=st.integers(0, 99),
)
def test_clipping_is_that_of_separate_networks_or_of_all_together(
    norm: float, by: str, strategy: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model, (x, y) = _net().train(), _batches(1)[0]
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.SGD(tree_leaves(params))
    make = partial(fe.make_train_step, fe.make_forward(model, strategy=strategy), F.cross_entropy, optimizer)
    step = make(compile=False, clip_norm=norm, clip_by=by)
    got = step.gradients(params, x, y, buffers=fe.ensemble_buffers(model, 3)).gradients
    networks = _own_networks(params)
    for network in networks:
        F.cross_entropy(network(x), y).backward()
    for group in [[network] for network in networks] if by == "member" else [networks]:
        torch.nn.utils.clip_grad_norm_([p for network in group for p in network.parameters()], norm)
    for i, network in enumerate(networks):
        assert_same({name: gradient[i] for name, gradient in got.items()}, _slopes(network), tolerance=1e-8)


@pytest.mark.parametrize("by", ["member", "ensemble"])
def test_clipping_of_a_batchensemble(by: str) -> None:
    """Each member's r and s have a norm, and what all share has one; or all have one."""
    model, (x, y) = _net().eval(), _batches(1)[0]
    params = fe.batchensemble_params(model, 3)
    optimizer = torch.optim.SGD(tree_leaves(params))
    make = partial(fe.make_train_step, fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    whole = make().gradients(params, x, y).gradients
    own = [{name: whole[name][i] for name in params.stacked} for i in range(3)]
    shared = {name: whole[name] for name in params.shared}
    norms = torch.stack([_norm(part) for part in (*own, shared)])
    limit = float(norms.min() + norms.max()) / 2
    if by == "ensemble":
        norms = norms.norm().expand(4)
    factor = (limit / (norms + 1e-6)).clamp(max=1)
    assert factor.min() < 0.99 and (by == "ensemble" or factor.max() == 1)
    got = make(clip_norm=limit, clip_by=by).gradients(params, x, y).gradients
    for i in range(3):
        assert_same({name: got[name][i] for name in params.stacked}, {k: v * factor[i] for k, v in own[i].items()})
    assert_same({name: got[name] for name in params.shared}, {k: v * factor[3] for k, v in shared.items()})


@pytest.mark.parametrize("by", ["member", "ensemble"])
def test_a_member_that_is_not_finite_does_not_spoil_the_norm_of_others(by: str) -> None:
    model, (x, y) = _net().eval(), _batches(1)[0]
    params = fe.ensemble_params(model, 3)
    with torch.no_grad():
        params.stacked["6.weight"][1] = float("nan")
    optimizer = torch.optim.SGD(tree_leaves(params))
    make = partial(fe.make_train_step, fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    got = make(clip_norm=0.1, clip_by=by).gradients(params, x, y)
    whole = make().gradients(params, x, y).gradients
    assert got.losses.isfinite().tolist() == [True, False, True]
    own = [_norm({name: gradient[i] for name, gradient in whole.items()}) for i in (0, 2)]
    norms = own if by == "member" else [torch.stack(own).norm()] * 2
    for i, norm in zip((0, 2), norms, strict=True):
        for name, gradient in got.gradients.items():
            assert_same(gradient[i], whole[name][i] * (0.1 / (norm + 1e-6)), tolerance=1e-8)


@given(
    parts=st.sampled_from([1, 2, 3, 6]),
    kind=st.sampled_from(["classic", "BatchEnsemble"]),
    own_inputs=st.booleans(),
    strategy=st.sampled_from(["vmap", "loop"]),
    by_index=st.booleans(),
)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    parts: int, kind: str, own_inputs: bool, strategy: str, by_index: bool
) -> None:
    model = _net().eval()
    params = (fe.ensemble_params if kind == "classic" else fe.batchensemble_params)(model, 3)
    x, y = randn(12, 2, 6), torch.randint(4, (12,))
    index = torch.stack([torch.randperm(12)[:6] for _ in range(3)]) if own_inputs else torch.randperm(12)[:6]
    batch = (index,) if by_index else (x[index], y[index])
    forward = fe.make_forward(model, strategy=strategy, member_inputs=own_inputs)
    make = partial(
        fe.make_train_step,
        forward,
        F.cross_entropy,
        torch.optim.SGD(tree_leaves(params)),
        prepare=(lambda i: (x[i], y[i])) if by_index else None,
        compile=False,
    )
    assert_same(make(accumulate=parts).gradients(params, *batch), make().gradients(params, *batch), tolerance=1e-8)


@pytest.mark.parametrize("compile", [False, True])
def test_accumulation_takes_the_statistics_of_the_parts_one_after_another(compile: bool) -> None:
    model, (x, y) = _net().train(), _batches(1)[0]
    params, buffers = fe.ensemble_params(model, 2), fe.ensemble_buffers(model, 2)
    options = {"backend": compiler(), "fullgraph": True} if compile else False
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, accumulate=3, compile=options)
    for _ in range(2):  # the first call computes without the compiler too
        got, losses, new = step.gradients(params, x, y, buffers=buffers)
    for i, network in enumerate(_own_networks(params)):
        values = [F.cross_entropy(network(a), b) / 3 for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
        torch.stack(values).sum().backward()
        assert_same(losses[i], torch.stack(values).sum().detach())
        assert_same({name: gradient[i] for name, gradient in got.items()}, _slopes(network), tolerance=1e-8)
        assert_same({name: buffer[i] for name, buffer in new.items()}, dict(network.named_buffers()))


def test_a_batch_that_cannot_be_cut() -> None:
    model, x = nn.Linear(3, 2), torch.ones(5, 3)
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, accumulate=2, compile=False)
    for batch in ((x, torch.ones(5, 2)), (x[:4], torch.ones(2, 2)), (x[:4], torch.ones(()))):
        with pytest.raises(ValueError, match=r"accumulate: expected .* a multiple of 2 on axis 0, got the shapes \[\["):
            step(params, *batch)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_autocast_is_that_of_separate_networks(strategy: str, compile: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
    params = fe.ensemble_params(model, 3)
    x, y = torch.randn(8, 3), torch.randint(4, (8,))
    step = fe.make_train_step(
        fe.make_forward(model, strategy=strategy),
        F.cross_entropy,
        torch.optim.SGD(tree_leaves(params)),
        autocast=torch.bfloat16,
        compile={"backend": compiler(), "fullgraph": True} if compile else False,
    )
    for _ in range(2):
        got, losses, _ = step.gradients(params, x, y)
    assert losses.dtype == torch.float32  # as torch's autocast computes losses
    for i in range(3):
        alone = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
        alone.load_state_dict(fe.member_params(model, params, i))
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(alone(x), y).backward()
        for name, gradient in _slopes(alone).items():
            assert got[name].dtype == torch.float32
            # Rounding to eight bits is not the same in another order; that of float32 would be 1e-6.
            assert_same(got[name][i], gradient, tolerance=2e-2)
    exact = fe.make_train_step(
        fe.make_forward(model), F.cross_entropy, torch.optim.SGD(tree_leaves(params)), compile=False
    )
    assert not torch.allclose(exact.gradients(params, x, y).gradients["0.weight"], got["0.weight"], rtol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_value_of_each_members_own_in_the_loss(chunk_size: int | None, compile: bool) -> None:
    model, (x, y) = _net().eval(), _batches(1)[0]
    params, smoothing = fe.ensemble_params(model, 3), torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    step = fe.make_train_step(
        fe.make_forward(model, chunk_size=chunk_size),
        fe.cross_entropy,
        torch.optim.SGD(tree_leaves(params)),
        values={"label_smoothing": smoothing},
        compile={"backend": compiler(), "fullgraph": True} if compile else False,
    )
    for _ in range(2):
        got, losses, _ = step.gradients(params, x, y)
    for i, network in enumerate(_own_networks(params)):
        value = F.cross_entropy(network.eval()(x), y, label_smoothing=smoothing[i].item())
        value.backward()
        assert_same(losses[i], value.detach())
        assert_same({name: gradient[i] for name, gradient in got.items()}, _slopes(network), tolerance=1e-8)
    other = fe.ensemble_params(model, 2)
    wrong = fe.make_train_step(
        fe.make_forward(model),
        fe.cross_entropy,
        torch.optim.SGD(tree_leaves(other)),
        values={"label_smoothing": smoothing},
    )
    with pytest.raises(ValueError, match=r"values\['label_smoothing'\]: expected \[2, ...\], .* got the shape \[3\]"):
        wrong(other, x, y)


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_stopped_member_no_longer_changes_and_the_others_go_on(optimiser: str, slices: bool) -> None:
    model = _net().train()
    start = fe.ensemble_params(model, 3)
    params, buffers = _copy(start), fe.ensemble_buffers(model, 3)
    lr = OPTIMISERS[optimiser]([torch.ones(1, requires_grad=True)]).defaults["lr"]
    tensors = fe.param_groups(params, lr=torch.full((3,), lr, dtype=torch.float64)) if slices else tree_leaves(params)
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, OPTIMISERS[optimiser](tensors), compile=False)
    for number, (x, y) in enumerate(_batches(8)):
        if number == 3:
            step.stopped.add(1)
            kept = _copy(params), {name: buffer.clone() for name, buffer in buffers.items()}
        _, buffers = step(params, x, y, buffers=buffers)
    free, free_buffers = _copy(start), fe.ensemble_buffers(model, 3)
    other = fe.make_train_step(
        fe.make_forward(model), F.cross_entropy, OPTIMISERS[optimiser](tree_leaves(free)), compile=False
    )
    for x, y in _batches(8):
        _, free_buffers = other(free, x, y, buffers=free_buffers)
    for got, before, want in (
        *((params.stacked[name], kept[0].stacked[name], free.stacked[name]) for name in params.stacked),
        *((buffers[name], kept[1][name], free_buffers[name]) for name in buffers),
    ):
        assert torch.equal(got[1], before[1])
        assert_same(got[[0, 2]].detach(), want[[0, 2]].detach(), tolerance=1e-12)
    assert not torch.equal(params.stacked["6.weight"][1], free.stacked["6.weight"][1])


def test_members_that_share_what_is_trained_cannot_stop_alone() -> None:
    model, x, y = nn.Linear(3, 2), torch.ones(5, 3), torch.ones(5, 2)
    params = fe.batchensemble_params(model, 3)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params)), compile=False)
    step.stopped.add(1)
    with pytest.raises(ValueError, match=r"stopped: members \[1\] cannot stop alone, .* such as weight"):
        step(params, x, y)
    classic = fe.ensemble_params(model, 3)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(classic)), compile=False)
    for wrong in (-1, 3, 0.5):
        step.stopped = {wrong}  # type: ignore[arg-type]  # that is the test
        with pytest.raises(ValueError, match=rf"stopped: expected numbers of members, from 0 to 2, got \[{wrong}\]"):
            step(classic, x, y)
    step.stopped = set()
    step(classic, x, y)


@pytest.mark.parametrize("compile", [False, True])
def test_a_label_that_is_out_of_range_is_named(compile: bool) -> None:
    model, (x, y) = _net().eval(), _batches(1)[0]
    params = fe.ensemble_params(model, 2)
    options = {"backend": compiler()} if compile else False
    step = fe.make_train_step(
        fe.make_forward(model), F.cross_entropy, torch.optim.SGD(tree_leaves(params)), compile=options
    )
    step(params, x, y)
    y = y.clone()
    y[2] = 4
    with pytest.raises(ValueError, match=r"labels: expected 0 <= y < 4, the classes of the logits, got 4 at \[2\]"):
        step(params, x, y)


def test_members_with_batches_of_their_own_are_separate_runs() -> None:
    """Bagging: E networks, each on its own bootstrap sample in its own order."""
    model, data, y = _net().train(), randn(40, 2, 6), torch.randint(4, (40,))
    start = fe.ensemble_params(model, 3)
    params, buffers = _copy(start), fe.ensemble_buffers(model, 3)
    rows = fe.bootstrap(40, 3, size=30)
    batches = fe.index_batches(rows, 10)
    step = fe.make_train_step(
        fe.make_forward(model, member_inputs=True),
        F.cross_entropy,
        OPTIMISERS["Adam"](tree_leaves(params)),
        prepare=lambda i: (data[i], y[i]),
        compile=False,
    )
    for index in batches:
        _, buffers = step(params, index, buffers=buffers)
    for i, network in enumerate(_own_networks(start)):
        optimizer = OPTIMISERS["Adam"](network.parameters())
        for index in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(data[index[i]]), y[index[i]]).backward()
            optimizer.step()
        assert_same(fe.member_params(model, params, i), dict(network.named_parameters()), tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_clipping_has_room_for_the_squares_of_half_precision(dtype: torch.dtype) -> None:
    model, x = nn.Linear(4, 3).to(dtype), torch.full((2, 4), 30.0, dtype=dtype)
    params = fe.ensemble_params(model, 2)
    make = partial(
        fe.make_train_step,
        fe.make_forward(model),
        lambda output, y: output.sum(),
        torch.optim.SGD(tree_leaves(params)),
        compile=False,
    )
    whole = make().gradients(params, x, x).gradients["weight"].float()
    assert whole.square().max() * whole[0].numel() > 10_000 and whole[0].norm() > 200
    for by, norm in (("member", whole[0].norm()), ("ensemble", whole.norm())):
        got = make(clip_norm=1.0, clip_by=by).gradients(params, x, x).gradients["weight"]
        assert_same(got.float(), whole / norm, tolerance=2e-2)


def test_a_stopped_member_does_not_count_in_the_norm_of_all() -> None:
    model, (x, y) = _net().eval(), _batches(1)[0]
    params = fe.ensemble_params(model, 3)
    optimizer = torch.optim.SGD(tree_leaves(params))
    make = partial(fe.make_train_step, fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    whole = make().gradients(params, x, y).gradients
    step = make(clip_norm=0.1, clip_by="ensemble")
    step.stopped = {0, 2}
    norm = _norm({name: gradient[1] for name, gradient in whole.items()})
    for name, gradient in step.gradients(params, x, y).gradients.items():
        assert_same(gradient[1], whole[name][1] * (0.1 / (norm + 1e-6)), tolerance=1e-8)


@pytest.mark.parametrize("slices", [False, True])
def test_a_parameter_with_gaps_in_memory_is_not_given_to_a_fused_kernel(slices: bool) -> None:
    """Fused kernels go over a stretch of memory, and would write to what lies between."""
    model, x, y = nn.Linear(3, 2).double(), randn(5, 3), randn(5, 2)
    start, trained = fe.ensemble_params(model, 2), []
    for gaps in (True, False):
        params = _copy(start)
        if gaps:
            room = torch.full((2, 2, 6), 7.0, dtype=torch.float64)
            room[..., ::2] = start.stacked["weight"].detach()
            params.stacked["weight"] = room[..., ::2].requires_grad_()
        tensors: Any = fe.param_groups(params, lr=torch.full((2,), 0.1)) if slices else tree_leaves(params)
        step = fe.make_train_step(fe.make_forward(model), F.mse_loss, torch.optim.Adam(tensors, lr=0.1), compile=False)
        for _ in range(3):
            step(params, x, y)
        trained.append(params)
    assert (room[..., 1::2] == 7).all()
    assert_same(trained[0], trained[1], tolerance=1e-9)


def test_tensors_with_new_memory_are_looked_up_again() -> None:
    model, x, y = nn.Linear(3, 2).double(), randn(5, 3), randn(5, 2)
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=torch.tensor([0.1, 0.2])))
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=False)
    step(params, x, y)
    params.stacked["weight"].data = params.stacked["weight"].data.clone()
    with pytest.raises(ValueError, match="the optimizer trains 2 of its 4 tensors elsewhere"):
        step(params, x, y)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_gradients_are_the_callers_and_those_of_a_step_are_in_the_same_memory_again(chunk_size: int | None) -> None:
    model = _net().eval()
    params, (first, second) = fe.ensemble_params(model, 3), _batches(2)
    forward = fe.make_forward(model, chunk_size=chunk_size)
    step = fe.make_train_step(forward, F.cross_entropy, torch.optim.SGD(tree_leaves(params)), compile=False)
    kept = step.gradients(params, *first).gradients
    before = {name: gradient.clone() for name, gradient in kept.items()}
    for batch in (second, first):
        got = gradients_in_place(step, params, *batch)
        assert_same(got, step.gradients(params, *batch), tolerance=1e-12)
    assert_same(kept, before, tolerance=0)
    again = gradients_in_place(step, params, *second)
    for name, gradient in again.gradients.items():
        assert (gradient.data_ptr() == got.gradients[name].data_ptr()) is (chunk_size is not None)


@dataclasses.dataclass
class _LanguageOutput:
    """As the models of transformers return it."""

    logits: Tensor
    loss: Tensor | None = None


class _Language(nn.Module):
    """A model that takes keywords, computes its own loss, and has a layer laid out as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.mix = Conv1D(4, 4)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Any = None) -> Any:
        logits = self.head(self.mix(self.embed(input_ids)).tanh())
        if attention_mask is not None:
            logits = logits * attention_mask[..., None]
        return _LanguageOutput(logits, None if labels is None else F.cross_entropy(logits.mT, labels))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_dict_becomes_keywords(kind: int, compile: bool) -> None:
    model = _Language().double()
    params = both_kinds(model, 3)[kind]
    assert "fallback" not in {row.rule for row in fe.describe(model, params).rows}
    batch = {
        "input_ids": torch.randint(7, (4, 5)),
        "attention_mask": torch.ones(4, 5, dtype=torch.float64),
        "labels": torch.randint(7, (4, 5)),
    }
    step = fe.make_train_step(
        fe.make_forward(model),
        lambda out, y: out.loss,
        torch.optim.SGD(tree_leaves(params)),
        prepare=lambda batch: (batch, batch["labels"]),
        compile={"backend": compiler(), "fullgraph": True} if compile else False,
    )
    got, losses, _ = step.gradients(params, batch)
    members = [functional_call(model, member_weights(model, params, i), (), batch) for i in range(3)]
    want = torch.stack([out.loss for out in members])
    assert_same(losses, want.detach())
    tensors = tensors_of(params)
    slopes = torch.autograd.grad(want.sum(), list(tensors.values()))
    assert_same(got, dict(zip(tensors, slopes, strict=True)))
    for parts in (2, 4):
        accumulated = fe.make_train_step(
            fe.make_forward(model),
            lambda out, y: out.loss,
            torch.optim.SGD(tree_leaves(params)),
            prepare=lambda batch: (batch, batch["labels"]),
            accumulate=parts,
            compile=False,
        )
        assert_same(accumulated.gradients(params, batch).gradients, got)


def test_a_dict_that_is_an_argument_stays_one() -> None:
    model = _dict_model("wants")
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    assert step(params, {"x": torch.randn(4, 3)}, torch.randint(2, (4,))).shape == (2,)


def _dict_model(kind: str) -> nn.Module:
    class Wants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["x"])

    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Wants()

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.inner(*args, **kwargs)

    def unpacks(function: Any) -> Any:
        @wraps(function)
        def called(self: Any, batch: dict[str, Tensor]) -> Any:
            return function(self, batch["x"])

        return called

    class Decorated(Wants):
        @unpacks
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    class Plain(Wants):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.layer(x)

    class Masked(Wants):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.layer(x * mask)

    made = {"wants": Wants, "hands on": Hands, "decorated": Decorated, "plain": Plain, "mask": Masked, "hook": Plain}
    model: nn.Module = made[kind]()
    if kind == "hook":
        model.register_forward_pre_hook(lambda module, args: (args[0]["x"],))
    return model


@pytest.mark.parametrize("kind", ["wants", "hands on", "decorated", "plain", "mask", "hook"])
def test_a_dict_reaches_the_model_as_it_takes_it(kind: str) -> None:
    model, x, y = _dict_model(kind), torch.randn(4, 3), torch.randint(2, (4,))
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    kwargs: Any = {"mask": torch.ones(3)} if kind == "mask" else {}
    names = [name for name in params.stacked if name.endswith("weight")]
    want = [F.cross_entropy(x @ params.stacked[names[0]][i].T + _bias(params, i), y).item() for i in range(2)]
    assert step.gradients(params, {"x": x}, y, **kwargs).losses.tolist() == pytest.approx(want, rel=1e-5)
    if kind == "mask":
        with pytest.raises(TypeError, match="mask: expected once, got it in the batch and as a keyword"):
            step(params, {"x": x, "mask": torch.ones(3)}, y, **kwargs)


def _bias(params: fe.EnsembleParams, i: int) -> Tensor:
    (name,) = [name for name in params.stacked if name.endswith("bias")]
    return params.stacked[name][i].detach()


def test_a_model_without_a_signature_is_trained() -> None:
    model = nn.Linear(3, 2)
    own = model.forward

    def forward(x: Tensor) -> Tensor:
        return own(x)

    forward.__signature__ = 5  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    assert step(params, torch.randn(4, 3), torch.randint(2, (4,))).shape == (2,)
