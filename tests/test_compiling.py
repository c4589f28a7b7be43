"""What torch.compile is asked for on a CPU, and what is done where that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.config
import torch.nn.functional as F
from oracle import assert_same
from torch import nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe

TRIAL = "cpp.vec_isa_ok"


def _options_of_a_step(
    monkeypatch: pytest.MonkeyPatch, compile: Any = True, fails: Callable[[Mapping[str, Any]], bool] = lambda _: False
) -> list[dict[str, Any]]:
    """Those that torch.compile gets, call by call, for one step that is as it would be without compiling."""
    asked: list[dict[str, Any]] = []

    def fake(function: Any, **options: Any) -> Any:
        given = {name: value for name, value in options["options"].items() if name != "guard_filter_fn"}
        asked.append(given)

        def call(*arguments: Any) -> Any:
            if fails(given):
                raise torch._dynamo.exc.BackendCompilerFailed(fake, RuntimeError("unknown option -mavx512f"), None)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", fake)
    model = nn.Linear(3, 2)
    params, x, y = fe.ensemble_params(model, 2), torch.ones(5, 3), torch.ones(5, 2)
    steps = [
        fe.make_train_step(fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params)), compile=each)
        for each in (compile, False)
    ]
    got, want = (step.gradients(params, x, y) for step in steps)
    assert_same(got, want)
    return asked


@pytest.fixture
def _on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.usefixtures("_on_x86")
def test_avx_is_not_tried_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _options_of_a_step(monkeypatch) == [{TRIAL: True}]
    assert _options_of_a_step(monkeypatch, {"options": {TRIAL: None}}) == [{TRIAL: None}]
    assert _options_of_a_step(monkeypatch, {"backend": "eager"}) == [{}]
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):  # as the environment may have it
        assert _options_of_a_step(monkeypatch) == [{}]
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert _options_of_a_step(monkeypatch) == [{}]


@pytest.mark.usefixtures("_on_x86")
def test_where_it_fails_it_is_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fails = lambda options: bool(options.get(TRIAL))  # noqa: E731
    assert _options_of_a_step(monkeypatch, fails=fails) == [{TRIAL: True}, {}]
    assert not caplog.records
    assert _options_of_a_step(monkeypatch, {"options": {TRIAL: True}}, fails) == [{TRIAL: True}]
    assert "goes on without it: unknown option -mavx512f" in caplog.text
    caplog.clear()
    assert _options_of_a_step(monkeypatch, fails=lambda options: True) == [{TRIAL: True}, {}]
    assert "goes on without it: unknown option -mavx512f" in caplog.text
