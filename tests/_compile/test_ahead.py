"""The options that torch.compile gets on a CPU, and what happens where a compilation fails."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
from functorch_ens._compile import ahead as compiling
from functorch_ens._compile.passes import Passes

PASS = "post_grad_custom_pre_pass"
TRIAL = "cpp.vec_isa_ok"
REFUSED = CppCompileError(["g++"], "unknown option -mavx512f")


def _options_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
    compile: Any = True,
    fails: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    error: Exception = REFUSED,
    about: str = "cpp.",
    begin: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """The options `about` something that torch.compile gets, call by call; the step equals one that is not compiled."""
    asked: list[dict[str, Any]] = []

    def fake(function: Any, **options: Any) -> Any:
        given = {name: value for name, value in (options.get("options") or {}).items() if name.startswith(about)}
        asked.append(given)

        def call(*arguments: Any) -> Any:
            if fails(given):
                raise torch._dynamo.exc.BackendCompilerFailed(fake, error, None)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(compiling, "_begin_ahead", begin)
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


def test_a_pass_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Passes()
    options_of = partial(_options_of_a_step, monkeypatch, about=PASS)
    assert [isinstance(options[PASS], Passes) for options in options_of()] == [True]
    assert [options[PASS] is mine for options in options_of({"options": {PASS: mine}})] == [True]
    assert options_of({"backend": "eager"}) == [{}]
    with torch._inductor.config.patch({PASS: mine}):
        assert options_of() == [{}]


@pytest.mark.usefixtures("_on_x86")
def test_where_it_fails_it_is_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fails = lambda options: bool(options.get(TRIAL))  # noqa: E731
    assert _options_of_a_step(monkeypatch, fails=fails) == [{TRIAL: True}, {}]
    assert not caplog.records
    # The user's own option is tried again by plain torch.compile, whole and in parts, which have it too.
    assert _options_of_a_step(monkeypatch, {"options": {TRIAL: True}}, fails) == 3 * [{TRIAL: True}]
    assert "goes on without it: C++ compile error" in caplog.text
    caplog.clear()
    assert _options_of_a_step(monkeypatch, {}, fails, RuntimeError("another")) == [{TRIAL: True}, {}]
    assert [record.message for record in caplog.records] == [
        "torch.compile works only without what functorch_ens adds to it: another"
    ]
    caplog.clear()
    assert _options_of_a_step(monkeypatch, fails=lambda options: True) == [{TRIAL: True}, {}, {}, {}]
    assert "goes on without it: C++ compile error" in caplog.text


@pytest.mark.parametrize("static_works", [True, False])
def test_sizes_that_cannot_be_symbols_are_compiled_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, static_works: bool
) -> None:
    asked: list[Any] = []

    def fake(function: Any, **options: Any) -> Any:
        asked.append(options.get("dynamic"))
        seen: set[int] = set()

        def call(E: int, work: Any, prepared: bool) -> Any:
            rows, inputs = work.batch[0].shape
            seen.add(rows)
            works = len(seen) == 1 if options.get("dynamic") is None else static_works
            if not works or inputs != 3:
                raise torch._dynamo.exc.TorchRuntimeError("a symbol")
            return function(E, work, prepared)

        return call

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(compiling, "_begin_ahead", lambda: None)
    model = nn.Linear(3, 2)
    params = fe.ensemble_params(model, 2)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params)))
    for B in (5, 5, 4, 3, 5, 4):
        step.gradients(params, torch.ones(B, 3), torch.ones(B, 2))
    assert asked == ([None, False] if static_works else [None, False, False])  # the last by plain torch.compile
    assert step.compiled_by == ("functorch_ens" if static_works else "eager")
    assert len(caplog.records) == (0 if static_works else 1)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # the model's own, in its own words
        step.gradients(params, torch.ones(5, 4), torch.ones(5, 2))


def test_a_step_that_is_not_compiled_leaves_a_compilers_errors_alone() -> None:
    def loss(output: Any, y: Any) -> Any:
        raise torch._dynamo.exc.TorchRuntimeError("of the user's own compiled function")

    params = fe.ensemble_params(nn.Linear(3, 2), 2)
    optimizer = torch.optim.SGD(tree_leaves(params))
    step = fe.make_train_step(fe.make_forward(nn.Linear(3, 2)), loss, optimizer, compile=False)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="own compiled"):
        step.gradients(params, torch.ones(5, 3), torch.ones(5, 2))


@pytest.mark.parametrize(
    "missing", ["functorch_ens._compile.cpp_files._install", "functorch_ens._compile.passes.Passes"]
)
def test_a_torch_that_has_things_otherwise_still_compiles(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def changed() -> Any:
        raise AttributeError("no attribute 'cpp_pybinding'")

    monkeypatch.setattr(missing, changed)
    options = _options_of_a_step(monkeypatch, about=PASS)
    assert [bool(each) for each in options] == ["cpp_files" in missing]


def test_what_fails_about_an_extra_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "functorch_ens")
    monkeypatch.delattr("torch._inductor.cpu_vec_isa.supported_vec_isa_list")
    assert _options_of_a_step(monkeypatch) == [{}]
    assert "compiling without a first compilation without trials" in caplog.text or platform.machine() != "x86_64"


def test_the_rung_in_use_can_be_read() -> None:
    model = nn.Linear(3, 2)
    params, x, y = fe.ensemble_params(model, 2), torch.ones(5, 3), torch.ones(5, 2)
    make = partial(fe.make_train_step, fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params)))
    assert make(compile=False).compiled_by == "eager"
    step = make(compile={"backend": "eager"})
    assert step.compiled_by is None
    step(params, x, y)
    assert step.compiled_by == "functorch_ens"
    assert (step.strategy, step.reason) == (step.forward.strategy, step.forward.reason)


def test_plain_torch_compile_is_the_second_rung(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(*_: Any, **__: Any) -> Any:
        raise TypeError("an extra that this torch has otherwise")

    monkeypatch.setattr("functorch_ens._compile.compile_with_extras", changed)
    model = nn.Linear(3, 2)
    params = fe.ensemble_params(model, 2)
    make = partial(fe.make_train_step, fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params)))
    step, plain = make(compile={"backend": "eager", "fullgraph": True}), make(compile=False)
    for B in (5, 4, 3):
        batch = torch.randn(B, 3), torch.randn(B, 2)
        assert_same(step.gradients(params, *batch), plain.gradients(params, *batch))
    assert step.compiled_by == "torch.compile"
    said = [record.message for record in caplog.records if record.name.startswith("functorch_ens")]
    assert said == [
        "torch.compile works only without what functorch_ens adds to it: an extra that this torch has otherwise"
    ]


def test_a_step_for_batches_of_many_sizes() -> None:
    """Also with torch 2.11, whose compiler fails at symbols in this loss."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    params = fe.batchensemble_params(model, 3)
    step, plain = (
        fe.make_train_step(fe.make_forward(model), F.cross_entropy, torch.optim.SGD(tree_leaves(params)), compile=each)
        for each in ({"backend": compiler()}, False)
    )
    for B in (9, 10, 7):
        batch = torch.randn(B, 6), torch.randint(4, (B,))
        assert_same(step.gradients(params, *batch), plain.gradients(params, *batch))
    assert step.compiled_by == "functorch_ens"


def _run(script: str, cache: Path, **environment: str) -> list[str]:
    """The words that a new process prints, in which nothing has been compiled or tried."""
    given = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment}
    given.pop("TORCHINDUCTOR_VEC_ISA_OK", None)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=given)
    assert answer.returncode == 0, answer.stderr
    assert "goes on without" not in answer.stderr
    return answer.stdout.split()


with_avx = pytest.mark.skipif(
    compiler() != "inductor" or platform.machine() != "x86_64", reason="it is about g++ and AVX"
)


@with_avx
def test_torch_finds_what_was_tried_ahead(tmp_path: Path) -> None:
    """It runs the compiler for none of its trials, and its own answers are not touched before."""
    script = """
import torch, torch._inductor.cpp_builder as builder, torch._inductor.cpu_vec_isa as isa
from functorch_ens._compile.ahead import _try_others
runs, run = [], builder._run_compile_cmd
builder._run_compile_cmd = lambda *arguments: runs.append(arguments) or run(*arguments)
before = [dict(vars(each)) for each in isa.supported_vec_isa_list]
_try_others()
print(isa.valid_vec_isa_list.cache_info().currsize, before == [vars(each) for each in isa.supported_vec_isa_list])
ahead = len(runs)
with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
    isa.pick_vec_isa()
print(ahead > 0 or "avx512_vnni" not in isa.x86_isa_checker(), len(runs) - ahead)
"""
    assert _run(script, tmp_path) == ["0", "True", "True", "0"]


def test_trials_ahead_that_fail_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._inductor.cpu_vec_isa.supported_vec_isa_list")
    compiling._ahead()

    def no_more(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(compiling, "Thread", no_more)
    compiling._begin_ahead.__wrapped__()


@pytest.mark.usefixtures("_on_x86")
def test_what_is_tried_ahead_is_what_the_compilation_will_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inductor's settings of the caller, and not where options decide about the compiler."""
    seen = []
    for work in ("_try_others", "_make_kernel"):
        monkeypatch.setattr(compiling, work, lambda: seen.append(torch._inductor.config.cpp.simdlen))
    begin = compiling._begin_ahead.__wrapped__
    monkeypatch.setattr(compiling, "Thread", lambda target, args: SimpleNamespace(start=lambda: target(*args)))
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        begin()
    assert seen == [256, 256]
    begun: list[bool] = []
    for options in (True, {}, {"options": {"cpp.simdlen": 256}}, {"options": {TRIAL: False}}, {"backend": "eager"}):
        count = len(begun)
        _options_of_a_step(monkeypatch, options, begin=lambda: begun.append(True))
        assert (len(begun) > count) == (options in (True, {}))


@with_avx
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
    assert _run(script, tmp_path / "cache", CXX=str(wrapper)) == ["594.0"]
