"""Training over epochs: equal to the steps one after another, also after an interruption, and member by member."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import functorch_ens as fe

N, E = 24, 3


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 4)).double()


pytestmark = pytest.mark.usefixtures("small_members_are_updated_in_parts")


class _Setting:
    """One run, made anew each time from the same seed."""

    def __init__(
        self, kind: str = "classic", compile: Any = False, lr: float = 0.05, chunk_size: int | None = None
    ) -> None:
        torch.manual_seed(1)
        self.x, self.y = randn(N, 3), torch.randint(4, (N,))
        self.model = _net().train()
        self.params = (fe.ensemble_params if kind == "classic" else fe.batchensemble_params)(self.model, E)
        self.buffers = fe.ensemble_buffers(self.model, E)
        self.optimizer = torch.optim.AdamW(tree_leaves(self.params), lr=lr)
        self.forward = fe.make_forward(self.model, chunk_size=chunk_size)
        self.step = fe.make_train_step(
            self.forward, F.cross_entropy, self.optimizer, prepare=lambda i: (self.x[i], self.y[i]), compile=compile
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 30)
        self.generator = torch.Generator().manual_seed(7)

    def batches(self, source: torch.Generator) -> list[Tensor]:
        return fe.index_batches(N, 8, generator=source)

    def evaluate(self, params: fe.EnsembleParams, buffers: Any) -> dict[str, Any]:
        logits = fe.predict(self.forward, params, self.x, buffers=buffers)
        return {"nll": fe.member_losses(F.cross_entropy, logits, self.y), "mean": logits.mean(), "one": 1}

    def fit(self, epochs: int, **options: Any) -> fe.Fitted:
        given: dict[str, Any] = {
            "buffers": self.buffers,
            "generator": self.generator,
            "scheduler": self.scheduler,
            "evaluate": self.evaluate,
        }
        return fe.fit(self.step, self.params, self.batches, epochs=epochs, **{**given, **options})


def test_epochs_are_the_steps_one_after_another() -> None:
    fitted = _Setting().fit(3)
    by_hand = _Setting()
    buffers, every = by_hand.buffers, []
    for _ in range(3):
        losses = []
        for index in by_hand.batches(by_hand.generator):
            loss, buffers = by_hand.step(by_hand.params, index, buffers=buffers)
            losses.append(loss)
        by_hand.scheduler.step()
        every.append(torch.stack(losses).mean(0))
        found = by_hand.evaluate(by_hand.params, buffers)
    assert_same(fitted.params, by_hand.params, tolerance=0)
    assert_same(fitted.buffers, buffers, tolerance=0)
    assert_same(fitted.history["loss"], torch.stack(every), tolerance=1e-12)
    assert_same(fitted.history["nll"][-1], found["nll"].detach(), tolerance=0)
    assert fitted.history["mean"].shape == (3,) and fitted.history["one"].tolist() == [1, 1, 1]
    assert fitted.stopped == {}


class _Interrupted(Exception):
    pass


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["classic", "BatchEnsemble"]),
    at=st.integers(0, 4 * 3 - 1),
    schedule_by=st.sampled_from(["epoch", "step"]),
    patience=st.sampled_from([None, 1, 2]),
    lr=st.sampled_from([0.05, 1.0]),
    chunk_size=st.sampled_from([None, 2]),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    at: int,
    schedule_by: str,
    patience: int | None,
    lr: float,
    chunk_size: int | None,
) -> None:
    """To the last bit: parameters, buffers, optimiser, schedule, order of the data, dropout, early stopping."""
    options: dict[str, Any] = {"schedule_by": schedule_by, "patience": patience, "monitor": "nll"}
    whole = _Setting(kind, lr=lr, chunk_size=chunk_size)
    want = whole.fit(4, **options)

    file = tmp_path_factory.mktemp("run") / "run.pt"
    first, count = _Setting(kind, lr=lr, chunk_size=chunk_size), 0
    parts = 2 if kind == "classic" and chunk_size else 1  # that a step is updated in

    step = first.optimizer.step

    @wraps(step)
    def interrupted() -> None:  # no hook: with hooks, no step is parted
        nonlocal count
        step()
        count += 1
        if count > at:
            raise _Interrupted

    first.optimizer.step = interrupted  # type: ignore[assignment, method-assign]
    try:
        first.fit(4, checkpoint=file, **options)
    except _Interrupted:
        assert file.exists() is (at >= 3 * parts)
    torch.manual_seed(99)  # whatever has been drawn since
    again = _Setting(kind, lr=lr, chunk_size=chunk_size)
    again.generator.manual_seed(12 if file.exists() else 7)
    got = again.fit(4, checkpoint=file, **options)
    assert_same(tuple(got.params), tuple(want.params), tolerance=0)
    assert_same(got.buffers, want.buffers, tolerance=0)
    assert_same(got.history, want.history, tolerance=0)
    assert got.stopped == want.stopped
    assert first.step.stopped == again.step.stopped == set()  # that was of the run, not of the step
    assert again.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    states = [run.optimizer.state[tensor] for run in (again, whole) for tensor in tree_leaves(run.params)]
    assert_same(states[: len(states) // 2], states[len(states) // 2 :], tolerance=0)


def test_a_run_that_is_over_goes_on_with_more_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run.pt"
    _Setting().fit(2, checkpoint=file)
    over = _Setting()
    with caplog.at_level(logging.INFO, logger="functorch_ens"):
        assert len(over.fit(2, checkpoint=file).history["loss"]) == 2
        assert "run.pt: goes on after epoch 2 of 2" in caplog.text
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        again = _Setting().fit(3, checkpoint=file)
    assert caplog.records[-1].levelname == "INFO"
    assert_same(tuple(again.params), tuple(_Setting().fit(3).params), tolerance=0)


def test_a_data_loader_draws_from_torchs_generator_which_is_kept_too(tmp_path: Path) -> None:
    def run(epochs: int, file: Path | None) -> fe.Fitted:
        own = _Setting()
        step = fe.make_train_step(own.forward, F.cross_entropy, own.optimizer, compile=False)
        loader = DataLoader(TensorDataset(own.x, own.y), batch_size=8, shuffle=True)
        torch.manual_seed(5)
        return fe.fit(step, own.params, loader, epochs=epochs, buffers=own.buffers, checkpoint=file)

    run(1, tmp_path / "run.pt")
    assert_same(tuple(run(3, tmp_path / "run.pt").params), tuple(run(3, None).params), tolerance=0)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_member_whose_loss_is_nan_is_named_and_spoils_no_other(
    chunk_size: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    want = _Setting(chunk_size=chunk_size).fit(2)
    broken = _Setting(chunk_size=chunk_size)
    with torch.no_grad():
        broken.params.stacked["4.bias"][1, 0] = float("nan")
    got = broken.fit(2)
    assert list(got.stopped) == [1] and "not finite in epoch 1, step 1" in got.stopped[1]
    assert "members [1]: its loss is not finite in epoch 1, step 1; they are trained no more" in caplog.text
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    for name, stack in got.params.stacked.items():
        assert_same(stack[[0, 2]].detach(), want.params.stacked[name][[0, 2]].detach(), tolerance=0)
    assert got.history["loss"].isfinite().tolist() == [[True, False, True]] * 2


def _linear(E: int = 3, chunk_size: int | None = None) -> tuple[fe.Forward, fe.EnsembleParams, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    return (
        fe.make_forward(model, member_inputs=True, chunk_size=chunk_size),
        fe.ensemble_params(model, E),
        randn(E, 8, 3),
        randn(E, 8, 2),
    )


@pytest.mark.parametrize(("chunk_size", "clip_by"), [(None, "ensemble"), (2, "ensemble"), (2, "member"), (1, "member")])
def test_a_member_with_a_bad_row_stays_as_it_was_before_that_step(chunk_size: int | None, clip_by: str) -> None:
    forward, params, x, y = _linear(chunk_size=chunk_size)
    batches = [(x.clone(), y) for _ in range(3)]
    batches[1][0][1, 4] = float("inf")
    one = _linear()[1]
    step, alone = (
        fe.make_train_step(
            forward,
            F.mse_loss,
            torch.optim.Adam(tree_leaves(own), lr=0.1),
            clip_norm=1.0,
            clip_by=clip_by,
            compile=False,
        )
        for own in (params, one)
    )
    alone(one, *batches[0])
    expected = [stack[1].detach().clone() for stack in one.stacked.values()]
    fitted = fe.fit(step, params, batches, epochs=2)
    assert list(fitted.stopped) == [1]
    assert all(torch.equal(stack[1], was) for stack, was in zip(params.stacked.values(), expected, strict=True))
    assert all(not torch.equal(params.stacked[name][0], one.stacked[name][0]) for name in params.stacked)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(params))
    assert step.stopped == set()
    again = fe.fit(step, params, [(x, y)], epochs=1)  # of another run it is a member as any
    assert again.stopped == {} and not torch.equal(params.stacked["weight"][1], expected[0])


def test_a_member_that_fails_last_does_not_take_the_rest_along() -> None:
    forward, params, x, y = _linear(2)
    step = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params), lr=0.1), compile=False)
    values, epoch = [[1.0, 5], [2, 4], [2, 3], [2, 2]], 0

    def batches(source: torch.Generator) -> list[Any]:
        bad = x.clone()
        bad[1] = float("nan")
        return [(bad if epoch == 3 else x, y)]

    def evaluate(*_: Any) -> dict[str, Any]:
        nonlocal epoch
        epoch += 1
        return {"value": torch.tensor(values[epoch - 1])}

    fitted = fe.fit(step, params, batches, epochs=9, evaluate=evaluate, monitor="value", patience=1)
    assert fitted.stopped[0] == "no better value after epoch 1" and "epoch 4, step 1" in fitted.stopped[1]
    assert len(fitted.history["value"]) == 4 and all(leaf.isfinite().all() for leaf in tree_leaves(params))


def test_where_none_can_go_on_it_is_an_error() -> None:
    shared = _Setting("BatchEnsemble")
    with torch.no_grad():
        shared.params.stacked["0.weight_r"][2] = float("inf")
    with pytest.raises(FloatingPointError, match=r"members \[2\]: .* epoch 1, step 1; all members share trained"):
        shared.fit(2)
    classic = _Setting()
    with torch.no_grad():
        classic.params.stacked["4.bias"][:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"members \[0, 1, 2\]: .*; no member is left"):
        classic.fit(2)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_after_a_batch_that_spoils_all_members_another_run_is_sound(chunk_size: int | None) -> None:
    run = _Setting(chunk_size=chunk_size)
    run.fit(1)
    rows, run.x = run.x, run.x.new_full(run.x.shape, float("nan"))
    before = {name: stack.detach().clone() for name, stack in run.params.stacked.items()}
    with pytest.raises(FloatingPointError, match=r"members \[0, 1, 2\]: .* epoch 1, step 1; no member is left"):
        run.fit(1)
    assert_same({name: stack.detach() for name, stack in run.params.stacked.items()}, before, tolerance=0)
    run.x = rows
    fitted = run.fit(1)
    assert fitted.stopped == {} and fitted.history["loss"].isfinite().all()
    assert all(leaf.isfinite().all() for leaf in tree_leaves(run.params))


def _run_by_values(values: Tensor, kind: str, patience: int) -> tuple[fe.Fitted, list[Any], list[Any]]:
    """A run whose monitored values `[epochs, E]` are given; what it returned, and its state after each epoch."""
    own, epoch = _Setting(kind), 0
    params: list[Any] = []
    buffers: list[Any] = []

    def evaluate(now: fe.EnsembleParams, states: Any) -> dict[str, Tensor]:
        nonlocal epoch
        params.append(tree_map(lambda t: t.detach().clone(), now))
        buffers.append({name: buffer.clone() for name, buffer in states.items()})
        epoch += 1
        return {"value": values[epoch - 1]}

    return own.fit(len(values), evaluate=evaluate, monitor="value", patience=patience), params, buffers


def test_each_member_stops_and_ends_as_it_was_at_its_best() -> None:
    values = torch.tensor([[3.0, 1, 9], [2, 2, 8], [4, 1, 7], [1, 0, 6], [1, 0, float("nan")]])
    fitted, params, buffers = _run_by_values(values, "classic", patience=2)
    assert fitted.stopped == {1: "no better value after epoch 1"}
    for member, best in ((0, 3), (1, 0), (2, 3)):
        for name, stack in fitted.params.stacked.items():
            assert torch.equal(stack[member], params[best].stacked[name][member])
        assert fitted.buffers is not None
        for name, buffer in fitted.buffers.items():
            assert torch.equal(buffer[member], buffers[best][name][member])
    for epoch in (3, 4):  # member 1 stopped after the third
        assert all(torch.equal(params[epoch].stacked[n][1], s[1]) for n, s in params[2].stacked.items())
        assert not torch.equal(params[epoch].stacked["4.bias"][0], params[2].stacked["4.bias"][0])


def test_patience_of_a_model_without_buffers(tmp_path: Path) -> None:
    def run(epochs: int) -> tuple[fe.Fitted, list[Any]]:
        forward, params, x, y = _linear()
        step = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params), lr=0.1), compile=False)
        seen: list[Any] = []

        def evaluate(now: fe.EnsembleParams, buffers: Any) -> dict[str, Any]:
            assert buffers is None
            seen.append(tree_map(lambda t: t.detach().clone(), now))
            epoch = int(file.exists() and fe.load_checkpoint(file)["epoch"]) + 1
            return {"value": torch.tensor([abs(epoch - 2.0), -epoch, abs(epoch - 1.0)])}

        fitted = fe.fit(
            step, params, [(x, y)], epochs=epochs, evaluate=evaluate, monitor="value", patience=2, checkpoint=file
        )
        return fitted, seen

    file = tmp_path / "run.pt"
    seen = run(3)[1] + run(6)[1]
    assert len(seen) == 6
    file.unlink()
    fitted, whole = run(6)
    assert set(fitted.stopped) == {0, 2} and fitted.buffers is None
    for member, best in ((0, 1), (1, 5), (2, 0)):
        assert torch.equal(fitted.params.stacked["weight"][member], whole[best].stacked["weight"][member])
        assert torch.equal(seen[best].stacked["weight"][member], whole[best].stacked["weight"][member])


def test_members_that_share_stop_together_by_their_mean() -> None:
    values = torch.tensor([[3.0, 1, 9], [2, 2, 8], [1, 1, 12], [0, 5, 8], [0, 0, 0]])
    fitted, params, _ = _run_by_values(values, "BatchEnsemble", patience=2)
    assert set(fitted.stopped) == {0, 1, 2} and len(fitted.history["loss"]) == 4
    assert_same(tuple(fitted.params), tuple(params[1]), tolerance=0)


def test_a_plateau_lowers_the_learning_rate_by_the_members_that_are_trained() -> None:
    own = _Setting()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(own.optimizer, factor=0.1, patience=0)
    own.fit(3, scheduler=scheduler, evaluate=lambda *_: {"value": 1.0}, monitor="value")
    assert own.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)
    own = _Setting()
    own.step.stopped = {1}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(own.optimizer, factor=0.1, patience=0)
    falling = iter([3.0, 2.0, 1.0])

    def evaluate(*_: Any) -> dict[str, Any]:
        value = next(falling)
        return {"value": torch.tensor([value, float("nan"), value])}

    fitted = own.fit(3, scheduler=scheduler, evaluate=evaluate, monitor="value")
    assert own.optimizer.param_groups[0]["lr"] == 0.05
    assert fitted.stopped == {1: "it was stopped before"} and own.step.stopped == {1}


def test_the_mean_loss_of_a_long_epoch_in_half_precision() -> None:
    """A sum in bfloat16 would stand still at 512."""
    model = nn.Linear(3, 2).bfloat16()
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.0)
    step = fe.make_train_step(fe.make_forward(model), F.mse_loss, optimizer, compile=False)
    x, y = torch.ones(4, 3).bfloat16(), torch.ones(4, 2).bfloat16()
    want = step(params, x, y).float()
    fitted = fe.fit(step, params, [(x, y)] * 800, epochs=1)
    assert_same(fitted.history["loss"][0], want, tolerance=1e-4)


def test_the_mode_of_the_model_is_that_of_training_again_after_evaluate() -> None:
    own = _Setting()

    def evaluate(*_: Any) -> dict[str, Any]:
        own.model.eval()
        return {}

    fitted = own.fit(3, evaluate=evaluate)
    assert own.model.training and all(module.training for module in own.model.modules())
    assert fitted.buffers is not None and fitted.buffers["1.num_batches_tracked"].tolist() == [9] * E


def test_without_buffers_and_with_a_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    model, x, y = nn.Linear(3, 2).double(), randn(8, 3), randn(8, 2)
    params = fe.ensemble_params(model, 12)
    step = fe.make_train_step(
        fe.make_forward(model), F.mse_loss, torch.optim.SGD(tree_leaves(params), lr=0.1), compile=False
    )
    first = fe.fit(step, params, [(x[:4], y[:4]), [x[4:], y[4:]]], epochs=2, progress=True)
    assert first.buffers is None and first.history["loss"].shape == (2, 12)
    shown = capfd.readouterr().err
    assert "epoch 2 of 2" in shown and "4/4" in shown and "loss" in shown and " to " in shown
    fe.fit(step, params, [(x, y)], epochs=1)
    assert capfd.readouterr().err == ""


def test_the_progress_bar_of_a_resumed_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.pt"
    _Setting().fit(3, checkpoint=file)
    _Setting().fit(4, checkpoint=file, progress=True)
    assert "12/12" in capfd.readouterr().err


def test_the_run_of_another_model_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    _Setting().fit(1, checkpoint=file)
    for other, options, message in (
        (_Setting("BatchEnsemble"), {}, r"of another run: 0.bias is torch.float64 \[3, 6\] there, and .* \[6\] here"),
        (
            _Setting(),
            {"patience": 1, "monitor": "nll"},
            "of another run: patience is NoneType there, and Pat",
        ),
        (_Setting(), {"scheduler": None}, "of another run: scheduler is CosineAnnealingLR there, and NoneType here"),
    ):
        before = tree_map(lambda t: t.detach().clone(), tuple(other.params))
        with pytest.raises(ValueError, match=rf"checkpoint: '.*run.pt' is {message}"):
            other.fit(2, checkpoint=file, **options)
        assert_same(tuple(other.params), before, tolerance=0)
    other = _Setting()
    other.optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    with pytest.raises(ValueError, match="the optimizer trains 1 of its 7 tensors elsewhere"):
        other.fit(2, checkpoint=file)
    fe.save_checkpoint({"epoch": 1}, file)
    with pytest.raises(ValueError, match=r"checkpoint: .* is not one that fit wrote: it has no \['began', 'buffers'"):
        _Setting().fit(2, checkpoint=file)
    file.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"checkpoint: path: .* is no checkpoint that can be read"):
        _Setting().fit(2, checkpoint=file)


class _Endless(IterableDataset[Any]):
    """The rows of a run one after another, without a length."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


def test_a_loader_without_a_length() -> None:
    rows = list(zip(randn(8, 3), randn(8, 2), strict=True))
    results = []
    for batches in (DataLoader(_Endless(rows), batch_size=4), DataLoader(rows, batch_size=4)):  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
        step = fe.make_train_step(forward, F.mse_loss, torch.optim.SGD(tree_leaves(params), lr=0.1), compile=False)
        results.append(fe.fit(step, params, batches, epochs=2).history["loss"])
    assert_same(results[0], results[1], tolerance=0)


@pytest.mark.parametrize(("name", "mode"), [("accuracy", None), ("val_acc", None), ("value", "max")])
def test_of_what_is_better_the_more_there_is_the_most_is_kept(name: str, mode: str | None) -> None:
    values = torch.tensor([[1.0, 3, 2], [2, 2, 3], [1, 1, float("nan")], [1, 9, 9]])
    own, epoch, seen = _Setting(), 0, []

    def evaluate(now: fe.EnsembleParams, _: Any) -> dict[str, Tensor]:
        nonlocal epoch
        seen.append(now.stacked["0.weight"].detach().clone())
        epoch += 1
        return {name: values[epoch - 1]}

    fitted = own.fit(4, evaluate=evaluate, monitor=name, monitor_mode=mode, patience=2)
    # Member 2 has waited for one epoch at the nan, and is best at the end.
    assert fitted.stopped == {0: f"no better {name} after epoch 2", 1: f"no better {name} after epoch 1"}
    for member, best in ((0, 1), (1, 0), (2, 3)):
        assert torch.equal(fitted.params.stacked["0.weight"][member], seen[best][member])


def test_a_nan_in_what_is_monitored_is_named(caplog: pytest.LogCaptureFixture) -> None:
    nan = float("nan")
    values = torch.tensor([[3.0, nan, 9], [nan, nan, nan], [2, 1, nan]])
    own, epoch, seen = _Setting(), 0, []

    def evaluate(now: fe.EnsembleParams, _: Any) -> dict[str, Tensor]:
        nonlocal epoch
        seen.append(now.stacked["0.weight"].detach().clone())
        epoch += 1
        return {"nll": values[epoch - 1]}

    fitted = own.fit(3, evaluate=evaluate, monitor="nll", patience=5)
    messages = [record.getMessage() for record in caplog.records if "nan" in record.getMessage()]
    assert messages == [
        "members [1]: nll is nan after epoch 1, which counts as no better",
        "all members: nll is nan after epoch 2, which counts as no better",
        "members [2]: nll is nan after epoch 3, which counts as no better",
    ]
    for member, best in enumerate((2, 2, 0)):
        assert torch.equal(fitted.params.stacked["0.weight"][member], seen[best][member])


def test_a_plateau_has_the_direction_of_what_is_monitored() -> None:
    own = _Setting()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(own.optimizer, mode="max", factor=0.1, patience=0)
    with pytest.raises(
        ValueError, match="scheduler: ReduceLROnPlateau has mode='max', but 'nll' is monitored by 'min'"
    ):
        own.fit(1, scheduler=plateau, monitor="nll")
    rising, nan = iter([1.0, 2.0, 3.0]), float("nan")
    own.fit(
        3,
        scheduler=plateau,
        evaluate=lambda *_: {"acc": torch.tensor([next(rising), nan, nan])},
        monitor="acc",
    )
    assert own.optimizer.param_groups[0]["lr"] == 0.05


def test_the_direction_of_a_resumed_run_is_that_of_its_beginning(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "nll", "patience": 2, "checkpoint": tmp_path / "run.pt"}
    _Setting().fit(1, **options)
    with pytest.raises(ValueError, match="is of another run: monitor_mode is 'min' there, and 'max' here"):
        _Setting().fit(2, monitor_mode="max", **options)


_TURN = iter([True, False])
_OTHER = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1, requires_grad=True)]), 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected a positive int, got 0"),
        ({"patience": 0}, ValueError, "patience: expected a positive int, got 0"),
        ({"patience": 1}, ValueError, "monitor: expected the name of what is to become better"),
        ({"monitor": "nll", "evaluate": None}, ValueError, "monitor: expected evaluate too, which returns 'nll'"),
        ({"monitor": "other"}, ValueError, r"monitor: expected 'other', a number or \[3\]"),
        ({"evaluate": lambda *_: 3}, ValueError, "evaluate: expected a dict of results, .* got 3"),
        ({"evaluate": lambda *_: {"new": 3} if next(_TURN) else {}, "epochs": 2}, ValueError, r"evaluate: .* before, "),
        ({"scheduler": 3}, TypeError, "scheduler: expected one of torch.optim.lr_scheduler, got 3"),
        (
            {"scheduler": _OTHER},
            ValueError,
            "scheduler: expected one over the optimizer of step, got StepLR",
        ),
        ({"evaluate": lambda *_: {"loss": 3}}, ValueError, 'evaluate: expected .* "loss" not among them'),
        ({"schedule_by": "batch"}, ValueError, "schedule_by: expected one of .*, got 'batch'"),
        ({"evaluate": "x"}, TypeError, "evaluate: expected a function .* got 'x'"),
        ({"evaluate": lambda params: {}}, TypeError, r"evaluate: .* called with \(params, buffers\), .* \(params\)"),
        ({"evaluate": lambda *_: {"nll": "x"}}, TypeError, "evaluate: expected numbers or tensors, got 'x' for 'nll'"),
        ({"monitor_mode": "max"}, ValueError, "monitor_mode: expected monitor too, got 'max' alone"),
        ({"monitor": "nll", "monitor_mode": "more"}, ValueError, r"monitor_mode: expected one of .* got 'more'"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got 3"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], message: str) -> None:
    own = _Setting()
    with pytest.raises(error, match=message):
        own.fit(**{"epochs": 1, **options})


def test_bad_batches() -> None:
    own = _Setting()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(own.optimizer)
    with pytest.raises(ValueError, match=r'schedule_by: ReduceLROnPlateau .* got "step"'):
        own.fit(1, scheduler=plateau, schedule_by="step")
    with pytest.raises(TypeError, match=r"scheduler: expected one of torch.optim.lr_scheduler, got AdamW"):
        own.fit(1, scheduler=own.optimizer)
    fit: Callable[..., Any] = fe.fit
    step = fe.make_train_step(own.forward, F.cross_entropy, own.optimizer, compile=False)
    for batches, message in (([own.x], "got \\(a tensor"), ([{"x": own.x}], "got"), ("xy", "got 'xy'")):
        with pytest.raises(TypeError, match=f"batches: expected .*{message}"):
            fit(step, own.params, batches, epochs=1, buffers=own.buffers)
    with pytest.raises(TypeError, match="batches: expected a function that returns an iterable, it returned None"):
        fit(step, own.params, lambda source: None, epochs=1, buffers=own.buffers)
    with pytest.raises(TypeError, match="batches: expected an iterable, or a function of a generator, got 3"):
        fit(own.step, own.params, 3, epochs=1)
    with pytest.raises(TypeError, match="step: expected a train step"):
        fit(own.forward, own.params, [], epochs=1)
    once = iter(own.batches(own.generator))
    with pytest.raises(ValueError, match=r"batches: expected at least one batch .* got none in epoch 2; an iterator"):
        fit(own.step, own.params, once, epochs=2, buffers=own.buffers)


@pytest.mark.filterwarnings("ignore:init. all members start equal:UserWarning")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"init": "ones"}, "their losses in epoch 1 are equal to 0.0002 of their value"),
        ({"r_std": 1e-5, "s_std": 1e-5}, "their losses in epoch 1 are equal to 0.0002 of their value"),
        ({"r_std": 0.5}, ""),
        ({"flip": 0.05}, ""),
        ({}, ""),
    ],
)
def test_members_that_stay_equal_are_told_once(options: Any, told: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(64, 8)
    y = x[:, :3].argmax(-1)
    params = fe.batchensemble_params(model, 3, **options)
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=1e-2))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    fe.fit(step, params, list(zip(x.split(16), y.split(16), strict=True)), epochs=3)
    messages = [record.getMessage() for record in caplog.records if "hardly an ensemble" in record.getMessage()]
    assert len(messages) == bool(told) and all(told in message for message in messages)


@pytest.mark.parametrize(("init", "told"), [("normal", True), ("random_sign", False)])
def test_members_whose_r_a_norm_cancels_are_told(init: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32, eps=1e-12)
    model, x = nn.Sequential(nn.Linear(8, 32), norm, nn.ReLU(), nn.Linear(32, 3)).double(), torch.randn(64, 8).double()
    y = x[:, :3].argmax(-1)
    spread = 0.2 if told else None
    params = fe.batchensemble_params(model, 3, layers="0", init={"*_r": init, "*_s": "ones"}, r_std=spread)
    distance = fe.describe(model, params).distance
    assert distance is not None and distance > 0.1  # so it does not show before training
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=1e-2))
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=False)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    fe.fit(step, params, batches, epochs=2, buffers=fe.ensemble_buffers(model, 3))
    messages = [record.getMessage() for record in caplog.records if "hardly an ensemble" in record.getMessage()]
    assert len(messages) == told and all("a BatchNorm after a layer cancels the size of r" in m for m in messages)


@pytest.mark.parametrize("value", [torch.tensor(0.004), torch.full((64,), 0.004), 0.2])
def test_members_that_agree_on_everything_are_told_once(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Linear(3, 2), torch.randn(64, 3)
    params = fe.ensemble_params(model, 3)
    step = fe.make_train_step(
        fe.make_forward(model), F.cross_entropy, torch.optim.SGD(tree_leaves(params)), compile=False
    )
    fe.fit(step, params, [(x, (x[:, 0] > 0).long())], epochs=3, evaluate=lambda p, b: {"disagreement": value})
    messages = [record.getMessage() for record in caplog.records if "hardly an ensemble" in record.getMessage()]
    assert len(messages) == (float(torch.as_tensor(value).mean()) < 0.1)
    assert all("their disagreement after epoch 1 is 0.004" in message for message in messages)
