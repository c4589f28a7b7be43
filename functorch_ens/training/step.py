"""A step of training for all members at once: gradients, compiled, and any optimiser of torch.optim."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.func import grad
from torch.optim import Optimizer

from functorch_ens._compile.ahead import compiled_method, compiled_on_cpu
from functorch_ens.checks import check_number, check_option, check_positive_int, shown
from functorch_ens.forward.call import check_member_axis
from functorch_ens.forward.forward import Forward
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.rng import RandomState
from functorch_ens.training.losses import check_values, member_losses
from functorch_ens.training.optim import Trained, clipped, use_fused_kernels, with_strides_of
from functorch_ens.training.update import Update, can_be_parted
from functorch_ens.trees import take_apart

log = logging.getLogger(__name__)


def make_train_step(
    forward: Forward,
    loss: Callable[..., Tensor],
    optimizer: Optimizer,
    *,
    reduction: str = "sum",
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    values: Mapping[str, Tensor] | None = None,
    clip_norm: float | None = None,
    clip_by: str = "member",
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    compile: bool | Mapping[str, Any] = True,
) -> TrainStep:
    """A step of training for all members at once: gradients, optimiser and buffers; the gradients compiled.

    >>> import torch, functorch_ens as fe
    >>> from torch.utils._pytree import tree_leaves
    >>> model = torch.nn.Linear(3, 2)
    >>> params = fe.batchensemble_params(model, E=5)
    >>> optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    >>> step = fe.make_train_step(fe.make_forward(model), torch.nn.functional.mse_loss, optimizer, compile=False)
    >>> step(params, torch.ones(7, 3), torch.ones(7, 2)).shape
    torch.Size([5])

    Args:
        forward: from `make_forward`; with `member_inputs=True` the targets are `[E, B, ...]` too.
        loss: `loss(output_of_one_member, y)`, the ordinary loss of one network, a scalar (`F.cross_entropy`).
        optimizer: any of `torch.optim` over tensors of the parameters that are trained, all or some of them, or over
            the groups of `param_groups`; it is only asked for `step()`, so schedulers work as ever. Groups that leave
            `fused` open get it where torch has a fused kernel for them.
        reduction: of the members' losses, for the gradients. `"sum"`: every member of a classic ensemble learns as it
            would alone. `"mean"`: the usual loss of a BatchEnsemble; r and s then get 1/E of the gradient.
        prepare: what is done with a batch first, inside the compiled graph: `prepare(*batch)` returns the inputs of
            the model and then the target. With the data held on the device and an index as the batch,
            `lambda i: (images[i].float() / 255, labels[i])`.
        values: keyword arguments of `loss` of which each member has its own, `{name: [E, ...]}`, as `member_losses`
            takes them.
        clip_norm: the largest norm of the gradients; larger ones are scaled down to it.
        clip_by: what has this norm: `"member"`, the gradients of each member, as it would be alone, and together those
            of what all share; or `"ensemble"`, all of them together.
        accumulate: go through a batch in so many equal parts, and average their gradients: the memory is that of one
            part. Tensors of the batch are cut along the axis B; `kwargs` go to each part whole. (A loss that leaves
            rows out, or weights them, is then a mean of means.)
        autocast: the lower precision, `torch.bfloat16`, of the forward and the loss; parameters and gradients keep
            theirs.
        compile: True compiles; a dict holds options for `torch.compile` (`{"mode": "reduce-overhead"}`, CUDA graphs);
            False does not. Where no compiler works, or not for this model, a warning says so, and the step goes on
            without.

    Returns:
        `step(params, *inputs, y, buffers=None, **kwargs)`: `params` are updated in place, as torch.optim does it, and
        the loss of each member before the update, `[E]`, is returned, with `buffers=` also the new buffers. `kwargs`
        go to the model. A parameter that a batch does not use has a gradient of zero. The first call is computed once
        without the compiler too, where errors are the model's own: torch's global random state is that of one call.
        With a loop, or a `chunk_size`, the members are gone through in parts, and `prepare` is called before, once.
        A part of a classic ensemble is updated as soon as its gradients are known, and those of other parts are not in
        memory, where a member's tensors are large (128 KiB on average) and the optimiser computes number by number (one
        without hooks, and not with `accumulate` or `clip_by="ensemble"`). Then the loss must not read what others have,
        and an error in a later part leaves the earlier ones updated.
        `step.stopped.add(2)` ends the training of member 2 of a classic ensemble; the others go on.

    Raises:
        TypeError, ValueError: here, for arguments of the wrong kind; by `step`, where the optimiser holds tensors that
            are not in `params`, where `loss` gives more than a number, where a label is out of range, and as `forward`
            does.
    """
    if not isinstance(forward, Forward):
        raise TypeError(f"forward: expected the forward of an ensemble (from make_forward), got {forward!r}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function of one member's output and y, got {loss!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected an optimizer of torch.optim, got {optimizer!r}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: got LBFGS, whose step computes the loss again and again; it has no single step")
    check_option(reduction, ("sum", "mean"), "reduction")
    if prepare is not None and not callable(prepare):
        raise TypeError(f"prepare: expected a function of the batch, got {prepare!r}")
    for name, value in check_values(values).items():
        check_option(value.requires_grad, (False,), f"values[{name!r}].requires_grad")
    if clip_norm is not None and not check_number(clip_norm, "clip_norm", minimum=0.0):
        raise ValueError(f"clip_norm: expected a number > 0, got {clip_norm!r}")
    check_option(clip_by, ("member", "ensemble"), "clip_by")
    check_option(autocast, (None, torch.bfloat16), "autocast")
    if not isinstance(compile, bool | Mapping):
        raise TypeError(f"compile: expected True, False or options of torch.compile, got {compile!r}")
    return TrainStep(
        forward,
        loss,
        optimizer,
        reduction=reduction,
        prepare=prepare,
        values=dict(values or {}),
        clip=None if clip_norm is None else (float(clip_norm), clip_by),
        accumulate=check_positive_int(accumulate, "accumulate"),
        autocast=autocast,
        compile=compile,
    )


class _Work(NamedTuple):
    """What gradients are computed of: parameters, and a batch."""

    trained: EnsembleParams
    fixed: EnsembleParams
    buffers: Mapping[str, Tensor] | None
    values: dict[str, Tensor]
    batch: tuple[Any, ...]
    kwargs: dict[str, Any]

    def part(self, rows: slice, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> _Work:
        """For the members `rows`: what is theirs of every stack, and what they are called with."""

        def of(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: stack[rows] for name, stack in stacks.items()}

        trained, fixed = (params._replace(stacked=of(params.stacked)) for params in (self.trained, self.fixed))
        buffers = None if self.buffers is None else of(self.buffers)
        return _Work(trained, fixed, buffers, of(self.values), batch, kwargs)


class Gradients(NamedTuple):
    """What a train step computes before it updates."""

    gradients: dict[str, Tensor]
    """By the name of the parameter."""
    losses: Tensor
    """The loss of each member, `[E]`."""
    buffers: dict[str, Tensor]
    """The new ones, `{name: [E, ...]}`."""


class TrainStep:
    """What `make_train_step` returns: call it as `step(params, *inputs, y, buffers=None, **kwargs)`."""

    forward: Forward
    optimizer: Optimizer
    """Those that it was made with."""
    stopped: set[int]
    """Members, of an ensemble that shares nothing that is trained, whose parameters and buffers stay as they are. (What
    an optimiser computes over a whole stack counts them still; `param_groups` parts them.)"""

    def __init__(
        self,
        forward: Forward,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        *,
        reduction: str,
        prepare: Callable[..., tuple[Any, ...]] | None,
        values: dict[str, Tensor],
        clip: tuple[float, str] | None,
        accumulate: int,
        autocast: torch.dtype | None,
        compile: bool | Mapping[str, Any],
    ) -> None:
        self.forward = forward
        self.optimizer = optimizer
        self.stopped = set()
        self._loss = loss
        self._reduction = reduction
        self._prepare = prepare
        self._values = values
        self._clip = clip
        self._accumulate = accumulate
        self._autocast = autocast
        self._known: tuple[list[Any], Trained] | None = None
        self._scratch: dict[str, Tensor] = {}
        self._compute = self._gradients
        self._options = {} if compile is True or compile is False else dict(compile)
        self._compiles = compile is not False
        self._first = True
        use_fused_kernels(optimizer)

    def __call__(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """The loss of each member, `[E]`, before `params` are updated; with `buffers`, also the new ones."""
        losses, new = self.run(params, batch, buffers, kwargs)
        return losses if buffers is None else (losses, new)

    def run(
        self,
        params: EnsembleParams,
        batch: tuple[Any, ...],
        buffers: Mapping[str, Tensor] | None,
        kwargs: dict[str, Any],
        look: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A step: the losses of all members, and the new buffers.

        Before members are updated `look(first, losses)` sees their losses, those of the members from `first` on; which
        of these it adds to `stopped` are left as they are.
        """
        work, size = self._work(params, batch, buffers, kwargs), self._part_size(params)
        by_member = self._clip is None or self._clip[1] == "member"
        if size < params.E and by_member and self._accumulate == 1:
            trained = self.trained(params)
            if can_be_parted(self.optimizer, trained):
                return self._in_updated_parts(size, params, trained, work, look)
        found = self._found(params, work, self._scratch)
        if look is not None:
            look(0, found.losses)
        return found.losses, self.update(params, found, buffers)

    def update(
        self, params: EnsembleParams, found: Gradients, buffers: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The second half of a step: `params` are updated in place, and the new buffers returned.

        Args:
            params: the ensemble's.
            found: what `gradients` found of it.
            buffers: what `gradients` was given: members that have stopped keep theirs.
        """
        trained = self.trained(params)
        self._check_stopped(params.E, trained)
        Update(self.optimizer, trained)(found.gradients, self.stopped)
        return self._without_stopped(found.buffers, buffers)

    def _check_stopped(self, E: int, trained: Trained) -> None:
        shared, stopped = trained.params.shared, sorted(self.stopped)
        if stopped and shared:
            raise ValueError(
                f"stopped: members {stopped} cannot stop alone, for all share trained tensors, such as "
                f"{next(iter(shared))}"
            )
        if not all(isinstance(member, Integral) and 0 <= member < E for member in stopped):
            raise ValueError(f"stopped: expected numbers of members, from 0 to {E - 1}, got {stopped}")

    def _without_stopped(self, new: dict[str, Tensor], buffers: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The new buffers, but those of before for members that have stopped."""
        stopped = sorted(self.stopped)
        if not stopped or buffers is None:
            return new
        new = {name: buffer.clone() for name, buffer in new.items()}
        for name, buffer in new.items():
            buffer[stopped] = buffers[name][stopped]
        return new

    def gradients(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Gradients:
        """What a step computes before it updates: the gradients, clipped, the losses `[E]` and the new buffers."""
        return self._found(params, self._work(params, batch, buffers, kwargs), {})

    def compute(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Gradients:
        """The first half of a step: `gradients`, but in memory that the next step writes to again."""
        return self._found(params, self._work(params, batch, buffers, kwargs), self._scratch)

    def _found(self, params: EnsembleParams, work: _Work, scratch: dict[str, Tensor]) -> Gradients:
        with torch.no_grad():
            found = self._accumulated(params, work, scratch)
            return found._replace(gradients=self._clipped(found.gradients, params))

    def _work(
        self,
        params: EnsembleParams,
        batch: tuple[Any, ...],
        buffers: Mapping[str, Tensor] | None,
        kwargs: dict[str, Any],
    ) -> _Work:
        trained = self.trained(params)
        return _Work(trained.params, trained.fixed, buffers, check_values(self._values, params.E), batch, kwargs)

    def _clipped(self, gradients: dict[str, Tensor], params: EnsembleParams) -> dict[str, Tensor]:
        if self._clip is None:
            return gradients
        return clipped(gradients, params.stacked, self.stopped, *self._clip)

    def trained(self, params: EnsembleParams) -> Trained:
        """What the optimiser trains of `params`, looked up again where either has other tensors."""
        if not isinstance(params, EnsembleParams):
            raise TypeError(f"params: expected EnsembleParams, got {type(params).__name__}")
        given = [(name, id(t), t.data_ptr(), t.requires_grad) for part in params for name, t in part.items()]
        held = [id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]]
        if self._known is None or self._known[0] != [given, held]:
            self._known = [given, held], Trained(self.optimizer, params)
        return self._known[1]

    def _accumulated(self, params: EnsembleParams, work: _Work, scratch: dict[str, Tensor]) -> Gradients:
        """The mean of what the parts of a batch give, and the buffers after the last."""
        if self._accumulate == 1:
            return self._by_plan(params, work, scratch)
        tensors, form = take_apart(work.batch)
        axis = int(self.forward.member_inputs)
        length = {tensor.shape[axis] if tensor.ndim > axis else None for tensor in tensors}
        if len(length) != 1 or (size := length.pop()) is None or size % self._accumulate:
            raise ValueError(
                f"accumulate: expected tensors with one length that is a multiple of {self._accumulate} on axis {axis}"
                f", got the shapes {[list(tensor.shape) for tensor in tensors]}"
            )
        total: Gradients | None = None
        for some in zip(*(tensor.chunk(self._accumulate, axis) for tensor in tensors), strict=True):
            batch, buffers = form.rebuild(iter(some)), work.buffers if total is None else total.buffers
            found = self._by_plan(params, work._replace(batch=batch, buffers=work.buffers and buffers), scratch)
            shares = {name: value / self._accumulate for name, value in found.gradients.items()}
            losses = found.losses / self._accumulate
            if total is not None:  # new tensors: what a part returns may be memory that the next one writes to
                shares = {name: value + total.gradients[name] for name, value in shares.items()}
                losses = losses + total.losses
            total = Gradients(shares, losses, {name: buffer.clone() for name, buffer in found.buffers.items()})
        assert total is not None
        return total

    def _part_size(self, params: EnsembleParams) -> int:
        """How many members are computed at a time; E where they are not parted."""
        plan = self.forward.compiled_plan(params) if self._compiles else self.forward.plan
        size = 1 if plan.strategy == "loop" else plan.chunk_size or params.E
        return size if plan.randomness == "different" else params.E

    def _by_plan(self, params: EnsembleParams, work: _Work, scratch: dict[str, Tensor]) -> Gradients:
        size = self._part_size(params)
        if size >= params.E:
            return self._run(params.E, work, False)
        return self._in_parts(size, params, work, scratch)

    def _parts(self, size: int, params: EnsembleParams, work: _Work) -> Iterator[tuple[slice, Gradients]]:
        """The gradients of `size` members at a time: in memory is what these need, and one graph serves all parts.

        The next one may write to the memory of a part (CUDA graphs): it is to be used, or copied, before.
        """
        E = self.forward.check(params, work.buffers)  # whole, since a part does not show what is too long
        with torch.no_grad():
            batch = self._prepared(work.batch)  # once: it may draw random numbers, and an index may be for all members
        inputs, form = take_apart((batch, work.kwargs))
        if self.forward.member_inputs:
            check_member_axis(inputs, E)
        for start in range(0, E, size):
            rows = slice(start, min(start + size, E))
            given = form.rebuild(iter(x[rows] if self.forward.member_inputs else x for x in inputs))
            yield rows, self._run(E, work.part(rows, *given), True)

    def _in_parts(self, size: int, params: EnsembleParams, work: _Work, scratch: dict[str, Tensor]) -> Gradients:
        """The gradients of all members, part by part.

        They are collected in `scratch`: large tensors come from the system page by page, at each step anew.
        """
        for name, tensor in work.trained.stacked.items():
            if name not in scratch or not _alike(scratch[name], tensor):
                scratch[name] = torch.empty_like(tensor)
        gradients = {name: scratch[name] for name in work.trained.stacked}
        losses: list[Tensor] = []
        new = {name: torch.empty_like(buffer) for name, buffer in (work.buffers or {}).items()}
        for rows, found in self._parts(size, params, work):
            losses.append(found.losses.clone())
            for whole, parts in ((gradients, found.gradients), (new, found.buffers)):
                for name, value in parts.items():
                    if name not in work.trained.shared:
                        whole[name][rows] = value
                    elif name in whole:
                        whole[name] += value
                    else:
                        whole[name] = value.clone()
            del found  # its memory is for the next part
        return Gradients(gradients, torch.cat(losses), new)

    def _in_updated_parts(
        self,
        size: int,
        params: EnsembleParams,
        trained: Trained,
        work: _Work,
        look: Callable[[int, Tensor], None] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A whole step, part by part: no gradients are copied, and those of other parts are not in memory."""
        update = Update(self.optimizer, trained)
        losses: list[Tensor] = []
        new = {name: torch.empty_like(buffer) for name, buffer in (work.buffers or {}).items()}
        for rows, found in self._parts(size, params, work):
            losses.append(found.losses.clone())
            if look is not None:
                look(rows.start, losses[-1])
            self._check_stopped(params.E, trained)
            update(self._clipped(found.gradients, params), self.stopped, rows)
            for name, value in found.buffers.items():
                new[name][rows] = value
            del found  # its memory is for the next part
        return torch.cat(losses), self._without_stopped(new, work.buffers)

    def _prepared(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of the model, and then the target."""
        if self._prepare is not None:
            batch = self._prepare(*batch)
        if not isinstance(batch, tuple) or not batch:
            where = "the batch" if self._prepare is None else "prepare: the batch that it returns"
            raise TypeError(f"{where}: expected a tuple, the inputs of the model and the target, got {shown(batch)}")
        return batch

    @torch.no_grad()  # torch.func takes the gradients: autograd has nothing to record
    def _run(self, *arguments: Any) -> Gradients:
        """`_gradients`, by the compiler where that is wanted and works."""
        if self._compiles and self._first:
            return self._start(arguments, self._options)
        try:
            return self._compute(*arguments)
        except torch._dynamo.exc.TorchDynamoException:
            if not self._compiles:
                raise
        except RuntimeError as error:
            if self._compiles and "out of bounds" in str(error):
                self._gradients(*arguments)  # which says what is
            raise
        # The first call worked, so sizes are new; torch takes them for symbols, with which it may not come far.
        return self._start(arguments, {"dynamic": False, **self._options})

    def _gradients(self, E: int, work: _Work, prepared: bool) -> Gradients:
        trained, fixed, buffers, values, batch, kwargs = work
        *inputs, target = batch if prepared else self._prepared(batch)

        def total(trained: EnsembleParams) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            params = EnsembleParams({**fixed.shared, **trained.shared}, {**fixed.stacked, **trained.stacked})
            with self._precision(params.stacked.values()):
                outputs = self.forward(params, *inputs, buffers=buffers, **kwargs)
                outputs, new = (outputs, {}) if buffers is None else outputs
                own = self.forward.member_inputs
                losses = member_losses(self._loss, outputs, target, member_targets=own, values=values)
            return losses.sum() if self._reduction == "sum" else losses.sum() / E, (losses, new)

        slopes, (losses, new) = grad(total, has_aux=True)(trained)
        tensors, slopes = ({**params.shared, **params.stacked} for params in (trained, slopes))
        laid_out = {name: with_strides_of(tensors[name], slope) for name, slope in slopes.items()}
        return Gradients(laid_out, losses, new)

    def _precision(self, tensors: Iterable[Tensor]) -> Any:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(next(iter(tensors)).device.type, dtype=self._autocast)

    def _start(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Gradients:
        """A first call: once as it is, for the model's own errors and the choice of a strategy, and then compiled."""
        tensors = take_apart(arguments)[0]
        before = RandomState.of(tensors)
        plain = self._gradients(*arguments)
        after = RandomState.of(tensors)
        before.restore()
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors) and "backend" not in options
        try:
            if on_cpu:
                loop = self.forward.compiled_plan(arguments[1].trained).strategy == "loop"
                compiled, result = compiled_on_cpu(self._gradients, options, loop, arguments)
            else:
                compiled = compiled_method(self._gradients, options)
                result = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it has just been computed, so the error is the compiler's
            if options.get("fullgraph") and not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            log.warning("torch.compile does not work here, so training goes on without it: %s", reason)
            after.restore()
            self._compiles, self._compute = False, self._gradients
            return plain
        self._first = False
        self._compute = compiled
        return result


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
