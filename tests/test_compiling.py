"""What torch.compile is asked for on a CPU, and what is done where that fails."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.config
import torch.nn.functional as F
from oracle import assert_same, compiler
from torch import nn
from torch._inductor.exc import CppCompileError
from torch.utils._pytree import tree_leaves

import functorch_ens as fe

TRIAL = "cpp.vec_isa_ok"
REFUSED = CppCompileError(["g++"], "unknown option -mavx512f")


def _options_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
    compile: Any = True,
    fails: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    error: Exception = REFUSED,
) -> list[dict[str, Any]]:
    """Those that torch.compile gets, call by call, for one step that is as it would be without compiling."""
    asked: list[dict[str, Any]] = []

    def fake(function: Any, **options: Any) -> Any:
        given = {name: value for name, value in options["options"].items() if name != "guard_filter_fn"}
        asked.append(given)

        def call(*arguments: Any) -> Any:
            if fails(given):
                raise torch._dynamo.exc.BackendCompilerFailed(fake, error, None)
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
    assert "goes on without it: C++ compile error" in caplog.text
    assert _options_of_a_step(monkeypatch, {}, fails, RuntimeError("another")) == [{TRIAL: True}]
    caplog.clear()
    assert _options_of_a_step(monkeypatch, fails=lambda options: True) == [{TRIAL: True}, {}]
    assert "goes on without it: C++ compile error" in caplog.text


@pytest.mark.skipif(compiler() != "inductor" or platform.machine() != "x86_64", reason="it is about g++ and AVX")
def test_a_compiler_without_avx_is_found_out(tmp_path: Path) -> None:
    """The step is compiled all the same, and so is what the user compiles in that process."""
    wrapper = tmp_path / "old-g++"
    wrapper.write_text(
        "#!/bin/sh\n"
        'for each in "$@"; do case "$each" in -mavx*|-mamx*) echo "unknown option $each" >&2; exit 1;; esac; done\n'
        'exec g++ "$@"\n'
    )
    wrapper.chmod(0o755)
    script = """
import logging, torch, functorch_ens as fe
from torch.utils._pytree import tree_leaves
logging.getLogger("functorch_ens").setLevel(logging.WARNING)
model = torch.nn.Linear(3, 2)
params = fe.ensemble_params(model, 2)
loss = torch.nn.functional.mse_loss
step = fe.make_train_step(fe.make_forward(model), loss, torch.optim.SGD(tree_leaves(params)))
step(params, torch.ones(5, 3), torch.ones(5, 2))
print(torch.compile(lambda x: (x + 1).relu() * 3)(torch.ones(99)).sum().item())
"""
    environment = {**os.environ, "CXX": str(wrapper), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TORCHINDUCTOR_VEC_ISA_OK", None)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["594.0"] and "goes on without" not in answer.stderr
