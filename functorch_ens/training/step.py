"""A train step for all members at once: gradients, compiled, and then an update by any optimiser of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from functorch_ens.checks import (
    check_bool,
    check_callable,
    check_compile,
    check_number,
    check_option,
    check_positive_int,
    shown,
)
from functorch_ens.forward.forward import Forward
from functorch_ens.forward.plans import Plan
from functorch_ens.forward.template import Modes
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.training.clipping import clipped
from functorch_ens.training.gradients import (
    Gradients,
    Objective,
    Prepare,
    Work,
    accumulated,
    by_parts,
    check_found,
    collected,
)
from functorch_ens.training.losses import EXPECTED, Loss, check_values
from functorch_ens.training.optim import Finder, Trained, check_groups
from functorch_ens.training.update import Update, can_be_parted
from functorch_ens.trees import take_apart


def make_train_step(
    forward: Forward,
    loss: Loss,
    optimizer: Optimizer,
    *,
    reduction: str = "sum",
    prepare: Prepare | None = None,
    values: Mapping[str, Tensor] | None = None,
    clip_norm: float | None = None,
    clip_by: str = "member",
    accumulate: int = 1,
    member_targets: bool = False,
    autocast: torch.dtype | None = None,
    compile: bool | Mapping[str, Any] = True,
) -> TrainStep:
    """Make a train step for all members at once: compiled gradients, an optimiser, and new buffers.

    >>> import torch, functorch_ens as fe
    >>> from torch.utils._pytree import tree_leaves
    >>> model = torch.nn.Linear(3, 2)
    >>> params = fe.batchensemble_params(model, E=5)
    >>> optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    >>> step = fe.make_train_step(fe.make_forward(model), torch.nn.functional.mse_loss, optimizer, compile=False)
    >>> step(params, torch.ones(7, 3), torch.ones(7, 2)).shape
    torch.Size([5])

    Args:
        forward: from `make_forward`; `member_inputs=True` implies `member_targets`.
        loss: `loss(output_of_one_member, y)`, a scalar, such as `F.cross_entropy`.
        optimizer: of torch.optim, over tensors of the parameters or over `param_groups`.
        reduction: `"sum"` of the members' losses, or their `"mean"`, which gives r and s 1/E of the gradient.
        prepare: `prepare(*batch)` returns the inputs and the target; it is part of the compiled graph.
        values: keyword arguments of `loss`, one for each member: `{name: [E, ...]}`.
        clip_norm: scale gradients down to this norm.
        clip_by: the norm is that of each `"member"`, or of the whole `"ensemble"`.
        accumulate: average the gradients of so many equal parts of a batch.
        member_targets: y is `[E, B, ...]`, and member i learns from `[i]`.
        autocast: `torch.bfloat16` for the forward and the loss.
        compile: True, options of `torch.compile`, or False. Training goes on without a compiler that fails.

    Returns: `step(params, *inputs, y, buffers=None, **kwargs)`, a `TrainStep`.
    Raises: TypeError, ValueError for arguments of the wrong kind.
    """
    if not isinstance(forward, Forward):
        raise TypeError(f"forward: expected the forward of an ensemble (from make_forward), got {shown(forward)}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected an optimizer of torch.optim, got {shown(optimizer)}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: got LBFGS, whose step evaluates the loss several times; a train step does so once")
    check_option(reduction, ("sum", "mean"), "reduction")
    if prepare is not None:
        check_callable(prepare, "prepare", "a function of the batch")
    for name, value in check_values(values).items():
        check_option(value.requires_grad, (False,), f"values[{name!r}].requires_grad")
    check_callable(loss, "loss", EXPECTED, ["output", "y"], values or ())
    check_groups(optimizer)
    if clip_norm is not None and not check_number(clip_norm, "clip_norm", minimum=0.0):
        raise ValueError(f"clip_norm: expected a number > 0, got {clip_norm!r}")
    check_option(clip_by, ("member", "ensemble"), "clip_by")
    check_bool(member_targets, "member_targets")
    check_option(autocast, (None, torch.bfloat16), "autocast")
    check_compile(compile)
    return TrainStep(
        Objective(forward, loss, reduction, prepare, autocast, member_targets),
        optimizer,
        values=dict(values or {}),
        clip=None if clip_norm is None else (float(clip_norm), clip_by),
        accumulate=check_positive_int(accumulate, "accumulate"),
        compile=compile,
    )


class TrainStep:
    """A train step, from `make_train_step`: call it as `step(params, *inputs, y, buffers=None, **kwargs)`.

    A call is `gradients` and then `update`. A classic ensemble with large members that are computed in parts is
    updated part by part instead, so that the gradients of one part are in memory at a time.
    """

    optimizer: Optimizer
    stopped: set[int]
    """Members whose parameters and buffers stay as they are. Only members that share no trained tensor can stop. An
    optimiser that computes over a whole stack still counts them; `param_groups` gives each member tensors of its own.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        *,
        values: dict[str, Tensor],
        clip: tuple[float, str] | None,
        accumulate: int,
        compile: bool | Mapping[str, Any],
    ) -> None:
        self.optimizer = optimizer
        self.stopped = set()
        self._objective = objective
        self._values = values
        self._clip = clip
        self._accumulate = accumulate
        self._options = None if compile is False else {} if compile is True else dict(compile)
        self._compiled: Any = None
        """The `Compiled` objective, made by the first call: making it imports torch's compiler."""
        self._revision = self.forward.revision
        self._trained = Finder(optimizer)
        self._scratch: dict[str, Tensor] = {}
        self._sizes: dict[Hashable, int | None] = {}
        """By kind of batch, the members at a time that the forward has chosen."""

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the step as it was made. Its optimiser has the tensors of `params`: pickle both together."""
        return {**vars(self), "_compiled": None, "_trained": Finder(self.optimizer), "_scratch": {}, "_sizes": {}}

    @property
    def forward(self) -> Forward:
        """The forward that the step was made with."""
        return self._objective.forward

    @property
    def prepares(self) -> bool:
        """Whether `prepare` makes the inputs and the target of a batch."""
        return self._objective.prepares

    @property
    def strategy(self) -> str:
        """`forward.strategy`: how the members are computed."""
        return self.forward.strategy

    @property
    def reason(self) -> str:
        """`forward.reason`: why they are computed so; and what of the step is not compiled, and why."""
        of_compiler = "" if self._compiled is None else self._compiled.reason
        return "; ".join(filter(None, [self.forward.reason, self._objective.losses.reason, of_compiler]))

    @property
    def compiled_by(self) -> str | None:
        """The compiler in use; None before the first call.

        `"functorch_ens"`: torch.compile with the additions of this package. `"torch.compile"`: without them, since one
        failed. `"eager"`: none, since torch.compile failed or `compile=False`.
        """
        if self._options is None:
            return "eager"
        return None if self._compiled is None else self._compiled.by

    @overload
    def __call__(self, params: EnsembleParams, /, *batch: Any, buffers: None = None, **kwargs: Any) -> Tensor: ...
    @overload
    def __call__(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor], **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]: ...
    @overload
    def __call__(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...
    def __call__(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Update `params` in place by one batch.

        Args:
            params: the parameters whose tensors the optimiser holds.
            batch: the inputs of the model and the target, or the arguments of `prepare`.
            buffers: `{name: [E, ...]}`, for a model that has buffers.
            kwargs: keyword arguments of the model.

        Returns: the loss of each member before the update, `[E]`; with `buffers=` also the new buffers.
        Raises: TypeError, ValueError where the optimiser holds tensors that are not in `params`, where `loss` returns
            more than one number, where a label is out of range, and as `forward` does.
        """
        losses, new = advance(self, params, batch, buffers, kwargs)
        return losses if buffers is None else (losses, new)

    def gradients(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Gradients:
        """The first half of a step: the gradients, clipped, the losses `[E]` and the new buffers, in fresh memory."""
        return self._gradients(params, self._work(params, batch, buffers, kwargs), {})

    def update(
        self, params: EnsembleParams, found: Gradients, buffers: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The second half of a step: update `params` in place.

        Args:
            params: the parameters of the ensemble.
            found: what `gradients` returned for them.
            buffers: those that `gradients` was given. Members that have stopped keep them.

        Returns: the new buffers.
        """
        trained = self._trained(params)
        check_found(found, trained.params, buffers)
        trained.check_stopped(self.stopped, params.E)
        Update(self.optimizer, trained)(found.gradients, self.stopped)
        return self._keep_stopped(found.buffers, buffers)

    @torch.no_grad()  # torch.func computes the gradients, so autograd must record nothing
    def _gradients(self, params: EnsembleParams, work: Work, scratch: dict[str, Tensor]) -> Gradients:
        """The gradients of all members for the whole batch, clipped; `scratch` holds memory for them."""

        def of_all(work: Work) -> Gradients:
            size = _at_a_time(self, params, work)
            if size >= params.E:
                return self._compute(params.E, work, False)
            return collected(by_parts(self._compute, self._objective, params, work, size), work, scratch)

        if self._accumulate == 1:
            found = of_all(work)
        else:
            found = accumulated(of_all, work, self._accumulate, *self._objective.row_axes(params.E, work.batch))
        return found._replace(gradients=self._clipped(found.gradients, params))

    @torch.no_grad()
    def _compute(self, E: int, work: Work, prepared: bool) -> Gradients:
        """The objective, compiled where that is asked for."""
        if self._options is None:
            return self._objective(E, work, prepared)
        if self._compiled is not None:
            self.forward.tell_kept()  # an eager call does that itself, and the first one is eager too
        else:
            from functorch_ens._compile import Compiled  # not at the top: it imports torch's compiler

            self._compiled = Compiled(
                self._objective,
                self._options,
                made=[*self.forward.made, self.forward.known, self._objective.losses],
                keeps_layouts=lambda E, work, prepared: self.forward.convolves_members(work.trained, work.fixed),
                situation=lambda E, work, _: (self.forward.strategy, self._objective.losses.strategy, *work.modes),
            )
        return self._compiled(E, work, prepared)

    def _work(
        self,
        params: EnsembleParams,
        batch: tuple[Any, ...],
        buffers: Mapping[str, Tensor] | None,
        kwargs: dict[str, Any],
        modes: Modes | None = None,
    ) -> Work:
        self.forward.refresh()
        if self.forward.revision != self._revision:
            self._compiled, self._revision, self._sizes = None, self.forward.revision, {}
        trained = self._trained(params)
        values = check_values(self._values, params.E)
        return Work(trained.params, trained.fixed, buffers, values, batch, kwargs, modes or self.forward.modes())

    def _clipped(self, gradients: dict[str, Tensor], params: EnsembleParams) -> dict[str, Tensor]:
        return gradients if self._clip is None else clipped(gradients, params.stacked, self.stopped, *self._clip)

    def _keep_stopped(self, new: dict[str, Tensor], buffers: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The new buffers; members that have stopped keep their old ones."""
        stopped = sorted(self.stopped)
        if not stopped or buffers is None:
            return new
        new = {name: buffer.clone() for name, buffer in new.items()}
        for name, buffer in new.items():
            buffer[stopped] = buffers[name][stopped]
        return new


Look = Callable[[int, Tensor], None]
"""`look(first, losses)`: sees the losses `[k]` of the members from `first` on."""


def advance(
    step: TrainStep,
    params: EnsembleParams,
    batch: tuple[Any, ...],
    buffers: Mapping[str, Tensor] | None,
    kwargs: dict[str, Any],
    *,
    modes: Modes | None = None,
    look: Look | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One whole step: the losses of all members, and the new buffers.

    `modes` says which modules are in training mode; None: as the model says now. `look` is called with the losses of
    members before these are updated. Members that it adds to `step.stopped` are not updated.
    """
    work = step._work(params, batch, buffers, kwargs, modes)
    clips_whole = step._clip is not None and step._clip[1] == "ensemble"
    if step._accumulate == 1 and not clips_whole:
        trained, size = step._trained(params), _at_a_time(step, params, work)
        if size < params.E and can_be_parted(step.optimizer, trained):
            return _advance_by_parts(step, params, trained, work, size, look)
    found = step._gradients(params, work, step._scratch)
    if look is not None:
        look(0, found.losses)
    return found.losses, step.update(params, found, buffers)


def _advance_by_parts(
    step: TrainStep, params: EnsembleParams, trained: Trained, work: Work, size: int, look: Look | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A whole step, each part updated before the next is computed: one part's gradients are in memory at a time."""
    update = Update(step.optimizer, trained)
    losses: list[Tensor] = []
    new = {name: torch.empty_like(buffer) for name, buffer in (work.buffers or {}).items()}
    for rows, found in by_parts(step._compute, step._objective, params, work, size):
        losses.append(found.losses.clone())
        if look is not None:
            look(rows.start, losses[-1])
        trained.check_stopped(step.stopped, params.E)
        update(step._clipped(found.gradients, params), step.stopped, rows)
        for name, value in found.buffers.items():
            new[name][rows] = value
        del found  # frees its memory before the next part is computed
    return torch.cat(losses), step._keep_stopped(new, work.buffers)


def gradients_in_place(
    step: TrainStep, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
) -> Gradients:
    """`step.gradients`, but in memory that the next step writes to again."""
    return step._gradients(params, step._work(params, batch, buffers, kwargs), step._scratch)


def _plan(step: TrainStep, params: EnsembleParams) -> Plan:
    """The plan by which the forward computes the members in a step."""
    return step.forward.plan if step.compiled_by == "eager" else step.forward.compiled_plan(params)


def _at_a_time(step: TrainStep, params: EnsembleParams, work: Work) -> int:
    """How many members to compute at a time, of this batch."""
    plan, forward, E = _plan(step, params), step.forward, params.E
    if not forward.chooses_size or plan.at_a_time(E) == 1 or plan.randomness != "different":
        return plan.at_a_time(E)
    numbers = sum(x.numel() for x in take_apart((work.batch, work.kwargs))[0])
    kind = (E, numbers.bit_length(), plan.strategy)
    if kind not in step._sizes:
        step._sizes[kind] = step._objective.choose_size(work)
    return plan.of_size(step._sizes[kind]).at_a_time(E)
