"""What the user changes on a model after its forward was made counts in the next call, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same, gradients, loop
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe


@dataclass(slots=True)
class _Slotted:
    gain: float = 1.0

    def times(self, x: Tensor) -> Tensor:
        return x * self.gain


class _Net(nn.Module):
    """It reads numbers from all kinds of places."""

    offset: Tensor
    late_offset: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.act: nn.Module = nn.Tanh()
        self.last = nn.Linear(4, 2)
        self.drop = nn.Dropout(0.0)
        self.scale = 1.0
        self.settings = {"shift": 0.0}
        self.options = SimpleNamespace(power=1)
        self.gains = [1.0, 1.0]
        self.mask = torch.ones(2, dtype=torch.float64)
        self.kept: Tensor | None = None
        self.history: list[Tensor] = []
        self.sizes: tuple[Any, ...] = (2, (3,))
        self.masks = [torch.ones(2, dtype=torch.float64)]
        self.named_masks = {"a": torch.ones(2, dtype=torch.float64)}
        self.flags = {"plain"}
        self.table = np.ones(2)
        self.slotted = _Slotted()
        self.loose: list[Any] = [
            nn.Linear(2, 2).double().requires_grad_(False),
            nn.LeakyReLU(0.5),
            nn.Dropout(1.0).train(),
        ]  # not registered
        self.register_buffer("offset", torch.ones(2, dtype=torch.float64))
        self.register_buffer("late_offset", None)
        self.chain = nn.Sequential(nn.Tanh(), nn.Softplus())
        self.times = partial(torch.mul, other=1.0)
        self.times_of = _Slotted()
        self.method = self.times_of.times
        self.objects = np.array([1.0, None], dtype=object)
        self.calls = 0
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.act(self.first(x))) * self.scale + self.settings["shift"]
        self.kept = h
        self.history.append(h.detach())
        self.calls += 1
        self.losses.append(float(self.calls))
        out = self.last(h) ** self.options.power * self.gains[1] * self.mask * getattr(self, "late", 1.0)
        out = out * self.masks[-1] * self.named_masks["a"] * torch.as_tensor(self.table) * self.slotted.gain
        out = self.loose[1](self.loose[0](out)) * (3 if "strong" in self.flags else 1)
        out = self.method(self.times(self.chain(out))) * self.objects[0] + self.loose[2](torch.ones_like(out))
        for offset in (self.offset, self.late_offset):
            out = out if offset is None else out + offset
        return out


def _replace_weight(model: _Net) -> None:
    model.loose[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64), requires_grad=False)


def _set(path: str, value: Any) -> Callable[[_Net], None]:
    def change(model: _Net) -> None:
        *names, last = path.split(".")
        owner: Any = model
        for name in names:
            owner = getattr(owner, name)
        setattr(owner, last, value)

    return change


CHANGES: dict[str, Callable[[_Net], Any]] = {
    "a number": _set("scale", 2.0),
    "a number that is set for the first time": _set("late", 3.0),
    "Dropout.p": _set("drop.p", 1.0),
    "in a dict": lambda model: model.settings.update(shift=1.0),
    "in an object": _set("options.power", 2),
    "in a list": lambda model: model.gains.__setitem__(1, 4.0),
    "a submodule": _set("act", nn.Sigmoid()),
    "a constant tensor": _set("mask", torch.tensor([1.0, 3.0], dtype=torch.float64)),
    "a constant tensor in place": lambda model: model.mask.mul_(5),
    "a hook": lambda model: model.first.register_forward_hook(lambda module, args, output: output * 3),
    "a tensor in a list": lambda model: model.masks.__setitem__(0, torch.full((2,), 3.0, dtype=torch.float64)),
    "a tensor in a dict": lambda model: model.named_masks.update(a=torch.full((2,), 3.0, dtype=torch.float64)),
    "in a set": lambda model: model.flags.add("strong"),
    "another in a set": lambda model: model.flags.symmetric_difference_update(("plain", "strong")),
    "an array in place": lambda model: model.table.__imul__(3),
    "in a slot": _set("slotted.gain", 2.0),
    "on a module that is not registered": lambda model: setattr(model.loose[1], "negative_slope", 3.0),
    "a tensor of such a module": lambda model: model.loose[0].weight.mul_(2),
    "such a module": lambda model: model.loose.__setitem__(1, nn.Tanh()),
    "a buffer where none was": _set("late_offset", torch.ones(2, dtype=torch.float64)),
    "a buffer in place": lambda model: model.offset.add_(1),
    "a buffer that is gone": _set("offset", None),
    "the mode of a module that is not registered": lambda model: model.loose[2].eval(),
    "the weight of such a module": _replace_weight,
    "the order of submodules": lambda model: model.chain._modules.update({"0": model.chain._modules.pop("0")}),
    "in a partial": lambda model: model.times.keywords.update(other=3.0),
    "behind a method": _set("times_of.gain", 2.0),
    "in an object array": lambda model: model.objects.__setitem__(0, 3.0),
    "a hook before": lambda model: model.last.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_change_counts_in_the_next_call(name: str, strategy: str) -> None:
    model, x = _Net().double(), randn(5, 3)
    params, forward = fe.batchensemble_params(model, 3), fe.make_forward(model, strategy=strategy)
    before = forward(params, x)
    assert forward.revision == 0
    CHANGES[name](model)
    want = loop(model, params, x)
    for _ in range(2):
        got = forward(params, x)
        assert_same(got, want)
    assert not torch.allclose(got, before)
    assert forward.revision == (name != "a buffer in place")  # buffers are read at each call
    if name != "Dropout.p":  # predict is in eval mode
        assert_same(fe.predict(forward, params, x), want)


def test_caches_are_no_changes(caplog: pytest.LogCaptureFixture) -> None:
    model, x = _Net().double(), randn(5, 3)
    model(x)  # it has kept one already
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    want = forward(params, x)
    for _ in range(3):
        model(x)
        assert_same(forward(params, x), want)
    model.eval()
    model.scale = 1.0 * len([x])  # the same number again
    model.sizes = (2, tuple([3]))
    assert_same(forward(params, x), want)
    assert forward.revision == 0
    assert not [record for record in caplog.records if "cache" in record.message]


def test_a_hook_on_a_gradient_counts_in_the_next_call() -> None:
    model, x = _Net().double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    before = gradients(forward, params, x)
    handle = model.first.weight.register_hook(lambda gradient: gradient * 3)
    after = gradients(forward, params, x)
    assert_same(after["first.weight"], 3 * before["first.weight"])
    model.first.weight.register_hook(lambda gradient: gradient * 2)
    assert_same(gradients(forward, params, x)["first.weight"], 6 * before["first.weight"])
    handle.remove()
    assert_same(gradients(forward, params, x)["first.weight"], 2 * before["first.weight"])
    assert forward.revision == 3


class _Frozen:
    """Slots that only its own methods may set, one of them unset at first, and a `__getattr__` that fails."""

    __slots__ = ("count", "late")
    count: int
    late: int

    def __init__(self) -> None:
        object.__setattr__(self, "count", 1)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(f"{name} is frozen")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else KeyError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        memo[id(self)] = copy = _Frozen()
        return copy


class _Counting(nn.Module):
    """It writes to itself wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.frozen = _Frozen()
        self.loose: list[Any] = [_Counter()]
        self.table = np.ones(2)
        self.seen: dict[Any, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        count = self.frozen.count
        object.__setattr__(self.frozen, "count", count + 1)
        object.__setattr__(self.frozen, "late", 1)
        self.table += 1
        self.seen[len(x)] = self.seen.get(len(x), 0) + 1
        return self.loose[0](self.layer(x)) * count * torch.as_tensor(self.table) * self.seen[len(x)]


class _Counter(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_what_the_model_itself_writes_is_undone_after_each_member(strategy: str) -> None:
    model, x = _Counting().double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, strategy=strategy)
    pairs = zip(params.stacked["layer.weight"], params.stacked["layer.bias"], strict=True)
    want = torch.stack([F.linear(x, weight, bias) * 2 for weight, bias in pairs])
    for _ in range(3):
        assert_same(forward(params, x), want)
        model(x)
        model(x[:2])
    assert forward.revision == 0
    assert model.frozen.count == 7 and model.seen == {5: 3, 2: 3} and model.loose[0].calls == 6


def test_nan_is_a_change() -> None:
    model, x = _Net().double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)
    assert forward(params, x).isfinite().all()
    model.scale = float("nan")
    assert all(forward(params, x).isnan().all() for _ in range(2))
    assert forward.revision == 1


def test_a_tensor_where_none_was_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.mask: Tensor | None = None
            self.masks: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (1 if self.mask is None else self.mask) * len([1, *self.masks])

    model, x = Net().double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    model.mask = torch.tensor([0.0, 1.0], dtype=torch.float64)
    model.masks.append(model.mask)
    for _ in range(2):
        forward(params, x)
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("Net: mask, masks is a tensor now and was none")
    assert_same(fe.make_forward(model)(params, x), loop(model, params, x))


def test_what_changes_again_and_again_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, x = _Net().double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    for index in range(4):
        model.scale = index + 2.0
        forward(params, x)
    assert forward.revision == 4
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "scale has changed" in told and "2nd time" in told


@pytest.mark.compile
@pytest.mark.parametrize("name", ["a number", "in a dict", "a submodule"])
def test_a_compiled_step_is_compiled_anew(name: str) -> None:
    model, x, y = _Net().double(), randn(5, 3), randn(5, 2)
    params = fe.ensemble_params(model, 2)
    forward = fe.make_forward(model)
    step = fe.make_train_step(
        forward, F.mse_loss, torch.optim.SGD(tree_leaves(params), 0.1), compile={"backend": "eager"}
    )
    step.gradients(params, x, y)
    CHANGES[name](model)
    own = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params), 0.1), compile=False)
    for _ in range(2):
        assert_same(step.gradients(params, x, y), own.gradients(params, x, y))
    assert step.compiled_by != "eager"


@pytest.mark.compile
def test_a_compiled_step_is_not_compiled_anew_for_what_the_model_itself_writes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x, y = _Net().double(), randn(5, 3), randn(5, 2)
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params), 0.1)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile={"backend": "eager"})
    for _ in range(3):
        step.gradients(params, x, y)
        model(x)
    assert step.forward.revision == 0
    model.late_mask = torch.ones(2)
    step.gradients(params, x, y)
    assert [record.message for record in caplog.records if "late_mask is a tensor now" in record.message]


def test_a_compiled_forward_says_that_a_number_has_changed() -> None:
    act = nn.ELU(alpha=1.0)
    model, x = nn.Sequential(nn.Linear(3, 2), act).double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    assert_same(compiled(params, x), forward(params, x))
    act.alpha = 3.0
    with pytest.raises(Exception, match=r"alpha is 3\.0 now and was 1\.0|RuntimeError"):
        compiled(params, x)
    want = forward(params, x)
    assert_same(compiled(params, x), want)
    assert_same(want, loop(model, params, x))
