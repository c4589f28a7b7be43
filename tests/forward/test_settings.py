"""What the user changes on a model after its forward was made counts in the next call, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same, loop
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe


class _Net(nn.Module):
    """It reads numbers from all kinds of places."""

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

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.act(self.first(x))) * self.scale + self.settings["shift"]
        self.kept = h
        self.history.append(h.detach())
        return self.last(h) ** self.options.power * self.gains[1] * self.mask * getattr(self, "late", 1.0)


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
    assert forward.revision == 1
    if name != "Dropout.p":  # predict is in eval mode
        assert_same(fe.predict(forward, params, x), want)


def test_caches_are_no_changes() -> None:
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
