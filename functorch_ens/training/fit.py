"""Training over epochs, with progress, evaluation, early stopping, and runs that resume from a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from functorch_ens.checks import (
    check_bool,
    check_callable,
    check_generator,
    check_option,
    check_path,
    check_positive_int,
    check_tensor,
    check_text,
    shown,
)
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.training.checkpoint import save_checkpoint
from functorch_ens.training.epochs import Batches, Evaluate, Fitted, Run, Scheduler
from functorch_ens.training.step import TrainStep
from functorch_ens.training.stopping import better

log = logging.getLogger(__name__)


def fit(
    step: TrainStep,
    params: EnsembleParams,
    batches: Batches,
    *,
    epochs: int,
    buffers: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    scheduler: Scheduler | None = None,
    schedule_by: str = "epoch",
    evaluate: Evaluate | None = None,
    monitor: str | None = None,
    monitor_mode: str | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Fitted:
    """Train all members for `epochs`, in the mode (`model.train()`) that the model is in; update `params` in place.

    >>> import torch, functorch_ens as fe
    >>> _ = torch.manual_seed(0)
    >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
    >>> params, optim, loss = fe.ensemble_params(model, E=5), torch.optim.Adam, torch.nn.functional.mse_loss
    >>> batch = lambda i: (x[i], x[i].sum(-1, keepdim=True))
    >>> optimizer = optim(fe.param_groups(params, lr=0.1))
    >>> step = fe.make_train_step(fe.make_forward(model), loss, optimizer, prepare=batch, compile=False)
    >>> fitted = fe.fit(step, params, lambda source: fe.index_batches(64, 16, generator=source), epochs=20)
    >>> fitted.history["loss"].shape, bool((fitted.history["loss"][-1] < 0.1).all())
    (torch.Size([20, 5]), True)

    Args:
        batches: a DataLoader or collection of batches, or a function of a generator that makes it anew for each epoch.
            A batch is what `step` takes after `params`: a tensor, or a tuple or list of them.
        generator: what `batches` is called with. None: a new one, seeded by torch's.
        scheduler: of torch.optim.lr_scheduler; it steps after each `"epoch"` or `"step"` (`schedule_by`).
        evaluate: `evaluate(params, buffers)` after each epoch returns numbers or tensors by name.
        monitor: the name of one of these, a number or `[E]`.
        monitor_mode: `"min"`: less is better; `"max"`. None: by the name, max for accuracy, auroc, f1 and their like.
        patience: stop a member after so many epochs without a better `monitor`; it gets its best parameters back.
        checkpoint: a file, written after each epoch. If it exists, the run resumes from it.
        progress: show a bar. None: at a terminal.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, an epoch has no batches, the checkpoint is of another
            run, or `step` raises it.
        FloatingPointError: a loss is not finite, and no member can go on. (Else the member is stopped, with a warning.)
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"step: expected a train step (from make_train_step), got {shown(step)}")
    _check_batches(batches)
    check_positive_int(epochs, "epochs")
    check_generator(generator)
    check_option(schedule_by, ("epoch", "step"), "schedule_by")
    if evaluate is not None:
        check_callable(evaluate, "evaluate", "a function that returns results by name", ["params", "buffers"])
    if patience is not None:
        check_positive_int(patience, "patience")
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    if progress is not None:
        check_bool(progress, "progress", or_else="or None")
    mode = _mode(monitor, monitor_mode, evaluate)
    _check_scheduler(scheduler, step, schedule_by, monitor, mode)
    if monitor is None and (patience is not None or isinstance(scheduler, ReduceLROnPlateau)):
        raise ValueError("monitor: expected the name of what is to become better, for patience or ReduceLROnPlateau")
    step.forward.check(params, buffers, step.forward.modes())
    step.forward.check_kinds(params, buffers)
    before = set(step.stopped)
    run = Run(step, params, buffers, generator, scheduler, patience, mode)
    file = None if checkpoint is None else Path(checkpoint)
    try:
        if file is not None and file.exists():
            run.resume(file)
            level = logging.INFO if run.epoch < epochs else logging.WARNING  # nothing is left to train: an old file?
            log.log(level, "%s: goes on after epoch %d of %d", file, run.epoch, epochs)
        with tqdm(disable=None if progress is None else not progress, unit="step") as bar:
            while run.epoch < epochs and len(run.stopped) < params.E:
                run.one_epoch(batches, scheduler if schedule_by == "step" else None, bar, epochs)
                run.evaluate(evaluate, monitor)
                if schedule_by == "epoch":
                    run.schedule(monitor)
                if file is not None:
                    save_checkpoint(run.state(), file)
        return run.result()
    finally:
        step.stopped = before


def _check_batches(batches: Any) -> None:
    """TypeError where `batches` are neither a collection nor a function of a generator."""
    expected = "an iterable, or a function of a generator"
    if isinstance(batches, Tensor):
        check_tensor(batches, "batches", expected)
    if isinstance(batches, str | bytes | nn.Module) or (isinstance(batches, Tensor) and batches.ndim == 0):
        raise TypeError(f"batches: expected {expected}, got {shown(batches)}")
    if callable(batches) or not isinstance(batches, Iterable):
        check_callable(batches, "batches", expected, ["generator"])


def _mode(monitor: Any, monitor_mode: Any, evaluate: Any) -> str:
    """The direction in which what is monitored becomes better."""
    check_option(monitor_mode, (None, "min", "max"), "monitor_mode")
    if monitor is None:
        if monitor_mode is not None:
            raise ValueError(f"monitor_mode: expected monitor too, got {monitor_mode!r} alone")
        return "min"
    check_text(monitor, "monitor", "the name of something that evaluate returns")
    if evaluate is None:
        raise ValueError(f"monitor: expected evaluate too, which returns {monitor!r}")
    return monitor_mode or better(monitor)


def _check_scheduler(scheduler: Any, step: TrainStep, schedule_by: str, monitor: str | None, mode: str) -> None:
    """TypeError or ValueError where `scheduler` is none of torch's, or does not fit the other arguments."""
    if scheduler is None:
        return
    methods = [getattr(scheduler, name, None) for name in ("step", "state_dict", "load_state_dict")]
    if isinstance(scheduler, type | Optimizer) or not all(map(callable, methods)):
        raise TypeError(f"scheduler: expected one of torch.optim.lr_scheduler, got {shown(scheduler)}")
    if getattr(scheduler, "optimizer", step.optimizer) is not step.optimizer:
        raise ValueError(
            f"scheduler: expected one over the optimizer of step, got {type(scheduler).__name__} of another"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        if schedule_by == "step":
            raise ValueError('schedule_by: ReduceLROnPlateau looks at what is evaluated by "epoch", got "step"')
        if monitor is not None and scheduler.mode != mode:
            raise ValueError(
                f"scheduler: ReduceLROnPlateau has mode={scheduler.mode!r}, but {monitor!r} is monitored by {mode!r}; "
                "give monitor_mode= the direction of the scheduler"
            )
