"""The first half of a train step: the gradients of all members, and functions around their computation.

`Objective` computes them and is the only code that gets compiled. The other functions call it, or a compiled form of
it, for the parts of a batch, or for some members after others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad

from functorch_ens._torch import pytree
from functorch_ens.checks import check_keys, check_mapping, shown
from functorch_ens.forward.call import check_member_axis
from functorch_ens.forward.forward import Forward
from functorch_ens.forward.template import Modes
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.rng import drawing_apart
from functorch_ens.training.losses import Loss, MemberLosses
from functorch_ens.training.optim import with_strides_of
from functorch_ens.trees import cut_rows, members, take_apart


class Prepare(Protocol):
    """`prepare(*batch)` returns a tuple: the inputs of the model, and then the target."""

    def __call__(self, *batch: Any) -> tuple[Any, ...]: ...


class Gradients(NamedTuple):
    """What a train step computes before it updates the parameters."""

    gradients: dict[str, Tensor]
    """The gradients of the summed (or averaged) losses, by the name of the parameter."""
    losses: Tensor
    """The loss of each member, `[E]`."""
    buffers: dict[str, Tensor]
    """The new buffers, `{name: [E, ...]}`."""


def check_found(found: Any, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> None:
    """TypeError or ValueError where `found` are not `Gradients` of these parameters and buffers."""
    if not isinstance(found, Gradients):
        raise TypeError(f"found: expected Gradients (from step.gradients), got {shown(found)}")
    check_mapping(found.gradients, "found: gradients", "a dict of tensors")
    for name, gradient in found.gradients.items():
        tensor = params.stacked.get(name, params.shared.get(name))
        if tensor is None:
            raise ValueError(f"found: expected gradients of what is trained, got one of {name}")
        if not isinstance(gradient, Tensor) or gradient.layout is not torch.strided:
            raise TypeError(f"found: expected a strided tensor for {name}, got {shown(gradient)}")
        if gradient.shape != tensor.shape or gradient.dtype != tensor.dtype or gradient.device != tensor.device:
            raise ValueError(
                f"found: expected {list(tensor.shape)}, {tensor.dtype}, on {tensor.device} for {name}, got "
                f"{list(gradient.shape)}, {gradient.dtype}, on {gradient.device}"
            )
    if buffers is None:
        return
    if not isinstance(buffers, Mapping):
        raise TypeError(f"buffers: expected a dict (from ensemble_buffers), got {shown(buffers)}")
    check_keys(buffers, found.buffers, "buffers: those of found")
    for name, buffer in found.buffers.items():
        old = buffers[name]
        if not isinstance(old, Tensor) or old.layout is not torch.strided:
            raise TypeError(f"buffers: expected a strided tensor for {name}, got {shown(old)}")
        if old.shape != buffer.shape or old.dtype != buffer.dtype or old.device != buffer.device:
            raise ValueError(
                f"buffers: expected {list(buffer.shape)}, {buffer.dtype}, on {buffer.device} for {name}, got "
                f"{list(old.shape)}, {old.dtype}, on {old.device}"
            )


class Work(NamedTuple):
    """The arguments of one computation of gradients."""

    trained: EnsembleParams
    fixed: EnsembleParams
    buffers: Mapping[str, Tensor] | None
    values: dict[str, Tensor]
    """Keyword arguments of the loss, one value for each member: `{name: [E, ...]}`."""
    batch: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: Modes
    """Which modules of the model are in training mode."""

    def part(self, rows: slice, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
        """The members `rows`: their slices of every stacked tensor, with their `batch` and `kwargs`."""
        trained, fixed = (p._replace(stacked=members(p.stacked, rows)) for p in (self.trained, self.fixed))
        buffers = None if self.buffers is None else members(dict(self.buffers), rows)
        return Work(trained, fixed, buffers, members(self.values, rows), batch, kwargs, self.modes)


Compute = Callable[[int, Work, bool], Gradients]
"""`Objective.__call__`, compiled or not."""


class Objective:
    """The losses of all members and their gradients, as one pure function: forward, loss, reduction, autocast."""

    def __init__(
        self,
        forward: Forward,
        loss: Loss,
        reduction: str,
        prepare: Prepare | None,
        autocast: torch.dtype | None,
        member_targets: bool,
    ) -> None:
        self.forward = forward
        self.losses = MemberLosses(loss)
        self.member_targets = member_targets or forward.member_inputs
        self._reduction = reduction
        self._prepare = prepare
        self._autocast = autocast
        self._keywords = forward.keywords()

    def __call__(self, E: int, work: Work, prepared: bool) -> Gradients:
        """The gradients of the members in `work`, by plain autograd: all that `.backward()` trains is trained.

        Args:
            E: the number of members of the whole ensemble, by which `reduction="mean"` divides.
            work: what to compute with; some of the members, or all.
            prepared: whether `prepare` has been called on the batch already.
        """
        return self.by_autograd(self.total, E, work, prepared)

    def row_axes(self, E: int, batch: tuple[Any, ...]) -> tuple[int, int | None]:
        """The axis of the rows in a batch, and in its last entry where that is the target `[E, B, ...]`."""
        axis = int(self.forward.member_inputs)
        if axis or not self.member_targets or not batch:
            return axis, None
        if self._prepare is None:
            return 0, 1
        inputs, targets = take_apart(batch[:-1])[0], take_apart(batch[-1])[0]  # prepare may make the target of others
        rows = inputs[0].shape[:1] if inputs else ()
        is_target = bool(rows and targets) and all(y.shape[:2] == (E, *rows) for y in targets)
        return 0, 1 if is_target else None

    def by_autograd(self, total: Callable[..., Any], E: int, work: Work, prepared: bool) -> Gradients:
        """The same, from what `total`, `self.total` or a compiled form of it, returns."""
        trained = EnsembleParams(*({name: _leaf(x) for name, x in tensors.items()} for tensors in work.trained))
        with torch.enable_grad():
            value, losses, new = total(E, work._replace(trained=trained), prepared)
        tensors = {**trained.shared, **trained.stacked}
        if tensors and not value.requires_grad:
            raise ValueError(
                "loss: it has no gradient, so nothing would be trained; is it, or the output, detached, or computed "
                "under torch.no_grad() or torch.inference_mode()?"
            )
        slopes = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, materialize_grads=True)
        found = dict(zip(tensors, slopes, strict=True)) if tensors else {}
        return _laid_out(work, found, losses.detach(), {name: buffer.detach() for name, buffer in new.items()})

    def by_grad(self, E: int, work: Work, prepared: bool) -> Gradients:
        """The same by `torch.func.grad`: torch.compile makes one graph of it, and of both passes."""

        def total(trained: EnsembleParams) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            value, losses, new = self.total(E, work._replace(trained=trained), True)
            return value, (losses, new)

        if not prepared:
            work = work._replace(batch=self.prepared(work.batch))
        slopes, (losses, new) = grad(total, has_aux=True)(work.trained)
        return _laid_out(work, {**slopes.shared, **slopes.stacked}, losses, new)

    def disagreement(self, got: Gradients, want: Gradients, random: bool, arguments: tuple[Any, ...]) -> str:
        """Names of gradients in which `got`, compiled, differs from `want`, eager, by more than rounding; "" if none.

        Where random numbers were drawn, compiled code may have drawn others. Then only a gradient that is 0 on one side
        alone is a disagreement. Deep networks amplify rounding: how much, is seen from parameters moved by a rounding.
        """
        E, work, prepared = arguments
        dtypes = [self._autocast or tensor.dtype for tensors in work.trained for tensor in tensors.values()]
        eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        bound = 0.01 if eps < 1e-4 else 0.2
        far = {name: distance for name, distance in _distances(got, want).items() if distance > bound}
        if random:
            far = {
                name: 1.0
                for name in far
                if name != "loss" and bool(got.gradients[name].any()) != bool(want.gradients[name].any())
            }
        elif far:
            moved = EnsembleParams(*({n: x * (1 + eps) for n, x in tensors.items()} for tensors in work.trained))
            noise = _distances(self(E, work._replace(trained=moved), prepared), want)
            far = {name: distance for name, distance in far.items() if distance > 10 * noise.get(name, 0.0)}
        return (
            f"of {', '.join(far)} it differs from plain autograd by {max(far.values()):.2g} of the norm" if far else ""
        )

    def total(self, E: int, work: Work, prepared: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The summed (or averaged) losses, the losses `[E]` and the new buffers."""
        params, inputs, kwargs, target = self._arguments(work, prepared)
        buffers = work.buffers
        with self._precision(params.stacked.values()):
            outputs = self.forward.called(params, inputs, kwargs, buffers, work.modes, whole=True)
            outputs, new = (outputs, {}) if buffers is None else outputs
            if self._autocast is not None:  # torch's autocast does this for losses, but not inside vmap
                outputs = pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype == self._autocast else x, outputs)
            losses = self.losses(outputs, target, member_targets=self.member_targets, values=work.values)
        return losses.sum() if self._reduction == "sum" else losses.sum() / E, losses, new

    @torch.no_grad()
    def choose_size(self, work: Work) -> int | None:
        """How many members to compute at a time, by the forward's `chunk_size="auto"`; `prepare` is called for it."""
        tensors = [*work.trained.stacked.values(), *work.fixed.stacked.values()]
        with drawing_apart(tensors, hand_back=False):
            params, inputs, kwargs, _ = self._arguments(work, prepared=False)
        with self._precision(tensors):
            return self.forward.choose_size(params, inputs, kwargs, work.buffers, work.modes)

    def _arguments(self, work: Work, prepared: bool) -> tuple[EnsembleParams, tuple[Any, ...], dict[str, Any], Any]:
        """The parameters, the inputs and keyword arguments of the forward, and the target."""
        trained, fixed, kwargs = work.trained, work.fixed, work.kwargs
        *inputs, target = work.batch if prepared else self.prepared(work.batch)
        if len(inputs) == 1 and isinstance(inputs[0], Mapping) and self._keywords.take(inputs[0], kwargs):
            inputs, kwargs = [], {**kwargs, **inputs[0]}
        params = EnsembleParams({**fixed.shared, **trained.shared}, {**fixed.stacked, **trained.stacked})
        return params, tuple(inputs), kwargs, target

    @property
    def prepares(self) -> bool:
        """Whether `prepare` makes the inputs and the target of a batch."""
        return self._prepare is not None

    def prepared(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """`prepare(*batch)`, or the batch itself: the inputs of the model, and then the target."""
        if self._prepare is not None:
            batch = self._prepare(*batch)
        if not isinstance(batch, tuple) or not batch:
            where = "the batch" if self._prepare is None else "prepare: the batch that it returns"
            raise TypeError(f"{where}: expected a tuple, the inputs of the model and the target, got {shown(batch)}")
        return batch

    def _precision(self, tensors: Iterable[Tensor]) -> Any:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(next(iter(tensors)).device.type, dtype=self._autocast)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _laid_out(work: Work, slopes: dict[str, Tensor], losses: Tensor, buffers: dict[str, Tensor]) -> Gradients:
    """These results, each gradient with the strides of its parameter."""
    tensors = {**work.trained.shared, **work.trained.stacked}
    gradients = {name: with_strides_of(tensors[name], slope) for name, slope in slopes.items()}
    return Gradients(gradients, losses, buffers)


def _distances(got: Gradients, want: Gradients) -> dict[str, float]:
    """How far the losses, and each gradient that counts, are apart, as a part of the larger norm; 1 where one is 0."""
    pairs = {"loss": (got.losses, want.losses), **{n: (got.gradients[n], want.gradients[n]) for n in want.gradients}}
    norms = {name: max(float(_norm(one)), float(_norm(other))) for name, (one, other) in pairs.items()}
    least = 1e-3 * max(norms[name] for name in want.gradients) if want.gradients else 0.0
    return {
        name: float(_norm(pairs[name][0].double() - pairs[name][1].double())) / norm
        for name, norm in norms.items()
        if math.isfinite(norm) and norm > (0.0 if name == "loss" else least)
    }


def _norm(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).abs().norm()


def accumulated(
    compute: Callable[[Work], Gradients], work: Work, parts: int, axis: int, target_axis: int | None = None
) -> Gradients:
    """The mean of the gradients of `parts` equal parts of the batch, and the buffers after the last.

    Args:
        compute: the gradients of one part.
        work: the whole; keyword tensors with as many rows as the batch are cut along with it.
        parts: how many.
        axis: that of the rows.
        target_axis: that of the rows of the last entry of the batch, where it is another one.

    Raises: ValueError where the tensors of the batch have no common length that is a multiple of `parts`.
    """
    *inputs, target = work.batch if target_axis is not None else (*work.batch, ())
    axes = [(each, axis) for each in take_apart(inputs)[0]]
    axes += [(each, target_axis) for each in take_apart(target)[0] if target_axis is not None]
    lengths = [tensor.shape[at] if tensor.ndim > at else None for tensor, at in axes]
    length = lengths[0] if lengths else None
    if length is None or any(each != length for each in lengths) or length % parts:
        raise ValueError(
            f"accumulate: expected tensors with one length that is a multiple of {parts} on axis {axis}"
            f", got the shapes {[list(tensor.shape) for tensor, _ in axes]}"
        )
    size = length // parts
    inputs, kwargs = (cut_rows(each, length, size, axis) for each in (inputs, work.kwargs))
    targets = None if target_axis is None else cut_rows(target, length, size, target_axis)
    total: Gradients | None = None
    for i in range(parts):
        batch = (*inputs[i], *([] if targets is None else [targets[i]]))
        buffers = work.buffers if total is None else total.buffers
        found = compute(work._replace(batch=batch, kwargs=kwargs[i], buffers=work.buffers and buffers))
        # Out of place: the next computation may write to the memory of these results.
        shares = {name: value / parts for name, value in found.gradients.items()}
        losses = found.losses / parts
        if total is not None:
            shares = {name: value + total.gradients[name] for name, value in shares.items()}
            losses = losses + total.losses
        total = Gradients(shares, losses, {name: buffer.clone() for name, buffer in found.buffers.items()})
    assert total is not None
    return total


def by_parts(
    compute: Compute, objective: Objective, params: EnsembleParams, work: Work, size: int
) -> Iterator[tuple[slice, Gradients]]:
    """The gradients of `size` members at a time: one graph serves all parts, and its memory is that of one part.

    Use or copy a part before the next is asked for: CUDA graphs write the results of the next into the same memory.
    """
    forward = objective.forward
    E = forward.check(params, work.buffers, work.modes)  # here, because slices hide a member axis that is too long
    with torch.no_grad():
        # Once for all parts: `prepare` may be random, and its index may pick the members' own data.
        batch = objective.prepared(work.batch)
    *inputs, target = batch
    given, form = take_apart((inputs, work.kwargs))
    targets, target_form = take_apart(target)
    if forward.member_inputs:
        check_member_axis(given, E)
    if objective.member_targets:
        check_member_axis(targets, E, "y", "member_targets=True" if not forward.member_inputs else "member_inputs=True")
    for start in range(0, E, size):
        rows = slice(start, min(start + size, E))
        some, kwargs = form.rebuild(iter(members(given, rows) if forward.member_inputs else given))
        own = target_form.rebuild(iter(members(targets, rows) if objective.member_targets else targets))
        with torch.no_grad():  # Dynamo warns of slices that have a history
            part = work.part(rows, (*some, own), kwargs)
        yield rows, compute(E, part, True)


def collected(parts: Iterator[tuple[slice, Gradients]], work: Work, scratch: dict[str, Tensor]) -> Gradients:
    """The gradients of all members, put together from `parts`.

    Stacked ones are written to `scratch`, which the next call may use again: fresh large allocations page-fault on
    every step.
    """
    for name, tensor in work.trained.stacked.items():
        if name not in scratch or not _alike(scratch[name], tensor):
            scratch[name] = torch.empty_like(tensor)
    gradients = {name: scratch[name] for name in work.trained.stacked}
    losses: list[Tensor] = []
    new = {name: torch.empty_like(buffer) for name, buffer in (work.buffers or {}).items()}
    for rows, found in parts:
        losses.append(found.losses.clone())
        for whole, values in ((gradients, found.gradients), (new, found.buffers)):
            for name, value in values.items():
                if name not in work.trained.shared:
                    whole[name][rows] = value
                elif name in whole:
                    whole[name] += value
                else:
                    whole[name] = value.clone()
        del found  # frees its memory before the next part is computed
    return Gradients(gradients, torch.cat(losses), new)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
