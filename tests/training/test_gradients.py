"""The gradients of a train step: by plain autograd, and compiled ones that are compared with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same, both_kinds, compiler, loop, tensors_of
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

import functorch_ens as fe
from functorch_ens._compile import Compiled

pytestmark = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")


def _step(forward: fe.Forward, params: fe.EnsembleParams, loss: Any, **options: Any) -> fe.TrainStep:
    trained = [tensor for tensor in tensors_of(params).values() if tensor.requires_grad]
    return fe.make_train_step(forward, loss, torch.optim.SGD(trained, lr=0.1), **{"compile": False, **options})


def _wanted(
    model: nn.Module, params: fe.EnsembleParams, loss: Any, x: Tensor, targets: list[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses and gradients of a plain loop over modules; `targets` are those of each member."""
    losses = torch.stack([loss(output, y) for output, y in zip(loop(model, params, x), targets, strict=True)])
    trained = {name: tensor for name, tensor in tensors_of(params).items() if tensor.requires_grad}
    found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True, materialize_grads=True)
    return losses, dict(zip(trained, found, strict=True))


def _check(model: nn.Module, loss: Any, x: Tensor, y: Any, E: int = 3, **options: Any) -> fe.TrainStep:
    """Losses and gradients of a step equal those of the loop; twice, since the first call decides."""
    for params in both_kinds(model, E):
        step = _step(fe.make_forward(model), params, loss, **options)
        losses, slopes = _wanted(model, params, loss, x, [y] * E)
        for _ in range(2):
            got = step.gradients(params, x, y)
            assert_same(got.losses, losses)
            assert got.gradients.keys() == slopes.keys()
            assert_same({name: got.gradients[name] for name in slopes}, slopes)  # a compiler may order them otherwise
    return step


# --------------------------------------------------------------------------------------------------------------------
# Losses


def _hard_examples(output: Tensor, y: Tensor) -> Tensor:
    each = (output - y).square()
    return each[each > each.detach().median()].mean()


def _weighted_by_a_number(output: Tensor, y: Tensor) -> Tensor:
    value = (output - y).square().mean()
    return value / (1 + value.item())


def _by_its_sign(output: Tensor, y: Tensor) -> Tensor:
    value = (output - y).mean()
    return 2 * value if value > 0 else -value


def _penalised(output: Tensor, y: Tensor) -> Tensor:
    value = (output - y).square().mean()
    (slope,) = torch.autograd.grad(value, output, create_graph=True)
    return value + slope.square().sum()


def _matched(output: Tensor, y: Tensor) -> Tensor:
    cost = (output[:, None] - y).square().sum(-1)
    nearest = np.asarray(cost.detach()).argmin(1)
    return cost[torch.arange(len(output)), torch.from_numpy(nearest)].mean()


def _boxes(output: Tensor, y: Tensor) -> Tensor:
    total = output.new_zeros(())
    for mine, theirs in zip(output, y, strict=True):
        overlap = (torch.minimum(mine[1], theirs[1]) - torch.maximum(mine[0], theirs[0])).clamp(min=0)
        if overlap > 0:
            total = total - overlap
        else:
            total = total + (mine - theirs).abs().sum()
    return total


def _asks(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean() * (10 if output.requires_grad else 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gaussian_nll_loss": lambda output, y: F.gaussian_nll_loss(output[:, 0], y[:, 0], output[:, 1].exp()),
    "GaussianNLLLoss": lambda output, y: nn.GaussianNLLLoss(full=True)(output, y, output.square() + 1),
    "MultivariateNormal": lambda output, y: -MultivariateNormal(output, torch.eye(2).double()).log_prob(y).mean(),
    "kl_divergence": lambda output, y: kl_divergence(Normal(output, 1.0), Normal(y, 2.0)).mean(),
    "hard examples": _hard_examples,
    "item": _weighted_by_a_number,
    "a branch by its value": _by_its_sign,
    "autograd.grad": _penalised,
    "matching by numpy": _matched,
    "boxes": _boxes,
    "requires_grad": _asks,
}
BY_VMAP = {"MultivariateNormal", "kl_divergence"}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_equals_the_plain_loop(name: str, caplog: pytest.LogCaptureFixture) -> None:
    step = _check(nn.Linear(4, 2).double(), LOSSES[name], randn(6, 4), randn(6, 2))
    by_loop = "the loss is computed by a loop over the members, for vmap failed in it: "
    assert (by_loop in step.reason) is (name not in BY_VMAP), step.reason
    assert step.strategy == "vmap"
    assert len(caplog.records) == 2 * (name not in BY_VMAP)  # once for each of the two steps
    outputs, y = randn(3, 6, 2).requires_grad_(), randn(6, 2)
    want = torch.stack([LOSSES[name](output, y) for output in outputs])
    assert_same(fe.member_losses(LOSSES[name], outputs, y), want)


@pytest.mark.parametrize("name", ["gaussian_nll_loss", "a branch by its value", "autograd.grad", "matching by numpy"])
def test_any_loss_equals_the_plain_loop_also_compiled(name: str) -> None:
    _check(nn.Linear(4, 2).double(), LOSSES[name], randn(6, 4), randn(6, 2), compile={"backend": compiler()})


def test_a_loss_that_raises_its_own_error_is_not_looped_over() -> None:
    calls = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        raise TimeoutError("late")

    with pytest.raises(TimeoutError, match="late"):
        fe.member_losses(loss, randn(3, 6, 2), randn(6, 2))
    assert len(calls) == 1


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_a_loss_without_a_gradient_is_an_error(compile: Any) -> None:
    model, x, y = nn.Linear(4, 2), torch.ones(3, 4), torch.ones(3, 2)
    params = fe.ensemble_params(model, 2)
    forward = fe.make_forward(model)
    step = _step(forward, params, lambda output, y: F.mse_loss(output.detach(), y), compile=compile)
    with pytest.raises(ValueError, match=r"loss: it has no gradient, so nothing would be trained; is it, .* detached"):
        step(params, x, y)
    assert _step(forward, params, F.mse_loss).gradients(params, x, y).losses.shape == (2,)


# --------------------------------------------------------------------------------------------------------------------
# Targets of each member, and rows of keyword arguments


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"accumulate": 3}])
@pytest.mark.parametrize("chunk", [None, 2])
def test_members_with_targets_of_their_own(options: dict[str, Any], chunk: int | None) -> None:
    model, x, y = nn.Linear(4, 1).double(), randn(6, 4), randn(3, 6, 1)
    params = fe.ensemble_params(model, 3)
    forward = fe.make_forward(model, chunk_size=chunk)
    step = _step(forward, params, F.mse_loss, member_targets=True, **options)
    losses, slopes = _wanted(model, params, F.mse_loss, x, list(y))
    got = step.gradients(params, x, y)
    assert_same(got.losses, losses)
    assert_same(got.gradients, slopes)
    # What prepare makes of an index has the targets of each member too.
    step = _step(forward, params, F.mse_loss, member_targets=True, prepare=lambda i: (x[i], y[:, i]), **options)
    got = step.gradients(params, torch.arange(6))
    assert_same(got.gradients, slopes)
    step = _step(forward, params, F.mse_loss, member_targets=True, prepare=lambda x, y: (x / 2, y), **options)
    assert_same(step.gradients(params, 2 * x, y).gradients, slopes)


def test_members_learn_what_they_were_asked_to() -> None:
    model, x = nn.Linear(2, 1), torch.randn(64, 2)
    params = fe.ensemble_params(model, 4)
    loss = lambda output, y: F.mse_loss(output[:, 0], y)  # noqa: E731
    y = torch.arange(4.0)[:, None].expand(4, 64)
    optimizer = torch.optim.Adam(list(params.stacked.values()), lr=0.1)
    step = fe.make_train_step(fe.make_forward(model), loss, optimizer, member_targets=True, compile=False)
    for _ in range(200):
        step(params, x, y)
    assert torch.allclose(params.stacked["bias"][:, 0], torch.arange(4.0), atol=0.05)


@pytest.mark.parametrize(
    ("output", "y"),
    [((3, 6), (3, 6)), ((3, 6, 1), (3, 6)), ((3, 6, 1), (3, 6, 1)), ((3, 6, 2), (3, 6, 2)), ((3, 3, 1), (3, 3))],
)
def test_targets_of_members_are_refused_where_nothing_was_said(output: tuple[int, ...], y: tuple[int, ...]) -> None:
    loss = lambda output, y: (output - y).square().mean()  # noqa: E731
    with pytest.raises(ValueError, match=r"y: got .* as if every member had its own; member_targets=True gives"):
        fe.member_losses(loss, randn(*output), randn(*y))


@pytest.mark.parametrize(
    ("output", "y"),
    [((3, 3, 2), (3, 2)), ((3, 3, 3), (3, 3)), ((4, 3, 2), (3, 4)), ((3, 3), (3,)), ((2, 3, 5), (3, 2))],
)
def test_targets_that_can_be_those_of_the_rows_are_taken(output: tuple[int, ...], y: tuple[int, ...]) -> None:
    loss = lambda output, y: output.sum() * y.sum()  # noqa: E731
    outputs, target = randn(*output), randn(*y)
    assert_same(fe.member_losses(loss, outputs, target), torch.stack([loss(each, target) for each in outputs]))


class _Masked(nn.Module):
    """Uses the first rows of its mask, and those of tensors that hide in a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, mask: Tensor, more: Any, scale: Tensor) -> Tensor:
        y = self.layer(x * mask[: len(x)])
        return y + more["shift"][0][: len(x)] * scale


def _keywords(*lead: int) -> dict[str, Any]:
    return {"mask": randn(*lead, 4), "more": {"shift": (randn(*lead, 2), 3)}, "scale": randn(2)}


def test_keyword_tensors_are_cut_along_with_the_rows() -> None:
    model, x, kwargs = _Masked().double(), randn(10, 4), _keywords(10)
    params, forward = fe.batchensemble_params(model, 3), fe.make_forward(model)
    with torch.no_grad():
        want = forward(params, x, **kwargs)
    for size in (3, 5, 10, 64):
        assert_same(fe.predict(forward, params, x, batch_size=size, **kwargs), want)
    y = randn(10, 2)
    whole = _step(forward, params, F.mse_loss).gradients(params, x, y, **kwargs)
    for parts in (2, 5):
        assert_same(_step(forward, params, F.mse_loss, accumulate=parts).gradients(params, x, y, **kwargs), whole)


def test_keyword_tensors_of_members_are_cut_along_with_their_rows() -> None:
    model, x, kwargs = _Masked().double(), randn(3, 10, 4), _keywords(3, 10)
    kwargs["scale"] = kwargs["scale"].expand(3, 2)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, member_inputs=True)
    y = randn(3, 10, 2)
    whole = _step(forward, params, F.mse_loss).gradients(params, x, y, **kwargs)
    assert_same(_step(forward, params, F.mse_loss, accumulate=5).gradients(params, x, y, **kwargs), whole)
    same = x[:1].expand(3, 10, 4)
    with torch.no_grad():
        want = forward(params, same, **kwargs)
    assert_same(fe.predict(forward, params, x[0], batch_size=4, **kwargs), want)
    shared = {"mask": kwargs["mask"][1], "more": {"shift": (kwargs["more"]["shift"][0][1], 3)}}
    repeated = {name: value for name, value in _keywords(3, 10).items() if name == "scale"}
    repeated = {
        "mask": shared["mask"].expand(3, 10, 4),
        "more": {"shift": (shared["more"]["shift"][0].expand(3, 10, 2), 3)},
    }
    with torch.no_grad():
        want = forward(params, same, scale=kwargs["scale"], **repeated)
    assert_same(fe.predict(forward, params, x[0], batch_size=4, scale=kwargs["scale"], **shared), want)


# --------------------------------------------------------------------------------------------------------------------
# Compiled


class _Net(nn.Module):
    """Two layers with something of a user's in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


_library = torch.library.Library("functorch_ens_tests", "FRAGMENT")
_library.define("twice(Tensor x) -> Tensor")
_library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")


@torch.library.custom_op("functorch_ens_tests::square", mutates_args=())
def _square(x: Tensor) -> Tensor:
    return x * x


_square.register_fake(torch.empty_like)
_square.register_autograd(
    lambda ctx, gradient: 2 * gradient * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def _checkpointed(h: Tensor) -> Tensor:
    return checkpoint(torch.tanh, h, use_reentrant=False)


def _printed(h: Tensor) -> Tensor:
    print("forward", file=io.StringIO())
    return h


COMPILED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "plain": (torch.tanh, "functorch_ens"),
    "a hook": (lambda h: (h.register_hook(lambda g: g / 10), h)[1] if h.requires_grad else h, "functorch_ens"),
    "a composite operator": (lambda h: torch.ops.functorch_ens_tests.twice(h), ""),
    "an operator with a derivative": (lambda h: _square(h), ""),
    "checkpoint": (_checkpointed, "torch.compile"),
    "a seed": (lambda h: h * torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=h.dtype), "eager"),
    "a print": (_printed, "torch.compile"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_right_and_leaves_torch_as_it_was(name: str) -> None:
    between, by = COMPILED[name]
    step = _check(_Net(between).double(), F.mse_loss, randn(6, 4), randn(6, 2), compile={"backend": compiler()})
    assert by in ("", step.compiled_by), step.reason
    # Hooks on saved tensors, which checkpointing needs, were left forbidden after a compilation that failed.
    layer = nn.Linear(4, 2)
    checkpoint(layer, torch.ones(3, 4), use_reentrant=False).sum().backward()
    assert layer.weight.grad is not None


def test_a_graph_break_is_told_once_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = _Net(_printed), torch.ones(3, 4), torch.ones(3, 2)
    params = fe.ensemble_params(model, 2)
    step = _step(fe.make_forward(model), params, F.mse_loss, compile={"backend": "eager"})
    for _ in range(3):
        step(params, x, y)
    told = [record.message for record in caplog.records if record.name == "functorch_ens._compile"]
    assert len(told) == 1
    assert "the step is compiled in parts, for it cannot be one graph" in told[0]
    assert f"{__file__}, line {_printed.__code__.co_firstlineno + 1}, in _printed" in told[0]
    assert told[0] in step.reason


class _Objective:
    """An objective of one number, whose compiled form is wrong by a factor."""

    def __init__(self, by_grad: float, in_parts: float) -> None:
        self._factors = by_grad, in_parts

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def by_grad(self, x: Tensor) -> Tensor:
        return x * self._factors[0]

    def total(self, x: Tensor) -> Tensor:
        return x * self._factors[1]

    def by_autograd(self, total: Any, x: Tensor) -> Tensor:
        return total(x)

    def disagreement(self, got: Tensor, want: Tensor, random: bool, arguments: Any) -> str:
        return "" if torch.equal(got, want) else "wrong"


@pytest.mark.parametrize(
    ("factors", "by"), [((1.0, 1.0), "functorch_ens"), ((2.0, 1.0), "torch.compile"), ((2.0, 2.0), "eager")]
)
def test_a_compiled_result_that_is_wrong_is_not_used(
    factors: tuple[float, float], by: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = Compiled(_Objective(*factors), {"backend": "eager"})
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == [1, 1]
    assert compiled.by == by
    assert ("wrong" in compiled.reason) is (by != "functorch_ens")
    told = [record for record in caplog.records if record.name.startswith("functorch_ens")]
    assert len(told) == (by != "functorch_ens")


def test_a_new_situation_is_compared_anew() -> None:
    class Sometimes(_Objective):
        def by_grad(self, x: Tensor) -> Tensor:
            return x if training else 2 * x

    training = True
    compiled = Compiled(Sometimes(1.0, 1.0), {"backend": "eager"}, situation=lambda *_: training)
    assert compiled(torch.ones(2)).tolist() == [1, 1]
    assert compiled.by == "functorch_ens"
    training = False
    assert compiled(torch.ones(2)).tolist() == [1, 1]
    assert compiled.by == "torch.compile"


@pytest.mark.parametrize("error", [MemoryError(), TimeoutError(), ConnectionResetError()], ids=repr)
def test_a_transient_error_does_not_end_compilation(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(function: Any, **options: Any) -> Any:
        raise error

    compiled = Compiled(_Objective(1.0, 1.0), {"backend": "eager"})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", fake)
        with pytest.raises(type(error)):
            compiled(torch.ones(2))
    compiled(torch.ones(2))
    assert compiled.by == "functorch_ens"


def test_rounding_is_no_disagreement() -> None:
    """Gradients that are nearly 0, of a bias before a norm, are of rounding alone; a factor of two is an error."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    params, x, y = fe.ensemble_params(model, 2), torch.randn(16, 4), torch.randn(16, 2)
    buffers = fe.ensemble_buffers(model, 2)
    step = _step(fe.make_forward(model), params, F.mse_loss)
    objective, work = step._objective, step._work(params, (x, y), buffers, {})
    want = step.gradients(params, x, y, buffers=buffers)
    arguments = (2, work, False)
    noisy = {name: g * (1 + 1e-4 * torch.randn_like(g)) for name, g in want.gradients.items()}
    noisy["0.bias"] = torch.randn_like(noisy["0.bias"]) * 1e-8
    assert objective.disagreement(want._replace(gradients=noisy), want, False, arguments) == ""
    for name, factor in (("0.weight", 2.0), ("3.bias", 0.0), ("3.weight", 1.1)):
        wrong = {**want.gradients, name: want.gradients[name] * factor}
        assert name in objective.disagreement(want._replace(gradients=wrong), want, False, arguments)
    zero = {**want.gradients, "3.bias": torch.zeros(2, 2)}
    assert objective.disagreement(want._replace(gradients=zero), want, True, arguments).startswith(
        "of 3.bias it differs"
    )
    other = {name: torch.randn_like(g) for name, g in want.gradients.items()}
    assert objective.disagreement(want._replace(gradients=other), want, True, arguments) == ""
