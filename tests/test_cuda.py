"""The public contract on a GPU, against the same in float64 on the CPU. Without a GPU the tests on one are deselected.

They run on the CPU in float32 too, where they test themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import compiler
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import functorch_ens as fe

E = 3
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def _with_norm() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (_dense, (5,)),
    "cnn": (_with_norm, (2, 4, 4)),
}
KINDS: dict[str, Callable[[nn.Module], fe.EnsembleParams]] = {
    "classic": lambda model: fe.ensemble_params(model, E, generator=torch.Generator().manual_seed(1)),
    "BatchEnsemble": lambda model: fe.batchensemble_params(model, E, generator=torch.Generator().manual_seed(1)),
    "LoRA": lambda model: fe.lora_params(model, E, rank=2, generator=torch.Generator().manual_seed(1)),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


class Case:
    """An ensemble and its data on `device` in float32, and the same on the CPU in float64."""

    def __init__(self, name: str, kind: str, device: torch.device) -> None:
        make, shape = MODELS[name]
        self.model = make()
        self.params = KINDS[kind](self.model)
        if kind == "LoRA":
            for tensor in self.params.stacked.values():
                tensor.data.normal_(std=0.3)
        self.buffers = fe.ensemble_buffers(self.model, E)
        self.x, self.y = torch.randn(16, *shape), torch.randint(3, (16,))
        self.device = device

    def on(
        self, device: Any, dtype: torch.dtype
    ) -> tuple[nn.Module, fe.EnsembleParams, dict[str, Tensor], Tensor, Tensor]:
        """The model, the parameters (leaves), the buffers, x and y."""

        def moved(value: Tensor) -> Tensor:
            value = value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
            return value

        model = copy.deepcopy(self.model).to(device, dtype)
        params = fe.EnsembleParams(
            *({name: moved(x).requires_grad_(x.requires_grad) for name, x in part.items()} for part in self.params)
        )
        buffers = {name: moved(buffer) for name, buffer in self.buffers.items()}
        return model, params, buffers, moved(self.x), moved(self.y)

    def both(self, function: Callable[..., Any]) -> None:
        """What `function` returns on the device must be what it returns in float64 on the CPU."""
        mine = function(*self.on(self.device, torch.float32))
        theirs = function(*self.on("cpu", torch.float64))
        _agree(mine, theirs, self.device)


def _agree(mine: Any, theirs: Any, device: torch.device) -> None:
    got, want = (pytree.tree_flatten(value) for value in (mine, theirs))
    assert got[1] == want[1]
    for a, b in zip(got[0], want[0], strict=True):
        assert a.device.type == device.type
        torch.testing.assert_close(a.detach().cpu().double(), b.detach().double(), rtol=2e-4, atol=2e-5)


CASES = [(name, kind) for name in MODELS for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_cpu(kind: str, device: torch.device) -> None:
    model = _dense()
    theirs = KINDS[kind](model)
    mine = KINDS[kind](copy.deepcopy(model).to(device))
    for a, b in zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True):
        assert a.device.type == device.type and a.is_leaf
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_forward_and_buffers(name: str, kind: str, strategy: str, device: torch.device) -> None:
    case = Case(name, kind, device)

    def run(model: nn.Module, params: fe.EnsembleParams, buffers: Any, x: Tensor, y: Tensor) -> Any:
        return fe.make_forward(model, strategy=strategy)(params, x, buffers=buffers)

    case.both(run)
    _, params, _, x, _ = case.on("cpu", torch.float64)
    outputs, new = run(*case.on(device, torch.float32))
    for i in range(E):  # and an ordinary network
        member = copy.deepcopy(case.model).double()
        member.load_state_dict(fe.member_params(member, params, i), strict=False)
        _agree(outputs[i], member(x).to(device), device)
        _agree({n: new[n][i] for n in new}, {n: b.to(device) for n, b in member.named_buffers()}, device)


def _steps(model: nn.Module, params: fe.EnsembleParams, buffers: Any, x: Tensor, y: Tensor, **options: Any) -> Any:
    """Three steps: the parameters, the buffers and the losses."""
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.1))
    step, losses = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, **options), []
    for _ in range(3):
        loss, buffers = step(params, x, y, buffers=buffers)
        losses.append(loss.clone())
    return params, buffers, losses


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_train_steps_eager(name: str, kind: str, device: torch.device) -> None:
    Case(name, kind, device).both(partial(_steps, compile=False))


@pytest.mark.compile
@pytest.mark.parametrize(
    ("device", "mode"),
    [
        ("cpu", "default"),
        *(pytest.param("cuda", mode, marks=pytest.mark.cuda) for mode in ("default", "reduce-overhead")),
    ],
    indirect=["device"],
)
@pytest.mark.parametrize(("name", "kind"), [("dense", "classic"), ("dense", "LoRA"), ("cnn", "BatchEnsemble")])
def test_train_steps_compiled(name: str, kind: str, mode: str, device: torch.device) -> None:
    options = {"backend": compiler()} if device.type == "cpu" else {"mode": mode}
    case = Case(name, kind, device)
    mine = _steps(*case.on(device, torch.float32), compile=options)
    _agree(mine, _steps(*case.on("cpu", torch.float64), compile=False), device)


@pytest.mark.parametrize("fused", [False, True])
def test_adam(fused: bool, device: torch.device) -> None:
    case = Case("dense", "BatchEnsemble", device)

    def run(model: nn.Module, params: fe.EnsembleParams, buffers: Any, x: Tensor, y: Tensor) -> Any:
        optimizer = torch.optim.Adam(fe.param_groups(params, lr=0.01), fused=fused, eps=1e-3)
        step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
        return [step(params, x, y) for _ in range(3)], params

    case.both(run)


@pytest.mark.parametrize("name", MODELS)
def test_predict(name: str, device: torch.device) -> None:
    def run(model: nn.Module, params: fe.EnsembleParams, buffers: Any, x: Tensor, y: Tensor) -> Any:
        return fe.predict(fe.make_forward(model), params, x, buffers=buffers, batch_size=5)

    Case(name, "BatchEnsemble", device).both(run)


def test_fit_goes_on_from_a_checkpoint(device: torch.device, tmp_path: Path) -> None:
    case = Case("cnn", "BatchEnsemble", device)

    def run(model: nn.Module, params: fe.EnsembleParams, buffers: Any, x: Tensor, y: Tensor) -> Any:
        file = tmp_path / f"{x.dtype}.pt"
        for epochs in (1, 3):  # the second run starts from new parameters, and resumes
            params = fe.EnsembleParams(
                *({n: v.detach().clone().requires_grad_() for n, v in part.items()} for part in params)
            )
            optimizer = torch.optim.Adam(fe.param_groups(params, lr=0.01), eps=1e-3)
            prepare = lambda index: (x[index], y[index])  # noqa: E731
            step = fe.make_train_step(
                fe.make_forward(model), F.cross_entropy, optimizer, prepare=prepare, compile=False
            )
            source = torch.Generator().manual_seed(3)

            def batches(source: torch.Generator) -> Iterator[Tensor]:
                return iter(fe.index_batches(len(x), 6, generator=source, device=x.device))

            fitted = fe.fit(
                *(step, params, batches),
                epochs=epochs,
                buffers=buffers,
                generator=source,
                checkpoint=file,
                progress=False,
            )
        return fitted.params, fitted.buffers

    case.both(run)


def test_uncertainty(device: torch.device) -> None:
    logits, y = torch.randn(E, 20, 4, dtype=torch.float64), torch.randint(4, (20,))

    def run(logits: Tensor, y: Tensor) -> Any:
        found = fe.classification_uncertainty(logits)
        return [*found, fe.disagreement(logits), fe.pairwise_kl(logits), fe.metrics.nll(logits, y)]

    _agree(run(logits.to(device, torch.float32), y.to(device)), run(logits, y), device)
    T = fe.fit_temperature(logits.to(device, torch.float32), y.to(device))
    assert float(T) == pytest.approx(float(fe.fit_temperature(logits, y)), rel=1e-3)
