"""What vmap would compute wrongly in silence: values and gradients are those of a loop over ordinary modules."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same, both_kinds, gradients, gradients_of, loop
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint

import functorch_ens as fe
from functorch_ens import _torch
from functorch_ens.forward.failures import VmapCannot, is_of_vmap, is_transient
from functorch_ens.forward.watch import Notes, watched_vmap

# torch says of an operator without a derivative of its own, rightly, that its kernel may have none.
pytestmark = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered", "ignore:Full backward hook")
_kept: list[Tensor] = []


class _Square(torch.autograd.Function):
    """As functions were written before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


_library = torch.library.Library("functorch_ens_tests", "FRAGMENT")
_library.define("thrice(Tensor x) -> Tensor")
_library.impl("thrice", lambda x: 3 * x, "CompositeExplicitAutograd")
_library.define("on_cpu(Tensor x) -> Tensor")
_library.impl("on_cpu", lambda x: 3 * x, "CPU")


def _scale_gradient(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient / 10)
    return h


def _noise(h: Tensor) -> Tensor:
    return h + torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=h.dtype)


def _seeded(h: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return h * torch.rand_like(h) + F.dropout(h)


def _attention(h: Tensor) -> Tensor:
    mask = (h @ h.mT)[None, None]
    return F.scaled_dot_product_attention(h[None, None], h[None, None], h[None, None], mask)[0, 0]


def _saved_elsewhere(h: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return h.tanh() * h


def _without_gradient(h: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.sigmoid()
    with torch.no_grad():
        shift = h.mean(0)
    return h * scale.clone() + shift


def _keep(h: Tensor) -> Tensor:
    _kept.append(h)
    return h


def _retain(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.retain_grad()
    return h.sin()


def _forces(h: Tensor) -> Tensor:
    with torch.enable_grad():
        h = h if h.requires_grad else h.requires_grad_()
        return torch.autograd.grad(h.tanh().square().sum(), h, create_graph=True)[0]


def _printed(h: Tensor) -> Tensor:
    print("forward", file=io.StringIO())
    logging.getLogger("model").debug("forward")
    return h


PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "a hook where it requires a gradient": _scale_gradient,
    "detached where it has no history": lambda h: h.detach() if h.grad_fn is None else h,
    "detached where it is a leaf": lambda h: h.detach() if h.is_leaf else h,
    "noise of a generator of its own": _noise,
    "a permutation of its own": lambda h: h[:, torch.randperm(4, generator=torch.Generator().manual_seed(2))],
    "seeded inside": _seeded,
    "a learned attention mask": _attention,
    "index_fill": lambda h: torch.index_fill(torch.ones_like(h), 1, torch.tensor([1]), h.mean()) * h,
    "select_scatter": lambda h: torch.select_scatter(h.sin(), h.mean(1), 1, 0),
    "as_strided": lambda h: torch.as_strided_copy(h.contiguous(), (2, 4), (4, 1), 4).sum(0) * h,
    "pow_ by a tensor": lambda h: (h.square() + 1).pow_(h.tanh()),
    "an old autograd.Function": lambda h: _Square.apply(h),
    "a composite operator": lambda h: torch.ops.functorch_ens_tests.thrice(h),
    "an operator of the CPU": lambda h: torch.ops.functorch_ens_tests.on_cpu(h),
    "saved tensors on the CPU": _saved_elsewhere,
    "no gradient and inference mode": _without_gradient,
    "kept": _keep,
    "retain_grad": _retain,
    "forces": _forces,
    "checkpoint": lambda h: checkpoint(torch.tanh, h, use_reentrant=False),
    "printed": _printed,
    "a branch by values": lambda h: h * 2 if h.mean() > 0 else h,
}


class Written(nn.Module):
    """Linear layers, with some of the PIECES after each."""

    def __init__(self, *pieces: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(len(pieces) + 1))
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        for layer, piece in zip(self.layers, self.pieces, strict=False):
            x = PIECES[piece](layer(x))
        return self.layers[-1](x)


def _loss(output: Tensor, y: Tensor) -> Tensor:
    return (output.sin() - y).square().sum()


def _check(model: nn.Module, params: fe.EnsembleParams, x: Tensor, **options: Any) -> fe.Forward:
    """Forward and train step equal the plain loop; returns the forward."""
    forward = fe.make_forward(model, **options)
    y = randn(1, 4)

    def seeded(function: Callable[[], Any]) -> Any:
        torch.manual_seed(3)
        return function()

    want = seeded(lambda: loop(model, params, x))
    slopes = seeded(lambda: gradients(lambda params: loop(model, params, x), params))
    assert_same(seeded(lambda: forward(params, x)), want)
    assert_same(seeded(lambda: gradients(forward, params, x)), slopes)

    names = [name for group in params for name in group]
    trained = [tensor for group in params for tensor in group.values()]
    step = fe.make_train_step(forward, _loss, torch.optim.SGD(trained), compile=False)
    losses = seeded(lambda: torch.stack([_loss(output, y) for output in loop(model, params, x)]))
    found = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    got = seeded(lambda: step.gradients(params, x, y))
    assert_same(got.losses, losses)
    for name, tensor, want in zip(names, trained, found, strict=True):
        assert_same(got.gradients[name], torch.zeros_like(tensor) if want is None else want)
    return forward


@pytest.mark.parametrize("piece", PIECES)
def test_every_way_to_write_a_model_equals_the_plain_loop(piece: str) -> None:
    model, x = Written(piece).double(), randn(3, 4)
    for params in both_kinds(model, 3):
        for options in ({}, {"strategy": "loop"}, {"chunk_size": 2}):
            _check(model, params, x, **options)
    assert not any(_torch.is_wrapped(tensor) for tensor in _kept)
    _kept.clear()


@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=2, max_size=4), st.integers(1, 3), st.booleans())
@settings(max_examples=settings().max_examples // 8)
def test_ways_to_write_a_model_can_be_mixed(pieces: list[str], E: int, classic: bool) -> None:
    model = Written(*pieces).double()
    _check(model, both_kinds(model, E)[not classic], randn(3, 4))
    _kept.clear()


BY_VMAP = {
    "noise of a generator of its own",
    "a permutation of its own",
    "a learned attention mask",
    "as_strided",
    "a composite operator",
    "an operator of the CPU",
    "saved tensors on the CPU",
    "no gradient and inference mode",
    "kept",
    "checkpoint",
    "printed",
}


@pytest.mark.parametrize("piece", PIECES)
def test_only_what_vmap_cannot_serve_goes_to_the_loop(piece: str) -> None:
    forward = fe.make_forward(model := Written(piece))
    forward(both_kinds(model, 2)[0], torch.randn(3, 4))
    assert forward.strategy == ("vmap" if piece in BY_VMAP else "loop"), forward.reason
    _kept.clear()


def test_the_reason_names_the_module_and_the_read() -> None:
    forward = fe.make_forward(model := nn.Sequential(nn.Linear(4, 4), Written("detached where it is a leaf")))
    forward(fe.ensemble_params(model, 2), torch.ones(3, 4))
    assert forward.reason == "vmap failed in 1 (Written): it reads is_leaf of a tensor, which says True under vmap"
    with pytest.raises(RuntimeError, match=r"vmap cannot serve 1 \(Written\): it reads is_leaf .*\"loop\" can"):
        fe.make_forward(model, strategy="vmap")(fe.ensemble_params(model, 2), torch.ones(3, 4))


def test_a_read_that_vmap_answers_rightly_is_no_obstacle() -> None:
    forward = fe.make_forward(model := Written("a hook where it requires a gradient"))
    with torch.no_grad():
        forward(fe.ensemble_params(model, 2), torch.ones(3, 4))
    assert forward.strategy == "vmap"
    forward(fe.ensemble_params(model, 2), torch.ones(3, 4))  # the same kind of call but for the gradient
    assert forward.strategy == "loop"


def test_a_function_that_catches_everything_hides_nothing() -> None:
    def reads(x: Tensor) -> Tensor:
        try:
            return x * (2 if x.requires_grad else 1)
        except Exception:
            return x

    with pytest.raises(VmapCannot, match="it reads requires_grad"):
        watched_vmap(reads, [torch.ones(2, requires_grad=True)], randomness="error", notes=Notes())
    assert watched_vmap(reads, [torch.ones(2)], randomness="error", notes=Notes()).tolist() == [1, 1]


def test_what_torchs_own_functions_read_is_seen() -> None:
    target = torch.tensor([0, 1, 2])

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
            return F.linear_cross_entropy(self.body(x), self.head.weight, target, options=options)

    if not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("since torch 2.14")
    model, x = Reads().double(), randn(3, 4)
    forward, params = fe.make_forward(model), both_kinds(model, 2)[0]
    assert_same(gradients(forward, params, x), gradients(lambda params: loop(model, params, x), params))
    assert forward.strategy == "loop"


# --------------------------------------------------------------------------------------------------------------------
# Random numbers


class _Draws(nn.Module):
    """Draws from a generator that it keeps, or from one that it does not hold."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.get = (lambda: generator) if generator is not None else None
        self.own = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        source = self.own if self.get is None else self.get()
        return self.layer(x) * torch.empty(4, dtype=x.dtype).normal_(generator=source)


@pytest.mark.parametrize("options", [{}, {"strategy": "loop"}, {"chunk_size": 2}])
@pytest.mark.parametrize("holds", [True, False])
def test_members_draw_the_same_from_a_generator_of_the_models_own(options: dict[str, Any], holds: bool) -> None:
    model, x = _Draws(None if holds else torch.Generator().manual_seed(5)).double(), randn(3, 4)
    plain = copy.deepcopy(model) if holds else _Draws(torch.Generator().manual_seed(5)).double()
    plain.load_state_dict(model.state_dict())
    params, forward = fe.ensemble_params(model, 3, reset=False), fe.make_forward(model, **options)
    for _ in range(2):  # the second call draws on, as one network does
        got, want = forward(params, x), plain(x)
        assert_same(got, want.expand(3, 3, 4))
        slope = torch.autograd.grad(want.sin().sum(), plain.layer.weight)[0]
        assert_same(torch.autograd.grad(got.sin().sum(), params.stacked["layer.weight"])[0], slope.expand(3, 4, 4))


def test_a_generator_with_values_of_a_member_goes_to_the_loop() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            probability = self.layer(x).sigmoid()
            return probability * torch.bernoulli(probability.detach(), generator=torch.Generator().manual_seed(1))

    model = Chooses().double()
    assert _check(model, both_kinds(model, 3)[0], randn(3, 4)).strategy == "loop"


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_inside_is_noticed_also_where_it_is_the_present_one(seed: int) -> None:
    """`torch.manual_seed(0)` before the call, and nothing drawn since, leaves the very state that the model sets."""
    model = Written("seeded inside").double()
    params, x = both_kinds(model, 3)[0], randn(3, 4)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    forward = fe.make_forward(model)
    got = forward(params, x)
    assert forward.strategy == "loop"
    assert_same(got, loop(model, params, x))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == seed


def test_draws_without_a_seed_still_differ_between_members() -> None:
    torch.manual_seed(0)
    forward = fe.make_forward(model := nn.Sequential(nn.Linear(4, 50), nn.Dropout()))
    got = forward(fe.ensemble_params(model, 2, reset=False), torch.ones(3, 4))
    assert forward.strategy == "vmap"
    assert not torch.equal(got[0], got[1])
    assert torch.initial_seed() == 0


# --------------------------------------------------------------------------------------------------------------------
# Hooks


@pytest.mark.parametrize("kept_by", ["a list on the model", "a list elsewhere"])
def test_what_a_hook_keeps_can_be_used(kept_by: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    elsewhere: list[Any] = []
    model.kept = [] if kept_by == "a list on the model" else elsewhere
    model[0].register_forward_hook(lambda module, args, output: elsewhere.append([module.weight, {"h": output}]))
    params, forward, x = fe.ensemble_params(model, 3), fe.make_forward(model), randn(3, 4)
    for _ in range(2):
        elsewhere.clear()
        forward(params, x)
        weight, h = elsewhere[0][0], elsewhere[0][1]["h"]
        assert forward.strategy == "vmap"
        want = torch.einsum("bi,eoi->ebo", x, params.stacked["0.weight"]) + params.stacked["0.bias"][:, None]
        assert_same(h, want)
        assert_same(weight, params.stacked["0.weight"])
        (slope,) = torch.autograd.grad(h.sum(), params.stacked["0.weight"])  # a penalty on activations trains
        assert_same(slope, x.sum(0).expand(3, 4, 4))
    copy.deepcopy(h.detach())
    torch.save(h.detach(), io.BytesIO())
    fe.make_forward(model)


def _masked(module: nn.Module) -> nn.Module:
    """Its first weight learns in rows 0 and 2 alone."""
    module = module.double()
    mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)[:, None]
    module[0].weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[index]
    return module


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_a_hook_on_a_parameter_sees_the_gradient_of_each_members_weight(options: dict[str, Any]) -> None:
    model = _masked(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    plain, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(3, 4)
    mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    forward = fe.make_forward(model, **options)
    assert forward.reason == "0.weight has hooks on its gradient, which are for that of one network"
    classic, shared = both_kinds(model, 3)
    got, want = gradients(forward, classic, x), gradients(lambda params: loop(plain, params, x), classic)
    want["0.weight"] = want["0.weight"] * mask[:, None]
    assert_same(got, want)
    got, want = gradients(forward, shared, x), gradients(lambda params: loop(plain, params, x), shared)
    assert_same(got["0.weight"], want["0.weight"] * mask[:, None])
    assert_same(got["0.weight_r"], want["0.weight_r"] * mask)
    assert not torch.allclose(got["0.weight_s"], want["0.weight_s"])  # frozen rows tell it nothing
    step = fe.make_train_step(forward, _loss, torch.optim.SGD(list(classic.stacked.values())), compile=False)
    assert not step.gradients(classic, x, randn(3, 2)).gradients["0.weight"][:, [1, 3]].any()


def test_hooks_that_cannot_run_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 2)
    model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    fe.make_forward(model)
    assert "hooks that run after the gradients of ['weight'] are accumulated do not run" in caplog.text


def test_backward_hooks_on_all_modules_run() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double(), randn(3, 4)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    forward(params, x)
    assert forward.strategy == "vmap"
    plain = gradients(forward, params, x)
    hook = register_module_full_backward_hook(
        lambda module, into, out: tuple(g if g is None else g / 2 for g in [*into])
    )
    try:
        halved = gradients(forward, params, x)
    finally:
        hook.remove()
    assert forward.strategy == "loop"
    assert_same(halved["0.weight"], plain["0.weight"] / 2)
    assert_same(halved["1.weight"], plain["1.weight"])


def test_requires_grad_can_be_set_on_a_frozen_output() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    params, x = both_kinds(model, 2)[0], randn(3, 4)
    forward = fe.make_forward(model)
    slopes = gradients(lambda params: loop(model, params, x), params)
    assert_same(gradients(forward, params, x), slopes)
    assert forward.strategy == "vmap"
    assert not params.stacked["0.weight"].requires_grad


def test_a_members_own_flag_is_not_changed() -> None:
    class Freezes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.requires_grad_(False)
            return super().forward(x)

    model = Freezes(4, 2)
    params = fe.ensemble_params(model, 2)
    with pytest.raises(RuntimeError):  # the loop's weights are views: torch says that only leaves can be frozen
        fe.make_forward(model)(params, torch.ones(3, 4))
    assert params.stacked["weight"].requires_grad


# --------------------------------------------------------------------------------------------------------------------
# Errors


class _Mine(RuntimeError):
    pass


class _Fails(nn.Linear):
    """Raises once."""

    def __init__(self, error: Exception) -> None:
        super().__init__(4, 2)
        self.errors = [error]

    def forward(self, x: Tensor) -> Tensor:
        if once:
            raise once.pop()
        return super().forward(x)


once: list[Exception] = []


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("a signal"),
        MemoryError(),
        ConnectionResetError("gone"),
        FileNotFoundError("cache"),
        _Mine("a user's"),
        RuntimeError("raised by the model"),
        KeyError("missing"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_not_vmaps_come_through_and_change_nothing(error: Exception) -> None:
    forward = fe.make_forward(model := _Fails(error))
    params = fe.ensemble_params(model, 2)
    once.append(error)
    with pytest.raises(type(error)) as caught:
        forward(params, torch.ones(3, 4))
    assert caught.value is error
    assert not once
    assert forward.strategy == "vmap"
    assert forward.reason == "nothing in the model is known to need the loop"
    assert forward(params, torch.ones(3, 4)).shape == (2, 3, 2)
    assert forward.strategy == "vmap"


def test_an_error_that_vmap_caused_is_followed() -> None:
    """A library that raises its own error because of vmap's."""

    class Wraps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x) * x.new_ones(()).add(self.weight.sum()).item()
            except RuntimeError as error:
                raise _Mine("no number") from error

    forward = fe.make_forward(model := Wraps(4, 2))
    forward(fe.ensemble_params(model, 2), torch.ones(3, 4))
    assert forward.strategy == "loop"


def test_the_note_is_there_only_where_the_model_raised_it() -> None:
    forward = fe.make_forward(model := Written("an old autograd.Function"))
    params, x = fe.ensemble_params(model, 2), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="setup_context") as caught:
        torch.func.grad(lambda params: forward(params, x).sum())(params)
    assert not any("the model raised this" in note for note in getattr(caught.value, "__notes__", []))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        forward(params, torch.ones(3, 5))
    assert any("the model raised this" in note for note in caught.value.__notes__)


def test_checkpoint_around_an_ensemble() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(3, 4)
    params, forward = fe.batchensemble_params(model, 3), fe.make_forward(model)
    want = gradients(forward, params, x)
    for early_stop in (True, False):
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            output = checkpoint(forward, params, x, use_reentrant=False)
            assert_same(gradients_of(output, params), want)
    assert forward.strategy == "vmap"


@contextmanager
def _raised(error: BaseException, cause: BaseException | None = None) -> Iterator[None]:
    raise error from cause
    yield


def test_which_errors_are_vmaps() -> None:
    with pytest.raises(RuntimeError) as of_vmap:
        vmap(lambda x: x.item())(torch.ones(2))
    assert is_of_vmap(of_vmap.value)
    with pytest.raises(_Mine) as led_to, _raised(_Mine(), of_vmap.value):
        pass
    assert is_of_vmap(led_to.value)
    for error in (RuntimeError("mine"), ValueError("mine"), _Mine()):
        with pytest.raises(type(error)) as caught, _raised(error):
            pass
        assert not is_of_vmap(caught.value)
    assert is_transient(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_transient(of_vmap.value)


def test_without_the_private_names_a_call_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_bdim_of", "_flags_allowed", "_get_unwrapped"):
        monkeypatch.setattr(_torch, name, None)
    forward = fe.make_forward(model := Written("kept"))
    assert forward(fe.ensemble_params(model, 2), torch.ones(3, 4)).shape == (2, 3, 4)
    _kept.clear()
    with _torch.flags_can_be_set(), nullcontext():
        assert _torch.below_vmap(torch.ones(2)).shape == (2,)
