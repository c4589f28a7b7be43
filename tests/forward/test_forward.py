"""make_forward: strategies, randomness, chunks, member inputs, buffers, purity, transforms and compilation."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import MODELS, Case, fast_layers, members, model_case, norm_net, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same, assert_untouched, both_kinds, compile_whole, gradients, loop, snapshot
from torch import Tensor, nn
from torch.func import grad, grad_and_value
from torch.utils import _pytree as pytree
from zoo_written import Residual

import functorch_ens as fe


@given(case=fast_layers, E=members, chunk=st.sampled_from([None, 1, 2, 9]))
def test_vmap_equals_loop_equals_oracle(case: Case, E: int, chunk: int | None) -> None:
    for params in both_kinds(case.model, E):
        want = loop(case.model, params, *case.args)
        want_gradients = gradients(partial(loop, case.model), params, *case.args)
        for strategy in ("vmap", "loop"):
            forward = fe.make_forward(case.model, strategy=strategy, chunk_size=chunk)
            assert_same(forward(params, *case.args), want)
            assert_same(gradients(forward, params, *case.args), want_gradients)


def _dropout_net() -> Any:
    return nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 8)).double()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_dropout_differs_between_members_or_is_the_same(strategy: str) -> None:
    model, x = _dropout_net(), randn(5, 4)
    params = fe.ensemble_params(model, 3, reset=False)  # equal members: all that can differ is dropout
    different = fe.make_forward(model, strategy=strategy)(params, x)
    assert not torch.allclose(different[0], different[1]) and not torch.allclose(different[1], different[2])
    same = fe.make_forward(model, strategy=strategy, randomness="same")
    outputs = same(params, x)
    assert_same(outputs, outputs[:1].expand(3, -1, -1))
    assert not torch.allclose(same(params, x), outputs)  # and new ones at the next call
    with pytest.raises(RuntimeError, match="random"):
        fe.make_forward(model, strategy=strategy, randomness="error")(params, x)
    model.eval()
    assert_same(same(params, x), fe.make_forward(model, strategy=strategy, randomness="error")(params, x))
    torch.manual_seed(3)
    first = fe.make_forward(model.train(), strategy=strategy)(params, x)
    torch.manual_seed(3)
    assert torch.equal(first, fe.make_forward(model, strategy=strategy)(params, x))


def test_training_mode_is_that_of_the_model_at_the_call() -> None:
    model, x = _dropout_net(), randn(5, 4)
    params = fe.ensemble_params(model, 2)
    forward = fe.make_forward(model)
    assert not torch.equal(forward(params, x), forward(params, x))
    model.eval()
    assert torch.equal(forward(params, x), forward(params, x))
    model[1].train()  # one submodule alone
    assert not torch.equal(forward(params, x), forward(params, x))


@given(E=members, batch=st.integers(1, 4))
def test_member_inputs(E: int, batch: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x: Tensor, factor: float, *, offset: Tensor, mask: None = None) -> Tensor:
            return self.layer(x) * factor + offset

    model, x, offset = Scaled(), randn(E, batch, 3), randn(E, batch, 2)
    for params in both_kinds(model, E):
        want = torch.stack([loop(model, params, x[i], 2.0, offset=offset[i])[i] for i in range(E)])
        for strategy in ("vmap", "loop"):
            forward = fe.make_forward(model, strategy=strategy, member_inputs=True)
            assert_same(forward(params, x, 2.0, offset=offset), want)
            with pytest.raises(ValueError, match=rf"member axis of {E}.*\[{E + 1}, {batch}, 3\]"):
                forward(params, randn(E + 1, batch, 3), 2.0, offset=offset)
            with pytest.raises(ValueError, match=r"\[\]"):
                forward(params, x, 2.0, offset=torch.tensor(0.0))


class _Outputs(nn.Module):
    """Tensors, None, a number and text, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        nothing = float("nan")
        return {"y": y, "pair": (y.sum(), None), "note": "text", "list": [y, 3], "shared": x, "nan": nothing}


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_outputs_are_pytrees(strategy: str) -> None:
    model, x = _Outputs().double(), randn(4, 3)
    params = fe.batchensemble_params(model, 2)
    got = fe.make_forward(model, strategy=strategy)(params, x)
    assert_same(got, loop(model, params, x))
    assert got["pair"][1] is None and got["note"] == "text" and got["list"][1] == 3
    assert got["shared"].shape == (2, 4, 3) and got["pair"][0].shape == (2,)


@dataclass
class _Batch:
    x: Tensor
    scale: float = 2.0


@dataclass
class _Result:
    y: Tensor
    inner: dict[str, _Batch]
    unset: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.derived = self.y * 3


class _OnDataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: _Batch) -> _Result:
        batch.x.mul_(batch.scale)  # in place, on what it was given
        return _Result(self.layer(batch.x), {"batch": batch})


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_dataclasses_go_in_and_come_out(strategy: str, chunk: int | None) -> None:
    model, x = _OnDataclasses().double(), randn(3, 4, 3)
    params = fe.ensemble_params(model, 3)
    before = x.clone()
    slope = x[0].clone().requires_grad_()
    forward = fe.make_forward(model, strategy=strategy, chunk_size=chunk)
    result = forward(params, _Batch(slope))
    want = torch.stack([F.linear(2 * x[0], w, b) for w, b in zip(*params.stacked.values(), strict=True)])
    assert isinstance(result, _Result) and not hasattr(result, "unset")
    assert_same(result.y, want)
    assert_same(result.derived, 3 * want)
    assert result.inner["batch"].x.shape == (3, 4, 3) and result.inner["batch"].scale == 2.0
    result.y.sum().backward()
    assert slope.grad is not None and torch.equal(slope, x[0])
    own = fe.make_forward(model, strategy=strategy, chunk_size=chunk, member_inputs=True)
    assert own(params, _Batch(x)).y.shape == (3, 4, 2) and torch.equal(x, before)


class _Cache:
    """What a decoder remembers: a container of its own kind, which the decoder writes to."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys

    def extended(self, layer: int, key: Tensor) -> Tensor:
        if layer == len(self.keys):
            self.keys.append(key)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], 1)
        return self.keys[layer]


class _TwoCaches:
    """A container of containers, as an encoder with a decoder has it."""

    def __init__(self, own: _Cache, other: _Cache) -> None:
        self.own, self.other = own, other


pytree.register_pytree_node(_Cache, lambda cache: (list(cache.keys), None), lambda keys, _: _Cache(list(keys)))
pytree.register_pytree_node(
    _TwoCaches, lambda both: ([both.own, both.other], None), lambda parts, _: _TwoCaches(*parts)
)


class _Decoder(nn.Module):
    """Every place sees those before it; `cache` has what came earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor, cache: _TwoCaches | None = None) -> dict[str, Any]:
        cache = _TwoCaches(_Cache([]), _Cache([x.mean(1, keepdim=True)])) if cache is None else cache
        for i, layer in enumerate(self.layers):
            seen = cache.own.extended(i, layer(x)).cumsum(1)[:, -x.shape[1] :]
            x = torch.tanh(x + seen + cache.other.keys[0])
        return {"y": x, "cache": cache}


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble"])
def test_a_cache_that_pytrees_know_goes_out_and_in(strategy: str, chunk: int | None, kind: str) -> None:
    model, x = _Decoder().double(), randn(2, 5, 3)
    params = both_kinds(model, 3)[kind == "BatchEnsemble"]
    whole = loop(model, params, x)
    forward = fe.make_forward(model, strategy=strategy, chunk_size=chunk)
    assert_same(forward(params, x), whole)
    assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))

    first = forward(params, x[:, :3], cache=_TwoCaches(_Cache([]), _Cache([x.mean(1, keepdim=True)])))
    cache = first["cache"]
    assert isinstance(cache, _TwoCaches) and isinstance(cache.own, _Cache)
    assert [key.shape for key in cache.own.keys] == [(3, 2, 3, 3)] * 2 and cache.other.keys[0].shape == (3, 2, 1, 3)
    more = fe.make_forward(model, strategy=strategy, chunk_size=chunk, member_inputs=True)
    rest = more(params, x[None, :, 3:].expand(3, -1, -1, -1), cache=cache)
    assert_same(torch.cat([first["y"], rest["y"]], 2), whole["y"])
    assert_same(rest["cache"].own.keys, whole["cache"].own.keys)
    assert [key.shape for key in cache.own.keys] == [(3, 2, 3, 3)] * 2  # what was given is as it was


def test_an_output_number_that_differs_between_members_is_an_error() -> None:
    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, float]:
            y = self.layer(x)
            return y, y.sum().item()

    model = Number()
    with pytest.raises(TypeError, match="output: what is no tensor must be the same for all members"):
        fe.make_forward(model, strategy="loop")(fe.batchensemble_params(model, 2), torch.ones(1, 3))


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_an_output_that_is_no_pytree_is_an_error(strategy: str) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Output:
            return Output(self.layer(x))

    model = Wrapping()
    forward = fe.make_forward(model, strategy=strategy)
    with pytest.raises(TypeError, match=r"output: expected tensors.*got Output"):
        forward(fe.batchensemble_params(model, 2), torch.ones(1, 3))
    assert forward.strategy == ("loop" if strategy == "loop" else "vmap")


# --------------------------------------------------------------------------------------------------------------------
# Buffers


@pytest.mark.parametrize(
    ("kind", "momentum"), [(nn.BatchNorm1d, 0.1), (nn.BatchNorm1d, None), (nn.InstanceNorm1d, 0.1)]
)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_batchnorm_statistics_are_those_of_each_member_trained_alone(
    kind: type[nn.Module], strategy: str, momentum: Any
) -> None:
    model = norm_net(kind)
    model[1].momentum = momentum
    forward = fe.make_forward(model, strategy=strategy)
    for params in both_kinds(model, 3):
        buffers = want = fe.ensemble_buffers(model, 3)
        for _ in range(3):
            x = randn(4, 2, 6)
            before = snapshot(model, params, buffers, x)
            expected, want = loop(model, params, x, buffers=want)

            def loss(
                p: fe.EnsembleParams, b: dict[str, Tensor], x: Tensor = x
            ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
                y, b = forward(p, x, buffers=b)
                return y.square().sum(), (y.detach(), b)

            _, (_, (got, new)) = grad_and_value(loss, has_aux=True)(params, buffers)
            assert_untouched(before, model, params, buffers, x)
            assert_same(got, expected)
            assert_same(new, want)
            buffers = new
        if kind is nn.BatchNorm1d:  # InstanceNorm has the counter, and does not count
            assert buffers["1.num_batches_tracked"].tolist() == [3, 3, 3]
        assert not torch.allclose(buffers["1.running_mean"][0], buffers["1.running_mean"][1])
        model.eval()
        x = randn(4, 2, 6)
        got, after = forward(params, x, buffers=buffers)
        assert_same(got, loop(model, params, x, buffers=buffers)[0])
        assert_same(after, buffers)
        model.train()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_an_update_that_would_be_lost_is_an_error(strategy: str) -> None:
    class Counting(nn.Module):
        calls: Tensor
        mean: Tensor

        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.in_place = in_place
            self.register_buffer("calls", torch.tensor(0))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.in_place:
                self.calls += 1
                with torch.no_grad():
                    self.mean.mul_(0.9).add_(0.1 * self.layer(x).mean(0))
            elif self.training:
                self.calls = self.calls + 1
            return self.layer(x)

    for model in (norm_net(nn.BatchNorm1d), Counting(True), Counting(False)):
        x = randn(4, 2, 6) if isinstance(model, nn.Sequential) else torch.randn(4, 2)
        forward = fe.make_forward(model, strategy=strategy)
        params = fe.batchensemble_params(model, 2)
        before = snapshot(model, params)
        with pytest.raises(ValueError, match=r"buffers: got None.*(running_mean|calls)"):
            forward(params, x)
        assert_untouched(before, model, params)
        _, buffers = forward(params, x, buffers=fe.ensemble_buffers(model, 2))
        assert all(count.tolist() == [1, 1] for name, count in buffers.items() if count.dtype == torch.int64)
        if isinstance(model, Counting) and model.in_place:
            assert not torch.allclose(buffers["mean"][0], buffers["mean"][1])
        model.eval()
        assert_same(forward(params, x), loop(model, params, x))


def test_eval_reads_the_models_own_buffers() -> None:
    model, x = norm_net(nn.BatchNorm1d).eval(), randn(4, 2, 6)
    forward, params = fe.make_forward(model), fe.batchensemble_params(model, 2)
    first = forward(params, x)
    with torch.no_grad():
        model[1].running_mean.add_(1.0)
    assert not torch.allclose(first, forward(params, x))
    assert_same(forward(params, x), loop(model, params, x))


# --------------------------------------------------------------------------------------------------------------------
# Purity: nothing is left behind


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_inputs_written_in_place_are_left_alone(strategy: str) -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            return self.layer(x)

    model, x = Doubling().double(), randn(4, 3)
    params = fe.batchensemble_params(model, 3)
    before = snapshot(x)
    want = loop(model, params, x.clone() * 2 / 2)
    assert_same(fe.make_forward(model, strategy=strategy)(params, x)[0], want[0])
    own = fe.make_forward(model, strategy=strategy, member_inputs=True)(params, x.expand(3, 4, 3))
    assert_same(own, fe.make_forward(model, strategy=strategy)(params, x))
    assert_untouched(before, x)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_model_that_writes_to_its_parameters_is_an_error(strategy: str) -> None:
    class Clamping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.1, 0.1)
            return self.layer(x)

    model = Clamping()
    with pytest.raises(ValueError, match=r"Clamping writes in place to its parameters \['layer.weight'\]"):
        fe.make_forward(model, strategy=strategy)(fe.ensemble_params(model, 2), torch.ones(1, 3))


def test_threads_do_not_disturb_each_other() -> None:
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))), torch.ones(2, 4)
    forward = fe.make_forward(model)
    each = [fe.ensemble_params(model, 2) for _ in range(4)]
    want = [forward(params, x).detach() for params in each]

    def call(i: int) -> bool:
        return all(torch.equal(forward(each[i], x).detach(), want[i]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_passed_in_is_modified(name: str, strategy: str) -> None:
    case = model_case(name)
    forward = fe.make_forward(case.model, strategy="auto" if strategy == "vmap" else strategy)
    for params in both_kinds(case.model, 2):
        buffers = fe.ensemble_buffers(case.model, 2)
        before = snapshot(case.model, params, buffers, case.args)
        attributes = {name: dict(vars(module)) for name, module in case.model.named_modules()}
        forward(params, *case.args)
        case.model.train()
        forward(params, *case.args, buffers=buffers)
        case.model.eval()
        assert_untouched(before, case.model, params, buffers, case.args)
        now = {name: dict(vars(module)) for name, module in case.model.named_modules()}
        assert now.keys() == attributes.keys()
        assert all(
            now[name][key] is value for name in now for key, value in attributes[name].items() if key != "training"
        )


# --------------------------------------------------------------------------------------------------------------------
# Strategies


def test_auto_takes_vmap_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "functorch_ens"):
        forward = fe.make_forward(nn.Linear(2, 2))
    assert forward.strategy == "vmap" and "'vmap'" in caplog.text and "Linear" in caplog.text


def test_auto_takes_the_loop_for_what_is_known_to_need_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "functorch_ens"):
        forward = fe.make_forward(nn.ModuleDict({"body": nn.LSTM(2, 2)}))
    assert forward.strategy == "loop" and "body (LSTM)" in forward.reason and forward.reason in caplog.text


class _Branching(nn.Module):
    """Control flow that depends on data: no vmap can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -2 * y


def test_auto_falls_back_to_the_loop_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, x = _Branching().double(), randn(4, 3)
    params = fe.ensemble_params(model, 6)
    forward = fe.make_forward(model)
    assert forward.strategy == "vmap"
    with caplog.at_level(logging.WARNING, "functorch_ens"):
        assert_same(forward(params, x), loop(model, params, x))
    assert (
        forward.strategy == "loop"
        and forward.reason.startswith("vmap failed in _Branching: ")
        and forward.reason in caplog.text
    )
    assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))


def test_vmap_is_refused_where_the_model_shows_that_it_cannot() -> None:
    model = nn.ModuleDict({"body": nn.GRU(2, 2)})
    with pytest.raises(RuntimeError, match=r'strategy: got "vmap", but body \(GRU\) calls .*; strategy="loop" can'):
        fe.make_forward(model, strategy="vmap")
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(RuntimeError, match=r"0 \(Linear\) has backward hooks"):
        fe.make_forward(hooked, strategy="vmap")


def test_the_module_that_vmap_fails_in_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), _Branching()))
    params = fe.ensemble_params(model, 2)
    with pytest.raises(RuntimeError, match=r"vmap cannot serve 1\.1 \(_Branching\): .*data-dependent"):
        fe.make_forward(model, strategy="vmap")(params, torch.ones(4, 3))
    forward = fe.make_forward(model)
    forward(params, torch.ones(4, 3))
    assert forward.strategy == "loop" and "1.1 (_Branching)" in forward.reason


@pytest.mark.parametrize("strategy", ["auto", "vmap"])
def test_random_numbers_and_values_written_in_place_differ_between_members(strategy: str) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, noise = torch.zeros(x.shape[0], 2), torch.empty(x.shape[0], 2)
            mask = torch.ones(x.shape[0], 2, dtype=torch.bool)
            out[:] = self.layer(x)
            noise.uniform_()
            mask &= out > 0
            return out * mask, noise

    model, x = InPlace(), torch.randn(50, 3)
    params = fe.ensemble_params(model, 3)
    forward = fe.make_forward(model, strategy=strategy)
    for _ in range(2):  # the call that finds the way, and the next
        torch.manual_seed(4)
        first = forward(params, x)
        assert forward.strategy == "vmap" and "made each member's own" in forward.reason
        values, noise = first
        assert_same(values, fe.make_forward(model, strategy="loop")(params, x)[0])
        assert (noise[0] - noise[1]).abs().max() > 0.1 and noise.min() >= 0 and noise.max() <= 1
        torch.manual_seed(4)
        assert_same(forward(params, x), first)  # also the first call, in which vmap failed, drew from this state


def test_vmap_that_cannot_says_what_can() -> None:
    model = _Branching()
    forward = fe.make_forward(model, strategy="vmap")
    with pytest.raises(RuntimeError, match=r'vmap cannot serve _Branching: .*data-dependent.*strategy="loop" can'):
        forward(fe.ensemble_params(model, 2), torch.ones(4, 3))
    assert forward.strategy == "vmap"


# --------------------------------------------------------------------------------------------------------------------
# Transforms and compilation


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("kind", ["classic", "batchensemble"])
def test_compiles_whole_with_gradient_and_buffers(kind: str, strategy: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    params = both_kinds(model, 3)[kind == "batchensemble"]
    buffers, x, y = fe.ensemble_buffers(model, 3), randn(5, 2, 6), torch.randint(3, (5,))
    forward = fe.make_forward(model, strategy=strategy)

    def loss(p: fe.EnsembleParams) -> tuple[Tensor, dict[str, Tensor]]:
        logits, new = forward(p, x, buffers=buffers)
        return torch.stack([F.cross_entropy(member, y) for member in logits]).sum(), new

    step = grad_and_value(loss, has_aux=True)
    compiled = compile_whole(step)
    assert_same(compiled(params), step(params))
    model.eval()
    assert_same(compile_whole(forward)(params, x), forward(params, x))


@settings(max_examples=5)  # a compilation each
@given(case=fast_layers, E=members)
def test_any_fast_rule_compiles(case: Case, E: int) -> None:
    torch.compiler.reset()
    params = fe.batchensemble_params(case.model, E)
    compiled = compile_whole(fe.make_forward(case.model))
    assert_same(compiled(params, *case.args), loop(case.model, params, *case.args))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_autograd_and_functional_gradients_agree(strategy: str) -> None:
    model, x = Residual().double(), randn(4, 4)
    forward = fe.make_forward(model, strategy=strategy)
    for params in both_kinds(model, 3):
        functional = grad(lambda p: forward(p, x)["logits"].square().sum())(params)
        assert isinstance(functional, fe.EnsembleParams)
        forward(params, x)["logits"].square().sum().backward()
        for mine, theirs in zip(
            (*functional.shared.values(), *functional.stacked.values()),
            (*params.shared.values(), *params.stacked.values()),
            strict=True,
        ):
            assert theirs.grad is not None
            assert_same(mine, theirs.grad)


@given(case=fast_layers, E=st.integers(2, 4), i=st.integers(0, 3))
def test_members_are_independent_and_in_order(case: Case, E: int, i: int) -> None:
    """Permuting the members permutes the outputs, and a member's output has no gradient in another's own parameters."""
    i %= E
    forward = fe.make_forward(case.model)
    for params in both_kinds(case.model, E):
        order = torch.randperm(E)
        permuted = params._replace(stacked={name: stack.detach()[order] for name, stack in params.stacked.items()})
        assert_same(forward(permuted, *case.args), forward(params, *case.args)[order])
        total = forward(params, *case.args)[i].sum()
        for stack in torch.autograd.grad(
            total, list(params.stacked.values()), allow_unused=True, materialize_grads=True
        ):
            assert not stack[[j for j in range(E) if j != i]].any()


def test_evaluating_between_compiled_steps_compiles_nothing_again() -> None:
    model, x = norm_net(nn.BatchNorm1d), randn(4, 2, 6)
    forward, params, buffers = fe.make_forward(model), fe.batchensemble_params(model, 2), fe.ensemble_buffers(model, 2)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(params, x, buffers=buffers)
        model.eval()
        forward(params, x, buffers=buffers)
        model.train()
    assert counter.frame_count == 1
    model.eval()
    assert_same(compiled(params, x, buffers=buffers), forward(params, x, buffers=buffers))
    assert counter.frame_count == 2


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "fast"}, ValueError, "strategy: expected one of .*'auto', 'vmap', 'loop'.* got 'fast'"),
        ({"randomness": None}, ValueError, "randomness: expected one of .* got None"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected a positive int, None or 'auto', got 0"),
        ({"chunk_size": 1.5}, TypeError, r"chunk_size: expected a positive int, None or 'auto', got 1\.5"),
        ({"member_inputs": 1}, TypeError, "member_inputs: expected True or False, got 1"),
    ],
)
def test_unknown_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fe.make_forward(nn.Linear(2, 2), **options)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop"])
def test_the_models_own_error_comes_through(strategy: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    params = fe.batchensemble_params(model, 5)
    forward = fe.make_forward(model, strategy=strategy)
    before = snapshot(model, params)
    with pytest.raises(RuntimeError, match=r"The size of tensor a \(7\) must match|cannot be multiplied") as caught:
        forward(params, torch.ones(4, 7))
    assert any(
        "each of the 5 members gets every input [B, ...] whole" in note and "[4, 7]" in note
        for note in caught.value.__notes__
    )
    with pytest.raises(TypeError, match="forward"):
        forward(params, torch.ones(4, 3), unknown=1)
    assert_untouched(before, model, params)
    assert forward.strategy == ("loop" if strategy == "loop" else "vmap")
    assert_same(forward(params, torch.ones(4, 3)).double(), loop(model, params, torch.ones(4, 3)).double(), 1e-5)
