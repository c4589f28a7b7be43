"""Resuming: a checkpoint that is damaged, edited or of another run is refused by name, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from oracle import assert_same
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import functorch_ens as fe
from functorch_ens.training.resume import _forms

E = 3


class _Run:
    """A run of a model with two weights of one shape, always made from the same seed."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        *,
        reverse: bool = False,
        by_member: bool = False,
        step_size: int = 2,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.params = fe.ensemble_params(self.model, E)
        self.buffers = fe.ensemble_buffers(self.model, E)
        settings = {"lr": 0.1, **settings}
        if by_member:
            settings["lr"] = [settings["lr"]] * E
        groups = fe.param_groups(self.params, **settings)
        for group in groups:
            group["params"] = group["params"][::-1] if reverse else group["params"]
        self.optimizer = optimizer(groups)
        self.step = fe.make_train_step(fe.make_forward(self.model), F.mse_loss, self.optimizer, compile=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size)
        self.generator = torch.Generator().manual_seed(3)
        self.batch = (randn(8, 3).float(), randn(8, 3).float())

    def given(self) -> dict[str, Any]:
        return {
            "buffers": self.buffers,
            "generator": self.generator,
            "scheduler": self.scheduler,
            "evaluate": lambda *_: {"value": torch.arange(E)},
            "monitor": "value",
            "patience": 9,
        }

    def fit(self, file: Path | None, epochs: int, **options: Any) -> fe.Fitted:
        given = {**self.given(), **options}
        return fe.fit(self.step, self.params, [self.batch], epochs=epochs, checkpoint=file, **given)

    def all(self) -> Any:
        """Everything that a resume may change."""
        state = {
            "params": tuple(self.params),
            "buffers": self.buffers,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": (self.generator.get_state(), torch.get_rng_state()),
            "stopped": sorted(self.step.stopped),
        }
        return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, copy.copy(state))


def _edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replace what is at `path`, keys with slashes between them, by `value` or by a function of it."""

    def edit(state: dict[str, Any]) -> None:
        *places, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        found: Any = state
        for place in places:
            found = getattr(found, str(place)) if isinstance(found, fe.EnsembleParams) else found[place]
        found[last] = value(found[last]) if callable(value) else value

    return edit


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.detach().mT.contiguous().mT


_DAMAGES: list[tuple[str, Any, str]] = [
    ("epoch", "two", "epoch: expected an int >= 1, got 'two'"),
    ("epoch", 5, "history: expected a list of 5 epochs"),
    ("history", [], "history: expected a list of 2 epochs"),
    ("history/0/loss", 3, "history: expected tensors by name"),
    ("history/1/loss", lambda t: t[:1], r"history: loss: expected a tensor \[3\], got torch.float32 \[1\]"),
    ("history/1/value", lambda t: t[:1], "history: expected the same names and shapes"),
    ("stopped", {7: "late"}, "stopped: expected reasons by members, from 0 to 2"),
    ("stopped", [1], "stopped: expected reasons by members"),
    ("failed", [1], "failed: expected a list of members that have stopped"),
    ("params", 3, "params: expected EnsembleParams, got 3"),
    (
        "params/stacked/0.weight",
        lambda t: t[:1],
        r"params.stacked: 0.weight: .* \[3, 3, 3\], got torch.float32 \[1, 3, 3\]",
    ),
    ("params/stacked/0.weight", lambda t: t.double(), "0.weight: expected torch.float32 .* got torch.float64"),
    ("params/stacked/0.weight", _transposed, r"0.weight: expected .* got torch.float32 \[3, 3, 3\] of strides"),
    ("params/stacked/0.weight", 1, "0.weight: expected .* got 1"),
    ("params/stacked/more", torch.ones(3), "params.stacked: expected tensors by the names"),
    ("buffers/1.running_mean", lambda t: t[:1], r"buffers: 1.running_mean: .* \[3, 3\], got torch.float32 \[1, 3\]"),
    ("buffers/1.running_mean", lambda t: t.long(), "buffers: 1.running_mean: .* got torch.int64"),
    ("buffers", None, "buffers: expected dict, got None"),
    ("kinds", 3, "kinds: expected a dict, got 3"),
    ("optimizer/state", 3, "optimizer: state: expected a dict by numbers of tensors, from 0 to 5, got 3"),
    ("optimizer/state/1/exp_avg", lambda t: t.flatten(), r"exp_avg.*: expected torch.float32 \[3, 3\], got .* \[9\]"),
    (
        "optimizer/state/0/exp_avg",
        lambda t: t[:2],
        r"exp_avg.*: expected .* \[3, 3, 3\], got torch.float32 \[2, 3, 3\]",
    ),
    ("optimizer/state/0/exp_avg", lambda t: t.double(), "exp_avg.*: expected torch.float32 .*, got torch.float64"),
    ("optimizer/state/0/exp_avg", _transposed, "exp_avg.*: expected .*, got .* of strides"),
    ("optimizer/state/0/exp_avg", 3, "exp_avg.*: expected torch.float32 .*, got "),
    ("optimizer/state/0/step", torch.ones(2), r"step.*: expected torch.float32 \[\], got torch.float32 \[2\]"),
    ("optimizer/state/0/step", 2, r"step.*: expected torch.float32 \[\], got "),
    ("optimizer/state/0/more", torch.ones(2), "more.*: expected nothing, got "),
    ("optimizer/state/0", {}, "exp_avg.*: expected torch.float32 .*, got (None|nothing)"),
    ("optimizer/state/9", {"step": 3}, "optimizer: state: expected a dict by numbers of tensors, from 0 to 5"),
    ("optimizer/param_groups", [], "optimizer: param_groups: expected the groups of the optimizer"),
    ("optimizer/param_groups/0/params", [1, 0, 2, 3, 4, 5], "optimizer: param_groups: expected the groups"),
    ("optimizer/param_groups/0/lr", "high", r"optimizer.param_groups\[0\].lr: expected a number, got 'high'"),
    ("scheduler", {}, "scheduler.step_size: expected what it began with, got None"),
    ("scheduler/last_epoch", "two", "scheduler.last_epoch: expected a number, got 'two'"),
    ("generator", lambda t: t[:-8], "generator: expected the state of a generator of cpu, got torch.uint8"),
    ("generator", lambda t: t.float(), "generator: expected .*, got torch.float32"),
    ("generator", 3, "generator: expected .*, got 3"),
    ("random", lambda pair: (pair[0][:9], pair[1]), r"random: expected .*, got torch.uint8 \[9\]"),
    ("random", 3, "random: expected states of torch's generators, got 3"),
    ("patience/best", lambda t: t[:1], r"patience: best: expected torch.float64 \[3\], got torch.float64 \[1\]"),
    ("patience/waited", None, r"patience: waited: expected torch.int64 \[3\], got None"),
    ("patience/kept/stacked/0.bias", lambda t: t[:1], r"patience: kept.stacked: 0.bias: expected .* \[3, 3\], got"),
    ("patience/buffers", {}, "patience: buffers: expected tensors by the names"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run after two epochs."""
    file = tmp_path_factory.mktemp("written") / "run.pt"
    _Run().fit(file, 2)
    return file


@pytest.mark.parametrize(
    ("path", "value", "message"), _DAMAGES, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("forms_too", [False, True])
def test_damage_is_named_and_changes_nothing(
    tmp_path: Path, written: Path, path: str, value: Any, message: str, forms_too: bool
) -> None:
    """With `forms_too`, what the file says of the forms in it is edited as well."""
    state = fe.load_checkpoint(written)
    _edit(path, value)(state)
    if forms_too and isinstance(state["optimizer"].get("state"), dict):
        state["forms"] = _forms(state["optimizer"]["state"])
    fe.save_checkpoint(state, tmp_path / "run.pt")
    run = _Run()
    before = run.all()
    with pytest.raises(ValueError, match=f"checkpoint: '.*run.pt' is damaged: .*{message}"):
        run.fit(tmp_path / "run.pt", 3)
    assert_same(run.all(), before, tolerance=0)


_OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"lr": 0.2}, r"optimizer.param_groups\[0\].(initial_)?lr is 0.1 there, and 0.2 here"),
    ({"betas": (0.8, 0.999)}, r"betas is \(0.9, 0.999\) there, and \(0.8, 0.999\) here"),
    ({"weight_decay": 0.1}, "weight_decay is 0.0 there, and 0.1 here|weight_decay is 0 there, and 0.1 here"),
    ({"amsgrad": True}, "amsgrad is False there, and True here"),
    ({"step_size": 3}, "scheduler.step_size is 2 there, and 3 here"),
    ({"reverse": True}, "tensor 0 of group 0 of the optimizer is 0.weight there, and 2.bias here"),
    ({"by_member": True}, r"tensor 0 of group 0 of the optimizer is 0.weight there, and 0.weight\[0\] here"),
    ({"optimizer": torch.optim.SGD}, "optimizer is Adam there, and SGD here"),
]


@pytest.mark.parametrize(
    ("options", "message"), _OTHERS, ids=lambda value: "" if isinstance(value, str) else str(value)[:30]
)
def test_another_run_is_named_and_changes_nothing(written: Path, options: dict[str, Any], message: str) -> None:
    run = _Run(**options)
    before = run.all()
    with pytest.raises(ValueError, match=f"is of another run: .*({message})"):
        run.fit(written, 3)
    assert_same(run.all(), before, tolerance=0)


_OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.Adam, {"by_member": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.Adam, {"lr": 0.1, "foreach": False}),
    *(
        (getattr(torch.optim, name), {})
        for name in ("ASGD", "Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "Rprop")
    ),
    (torch.optim.Adafactor, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "by_member": True}),
]


class _Signs(torch.optim.Optimizer):
    """An optimiser of a user's own, with state of its own form."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for tensor in group["params"]:
                state = self.state[tensor]
                state["flat"] = state.get("flat", 0) * torch.ones(()) + tensor.grad.flatten()
                tensor -= group["lr"] * state["flat"].sign().view_as(tensor)


@pytest.mark.parametrize(("optimizer", "options"), [*_OPTIMIZERS, (_Signs, {})])
def test_every_optimizer_resumes_also_with_the_same_objects(tmp_path: Path, optimizer: Any, options: Any) -> None:
    file = tmp_path / "run.pt"
    want = _Run(optimizer, **options).fit(None, 5).params
    first = _Run(optimizer, **options)
    first.fit(file, 2)
    torch.manual_seed(9)
    again = file.with_name("again.pt")
    again.write_bytes(file.read_bytes())
    assert_same(tuple(_Run(optimizer, **options).fit(again, 5).params), tuple(want), tolerance=0)
    assert_same(tuple(first.fit(file, 5).params), tuple(want), tolerance=0)


_SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, cooldown=1),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "cycle": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2, T_mult=2),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("kind", _SCHEDULERS)
def test_every_scheduler_resumes_also_with_the_same_objects(tmp_path: Path, kind: str) -> None:
    """Also after an interrupt in the middle of an epoch, when its counts are ahead of the file."""

    def made() -> _Run:
        run = _Run()
        run.optimizer.param_groups[0].pop("initial_lr")  # that of the scheduler which each run has
        run.scheduler = _SCHEDULERS[kind](run.optimizer)
        return run

    options: dict[str, Any] = {"schedule_by": "epoch" if kind == "plateau" else "step"}
    want = tuple(made().fit(None, 5, **options).params)
    first, file = made(), tmp_path / "run.pt"

    def batches(_: Any) -> Any:
        yield first.batch
        raise KeyboardInterrupt

    first.fit(file, 2, **options)
    again = file.with_name("again.pt")
    again.write_bytes(file.read_bytes())
    assert_same(tuple(made().fit(again, 5, **options).params), want, tolerance=0)
    with pytest.raises(KeyboardInterrupt):
        fe.fit(first.step, first.params, batches, epochs=3, checkpoint=file, **{**first.given(), **options})
    assert_same(tuple(first.fit(file, 5, **options).params), want, tolerance=0)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, _Signs])
def test_an_error_while_it_is_applied_puts_everything_back(
    written: Path, tmp_path: Path, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.pt"
    _Run(optimizer).fit(file, 2)
    run = _Run(optimizer)

    def fails(state: Any) -> None:
        raise RuntimeError("of the scheduler")

    load = run.scheduler.load_state_dict
    loads = lambda state: load(state) if state["last_epoch"] == 0 else fails(state)  # noqa: E731
    monkeypatch.setattr(run.scheduler, "load_state_dict", loads)
    before = run.all()
    with pytest.raises(RuntimeError, match="of the scheduler"):
        run.fit(file, 3)
    assert_same(run.all(), before, tolerance=0)
