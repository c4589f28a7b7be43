"""A run over epochs: what it does in one, and everything of it that a checkpoint holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from functorch_ens.checks import shown
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.rng import RandomState
from functorch_ens.training.checkpoint import load_checkpoint
from functorch_ens.training.resume import check_state, form_of, put_back_on_error, settings_of, with_own_kernels
from functorch_ens.training.step import TrainStep, advance
from functorch_ens.training.stopping import Patience
from functorch_ens.trees import length_of

log = logging.getLogger(__name__)

ALIKE = 2e-4
"""Members whose mean losses in an epoch differ by less than this share of them are taken for one network. At the start
those of different members may be near each other too, at that of chance."""
AGREE = 5e-3
"""Members whose predictions differ on less than this share of the inputs are taken for one network."""

Batches = Iterable[Any] | Callable[[torch.Generator], Iterable[Any]]


class Fitted(NamedTuple):
    """The result of `fit`: the trained parameters, and the history of the run."""

    params: EnsembleParams
    """The parameters that `fit` was given; they were trained in place."""
    buffers: dict[str, Tensor] | None
    """The new buffers, `{name: [E, ...]}`; None where none were given."""
    history: dict[str, Tensor]
    """Of each epoch: `"loss"`, the mean over its steps, `[epochs, E]`; the results of `evaluate`, `[epochs, ...]`."""
    stopped: dict[int, str]
    """The members that stopped before the end, each with the reason."""


class Evaluate(Protocol):
    """`evaluate(params, buffers)` returns numbers or tensors by name."""

    def __call__(self, params: EnsembleParams, buffers: dict[str, Tensor] | None, /) -> Mapping[str, Any]: ...


class Scheduler(Protocol):
    """A scheduler of torch.optim.lr_scheduler."""

    def step(self, *args: Any, **kwargs: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Run:
    """The state of a run between two epochs: everything that a checkpoint holds."""

    def __init__(
        self,
        step: TrainStep,
        params: EnsembleParams,
        buffers: Mapping[str, Tensor] | None,
        generator: torch.Generator | None,
        scheduler: Scheduler | None,
        patience: int | None,
        mode: str,
    ) -> None:
        self._step = step
        self._params = params
        self._buffers = None if buffers is None else dict(buffers)
        self._generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self._scheduler = scheduler
        self.modes = step.forward.modes()
        """Those of the model at the start, in which all steps are made."""
        self._began = settings_of(step.optimizer, scheduler)
        self._together = bool(step._trained(params).params.shared)
        self._patience = None if patience is None else Patience(patience, params.E, self._together, mode)
        self._failed: set[int] = set()
        self._told = False
        self.epoch = 0
        self.history: list[dict[str, Tensor]] = []
        self.stopped: dict[int, str] = dict.fromkeys(sorted(step.stopped), "it was stopped before")

    def one_epoch(self, batches: Batches, scheduler: Scheduler | None, bar: Any, epochs: int) -> None:
        """Go through the batches once."""
        given: Any = batches(self._generator) if callable(batches) else batches
        if not isinstance(given, Iterable):
            raise TypeError(f"batches: expected a function that returns an iterable, it returned {shown(given)}")
        if bar.total is None and (length := length_of(given)) is not None:
            bar.total, bar.n = epochs * length, self.epoch * length
        total: Tensor | None = None
        count = 0
        for batch in given:
            batch = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            if len(batch) < 2 and not self._step.prepares:
                raise TypeError(
                    f"batches: expected batches of the inputs and the target, (x, y), got {shown(batch)}; prepare= of "
                    "make_train_step makes them of anything else"
                )
            look = partial(self._stop_failed, count)
            losses, new = advance(self._step, self._params, batch, self._buffers, {}, modes=self.modes, look=look)
            self._buffers = None if self._buffers is None else new
            losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
            total = losses.clone() if total is None else total + losses
            count += 1
            if scheduler is not None:
                scheduler.step()
            if bar.update():  # it was drawn. Reading the losses waits for the device, so not at every step
                self._show(bar, total / count, epochs)
        if total is None:
            raise ValueError(
                f"batches: expected at least one batch in an epoch, got none in epoch {self.epoch + 1}; an iterator "
                "lasts for one: give a collection, or a function that makes one"
            )
        self._show(bar, total / count, epochs)
        self.history.append({"loss": (total / count).cpu()})
        self.epoch += 1
        self._warn_of_equal_members("loss", self.history[-1]["loss"])

    def _show(self, bar: Any, losses: Tensor, epochs: int) -> None:
        bar.set_description(f"epoch {self.epoch + 1} of {epochs}", refresh=False)
        bar.set_postfix_str(f"loss {_shown(losses)}", refresh=False)

    def _stop_failed(self, count: int, first: int, losses: Tensor) -> None:
        """Stop members whose loss is nan or infinite; `losses` `[k]` are those of the members from `first` on.

        Raises: FloatingPointError where no member can go on.
        """
        finite = losses.isfinite()
        if finite.all():
            return
        failed = [i for i, good in enumerate(finite.tolist(), first) if not good and i not in self.stopped]
        if not failed:
            return
        where = f"its loss is not finite in epoch {self.epoch + 1}, step {count + 1}"
        if self._together:
            raise FloatingPointError(f"members {failed}: {where}; all members share trained tensors, so none can go on")
        self._stop(failed, where)
        self._failed.update(failed)
        if len(self._failed) == self._params.E:
            last = [member for member, why in self.stopped.items() if why == where]
            raise FloatingPointError(f"members {last}: {where}; no member is left")
        log.warning("members %s: %s; they are trained no more", failed, where)

    def _stop(self, members: list[int], why: str) -> None:
        new = [member for member in members if member not in self.stopped]
        self.stopped.update(dict.fromkeys(new, why))
        if not self._together:
            self._step.stopped.update(new)

    def evaluate(self, evaluate: Evaluate | None, monitor: str | None) -> None:
        """Add the results of `evaluate` to the history, and stop members that have waited too long."""
        results: dict[str, Tensor] = {}
        if evaluate is not None:
            try:
                with torch.no_grad():
                    found = evaluate(self._params, self._buffers)
            finally:
                self._step.forward.put_back(self.modes)
            if not isinstance(found, Mapping) or "loss" in found:
                raise ValueError(f'evaluate: expected a dict of results, "loss" not among them, got {shown(found)}')
            results = {name: _as_result(name, value) for name, value in found.items()}
        self.history[-1].update(results)
        now, first = ({name: list(value.shape) for name, value in self.history[i].items()} for i in (-1, 0))
        if now != first:
            raise ValueError(f"evaluate: expected the results of the epochs before, {first}, got {now}")
        for name in results.keys() & {"disagreement"}:
            self._warn_of_equal_members(name, results[name])
        if monitor is None:
            return
        E, value = self._params.E, results.get(monitor)
        if value is None or value.shape not in ((), (E,)):
            raise ValueError(f"monitor: expected {monitor!r}, a number or [{E}], in what evaluate returns, got {now}")
        self._warn_of_nan(monitor, value.expand(E))
        if self._patience is not None:
            late = self._patience.look(value.expand(E), self._params, self._buffers)
            self._stop(late, f"no better {monitor} after epoch {self.epoch - self._patience.epochs}")

    def _warn_of_nan(self, monitor: str, values: Tensor) -> None:
        """Name the members, among those still trained, for which what is monitored is nan."""
        trained = [i for i in range(self._params.E) if i not in self.stopped]
        found = [i for i in trained if bool(values[i].isnan())]
        if found:
            who = "all members" if found == trained else f"members {found}"
            log.warning("%s: %s is nan after epoch %d, which counts as no better", who, monitor, self.epoch)

    def _warn_of_equal_members(self, name: str, values: Tensor) -> None:
        """Say once that the members are one network: their losses `[E]` are equal, or their `disagreement` is 0."""
        trained = [i for i in range(self._params.E) if i not in self.stopped]
        if self._told or len(trained) < 2:
            return
        if name == "loss":
            values = values[trained]
            alike = bool(values.any() and values.max() - values.min() <= ALIKE * values.abs().max())
            found = f"their losses in epoch {self.epoch} are equal to {ALIKE:g} of their value"
        else:
            alike = bool(values.double().mean() < AGREE)
            found = f"their disagreement after epoch {self.epoch} is {values.double().mean():.2g}"
        if alike:
            self._told = True
            log.warning(
                "the %d members are hardly an ensemble: %s. Unless the data are so easy, let them start further apart "
                "(a larger flip; a BatchNorm after a layer cancels the size of r, but not its sign), or see rows of "
                'their own: index_batches(..., sees="own")',
                len(trained),
                found,
            )

    def schedule(self, monitor: str | None) -> None:
        """Step the scheduler after an epoch."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            value = self.history[-1][str(monitor)].double().expand(self._params.E)
            trained = [i for i in range(self._params.E) if i not in self.stopped]
            if trained:
                self._scheduler.step(value[trained].nanmean())  # the others say nothing of those that are nan
        elif self._scheduler is not None:
            self._scheduler.step()

    def result(self) -> Fitted:
        buffers = self._buffers and {name: buffer.clone() for name, buffer in self._buffers.items()}
        if self._patience is not None:
            kept = self._patience.put_back(self._params)
            buffers = None if buffers is None else kept
        history = {name: torch.stack([row[name] for row in self.history]) for name in self.history[0]}
        return Fitted(self._params, buffers, history, self.stopped)

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "params": self._params,
            "buffers": self._buffers,
            "optimizer": self._step.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "generator": self._generator.get_state(),
            "random": tuple(RandomState.of(self._params)),
            "history": self.history,
            "patience": None if self._patience is None else self._patience.state_dict(),
            "stopped": self.stopped,
            "failed": sorted(self._failed),
            "began": self._began,
            **form_of(
                self._params,
                self._buffers,
                self._step.optimizer,
                self._step._trained(self._params),
                scheduler=self._scheduler,
                patience=self._patience,
            ),
        }

    def resume(self, file: Path) -> None:
        """Take over the state that was written to `file`; ValueError, with nothing changed, where it does not fit."""
        optimizer = self._step.optimizer
        try:
            state = load_checkpoint(file, device="cpu")
        except ValueError as error:
            raise ValueError(f"checkpoint: {error}") from error
        try:
            check_state(state, self.state(), optimizer, self._generator)
        except ValueError as error:
            raise ValueError(f"checkpoint: {os.fspath(file)!r} {error}") from error
        with put_back_on_error(optimizer, self._scheduler):
            optimizer.load_state_dict(with_own_kernels(state["optimizer"], optimizer))
            if self._scheduler is not None:
                self._scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history, self._began = state["epoch"], state["history"], state["began"]
        with torch.no_grad():
            for mine, theirs in zip(self._params, state["params"], strict=True):
                for name, tensor in mine.items():
                    tensor.copy_(theirs[name])
        if self._buffers is not None:
            self._buffers = {name: state["buffers"][name].to(own.device) for name, own in self._buffers.items()}
        if self._patience is not None:
            self._patience.load_state_dict(state["patience"], self._params, self._buffers or {})
        self._generator.set_state(state["generator"])
        random = RandomState(*state["random"])
        used = RandomState.of(self._params).cuda  # the run may have moved to a machine without these devices
        random._replace(cuda={i: kept for i, kept in random.cuda.items() if i in used}).restore()
        self._failed = set(state["failed"])
        for member, why in state["stopped"].items():
            self._stop([member], why)


def _as_result(name: str, value: Any) -> Tensor:
    """What `evaluate` returned under `name`, as a tensor on the CPU."""
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate: expected numbers or tensors, got {shown(value)} for {name!r}") from error


def _shown(losses: Tensor) -> str:
    """The losses of a few members, or the range of many."""
    values = losses.tolist()
    if len(values) <= 8:
        return " ".join(f"{value:.3f}" for value in values)
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"
