"""The loss of every member of an ensemble, by the ordinary loss of one network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from functorch_ens._torch import has_symbolic_sizes, is_compiling
from functorch_ens.checks import (
    advice,
    check_bool,
    check_callable,
    check_number,
    check_of_members,
    check_tensor,
    first_line,
    kind_of,
    shown,
)
from functorch_ens.forward.failures import is_of_vmap, is_transient
from functorch_ens.forward.watch import Notes, watched_vmap
from functorch_ens.rng import RandomState, drawing_apart
from functorch_ens.trees import take_apart

log = logging.getLogger(__name__)


EXPECTED = "a function of one member's output and y"


class Loss(Protocol):
    """The loss of one network: `loss(output, *targets, **values)`, a scalar tensor, such as `F.cross_entropy`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


def member_losses(
    loss: Loss,
    outputs: Any,
    *targets: Any,
    member_targets: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The loss of each member, `[E]`, by the ordinary `loss` of one network.

    vmap computes all members at once. Where it cannot serve `loss`, a loop over the members does.

    >>> import torch, functorch_ens as fe
    >>> logits, y = torch.zeros(5, 7, 3), torch.zeros(7, dtype=torch.long)
    >>> fe.member_losses(torch.nn.functional.cross_entropy, logits, y).shape
    torch.Size([5])

    Args:
        loss: `loss(output_of_one_member, *targets)`, a scalar.
        outputs: what a forward returned: `[E, B, C]`, or any pytree or dataclass of tensors `[E, ...]`.
        targets: any pytrees of tensors `[B, ...]`, the same for every member.
        member_targets: True: every target is `[E, B, ...]`, and member i gets `[i]`.
        values: keyword arguments of `loss` with one value for each member, `{name: [E, ...]}`, such as
            `{"label_smoothing": torch.linspace(0, 0.2, E)}` for `functorch_ens.cross_entropy`.

    Raises:
        TypeError: `loss` returns no tensor.
        ValueError: tensors in `outputs` (or, with `member_targets`, in `targets`) differ in their leading axis or are
            empty, one of `values` is not `[E, ...]`, `loss` returns more than one number, a label is out of range, or a
            target is `[E, B, ...]` without `member_targets`.
    """
    if not is_compiling():
        check_callable(loss, "loss", EXPECTED, ["output", *("y" for _ in targets)] if values is None else None)
        check_bool(member_targets, "member_targets")
        _check_trees(outputs, *targets)
    return MemberLosses(loss, logging.DEBUG)(outputs, *targets, member_targets=member_targets, values=values)


def _check_trees(outputs: Any, *targets: Any) -> None:
    """TypeError or ValueError where one of these is not a pytree of strided tensors, or has none."""
    for argument, tree in (("outputs", outputs), *(("targets", target) for target in targets)):
        tensors, _ = take_apart(tree)
        if not tensors:
            raise TypeError(
                f"{argument}: expected a tensor, or a pytree of them, got {shown(tree)}{advice(tree, argument)}"
            )
        for tensor in tensors:
            check_tensor(tensor, argument)


class MemberLosses:
    """`member_losses` of one `loss`: by vmap, or by a loop over the members once vmap has failed in the loss."""

    strategy = "vmap"
    """The strategy in use: `"vmap"` or `"loop"`."""
    reason = ""
    """Why it is the loop; "" where it is not."""

    def __init__(self, loss: Loss, level: int = logging.WARNING) -> None:
        self._loss = loss
        self._level = level
        self._unwatched: set[Hashable] = set()

    def __call__(
        self,
        outputs: Any,
        *targets: Any,
        member_targets: bool = False,
        values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of each member, `[E]`, as `member_losses` describes."""
        stacked, form = take_apart(outputs)
        given, target_form = take_apart(targets)
        E = _count(stacked, given if member_targets else [])
        if not member_targets:
            _check_not_of_members(stacked, given)
        own = check_values(values, E)
        # vmap has no right rule for some losses of a stack and a target that all members share.
        mapped = [member_targets or target.is_floating_point() for target in given]
        shared = [target for target, of_one in zip(given, mapped, strict=True) if not of_one]
        apart = [
            target if member_targets else target.expand(E, *target.shape)
            for target, of_one in zip(given, mapped, strict=True)
            if of_one
        ]

        def of_one(*tensors: Tensor) -> Tensor:
            rest, constant = iter(tensors), iter(shared)
            output = form.rebuild(rest)
            target = target_form.rebuild(iter([next(rest if each else constant) for each in mapped]))
            value: Any = self._loss(output, *target, **dict(zip(own, rest, strict=True)))
            if not isinstance(value, Tensor):
                raise TypeError(f"loss: expected a tensor, got {value!r}")
            return value

        try:
            losses = self._computed(of_one, [*stacked, *apart, *own.values()])
        except Exception as error:
            if len(stacked) == len(given) == 1:
                _check_labels(given[0], stacked[0], int(member_targets))
                if not member_targets and stacked[0].shape[:1] == given[0].shape[:1] != stacked[0].shape[1:2]:
                    raise ValueError(
                        "outputs: expected members first, and then the rows of the target, [E, B, ...]; one network's "
                        f"are outputs[None]; got outputs {list(stacked[0].shape)} and a target {list(given[0].shape)}"
                    ) from error
            if not is_transient(error):
                error.add_note(
                    "functorch_ens: this is the loss of one member, called with outputs[i] of the shapes "
                    f"{[list(tensor.shape[1:]) for tensor in stacked]}; a loss that takes numbers, and not tensors, "
                    "cannot use values=; functorch_ens.cross_entropy can"
                )
            raise
        if losses.ndim != 1:
            raise ValueError(
                f"loss: expected one number for a member, got a tensor of shape {list(losses.shape[1:])}; "
                'reduce it, as reduction="mean" does in torch.nn.functional'
            )
        return losses

    def _computed(self, of_one: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        """The losses of all members, by the strategy in use; and by the loop where vmap cannot serve the loss."""
        compiling = is_compiling()
        if self.strategy == "loop" or (compiling and has_symbolic_sizes(tensors)):  # vmap makes a graph for each size
            return _by_loop(of_one, tensors)
        if compiling:
            return vmap(of_one, randomness="different")(*tensors)
        situation = torch.is_grad_enabled(), *((str(x.shape), x.dtype, x.requires_grad) for x in tensors)
        notes = None if situation in self._unwatched else Notes()
        before = RandomState.of(tensors)
        try:
            with nullcontext() if notes is None else drawing_apart(tensors):
                losses: Tensor = watched_vmap(of_one, tensors, randomness="different", notes=notes)
        except Exception as error:
            if not is_of_vmap(error):
                raise
            failure = error
        else:
            if notes is not None and not notes.are_needed:
                self._unwatched.add(situation)
            return losses
        if notes is None and not before.equals(RandomState.of(tensors)):
            before.restore()
        try:
            losses = _by_loop(of_one, tensors)
        except Exception as error:
            raise error from None  # the loss itself raises it
        self.strategy = "loop"
        self.reason = f"the loss is computed by a loop over the members, for vmap failed in it: {first_line(failure)}"
        log.log(self._level, "%s", self.reason)
        return losses


def _by_loop(of_one: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
    return torch.stack([of_one(*of_member) for of_member in zip(*(each.unbind() for each in tensors), strict=True)])


def _count(outputs: list[Tensor], targets: list[Tensor]) -> int:
    """The number of members, from the leading axis of these tensors; ValueError where they have none in common."""
    first = outputs[0].shape[0] if outputs and outputs[0].ndim else None
    if first is None or any(tensor.ndim == 0 or tensor.shape[0] != first for tensor in outputs):
        shapes = [list(tensor.shape) for tensor in outputs]
        raise ValueError(f"outputs: expected tensors with one leading member axis [E, ...], got the shapes {shapes}")
    if any(tensor.ndim == 0 or tensor.shape[0] != first for tensor in targets):
        shapes = [list(tensor.shape) for tensor in targets]
        raise ValueError(
            f"targets, member_targets: expected tensors with the leading member axis of the outputs, [{first}, ...], "
            f"got the shapes {shapes}"
        )
    if first == 0:
        raise ValueError(f"outputs: expected at least one member, got the shapes {[list(x.shape) for x in outputs]}")
    if not any(tensor.numel() for tensor in outputs):
        shapes = [list(tensor.shape) for tensor in outputs]
        raise ValueError(f"outputs: an empty batch has no loss, got the shapes {shapes}")
    return first


def _check_not_of_members(outputs: list[Tensor], targets: list[Tensor]) -> None:
    """ValueError where a target is `[E, B, ...]`: it would broadcast, and every member would learn from all of it."""
    if len(outputs) != 1 or outputs[0].ndim < 2 or is_compiling():
        return
    E, B, *rest = outputs[0].shape
    for target in targets:
        can_be_rows = E == B and prod(rest) != 1
        if target.ndim >= 2 and target.shape[:2] == (E, B) and target.shape != (B, *rest) and not can_be_rows:
            raise ValueError(
                f"y: got {list(target.shape)} for outputs {list(outputs[0].shape)}, as if every member had its own; "
                "member_targets=True gives member i y[i]; targets that all members share are [B, ...]"
            )


def check_values(values: Mapping[str, Tensor] | None, E: int | None = None) -> dict[str, Tensor]:
    """`values` as a dict; TypeError or ValueError where they are not `{name: [E, ...]}`, for any E if that is None."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):  # not check_mapping: in compiled code each function is another guard
        raise TypeError(f"values: expected a dict of tensors [E, ...], got {kind_of(values)}")
    return {name: check_of_members(value, E, f"values[{name!r}]") for name, value in values.items()}


def _check_labels(labels: Tensor, logits: Tensor, member_axis: int) -> None:
    """ValueError, which names the first, where class labels are out of range. Classes are on axis 1 of one member.

    torch.nn.functional ignores the label -100.
    """
    if labels.is_floating_point() or logits.ndim < 3 or labels.ndim != logits.ndim - 2 + member_axis:
        return
    classes = logits.shape[2]
    wrong = torch.nonzero(((labels < 0) | (labels >= classes)) & (labels != -100))
    if len(wrong):
        first = wrong[0].tolist()
        raise ValueError(
            f"labels: expected 0 <= y < {classes}, the classes of the logits, got {labels[tuple(first)]} at {first}"
        ) from None


def cross_entropy(
    logits: Tensor, y: Tensor, *, label_smoothing: Tensor | float = 0.0, temperature: Tensor | float = 1.0
) -> Tensor:
    """The cross-entropy of one network; its hyperparameters may be tensors, so that members can differ in them.

    >>> import torch, functorch_ens as fe
    >>> logits, y = torch.zeros(5, 7, 3), torch.zeros(7, dtype=torch.long)
    >>> values = {"label_smoothing": torch.tensor([0, 0.1, 0.2, 0.3, 0.4])}
    >>> fe.member_losses(fe.cross_entropy, logits, y, values=values).shape
    torch.Size([5])

    Args:
        logits: `[B, C]`, or `[B, C, ...]`.
        y: class labels `[B]`, or `[B, ...]`, integers; rows with the label -100 are left out.
        label_smoothing: the share of the target that is spread evenly over all C classes, from 0 to 1.
        temperature: divides the logits, > 0.

    Returns: the mean over the rows, a scalar.
    Raises: ValueError where `label_smoothing` or `temperature` is a number out of range. Tensors are not checked.
    Source: Szegedy et al. 2016, arXiv:1512.00567, as in `torch.nn.functional.cross_entropy`.
    """
    if not is_compiling():  # where each check may become a guard
        _check_logits_and_labels(logits, y)
        if _number(label_smoothing, "label_smoothing") > 1:
            raise ValueError(f"label_smoothing: expected 0 <= it <= 1, got {label_smoothing!r}")
        if not _number(temperature, "temperature", otherwise=1.0):
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    log_probs = _divided(logits, temperature).log_softmax(1)
    loss = F.nll_loss(log_probs, y.long())
    if not isinstance(label_smoothing, Tensor):
        if label_smoothing == 0:
            return loss
        spread = log_probs
    else:
        spread = torch.where(label_smoothing == 0, 0, log_probs)  # 0 times the -inf of an excluded class is nan
    counted = y != -100
    even = torch.where(counted, spread.mean(1), 0).sum() / counted.sum()
    return (1 - label_smoothing) * loss - label_smoothing * even


def _check_logits_and_labels(logits: Any, y: Any) -> None:
    """TypeError or ValueError where `logits` are not `[B, C, ...]` of one network, or `y` not integers `[B, ...]`."""
    check_tensor(logits, "logits", "a floating tensor")
    check_tensor(y, "y", "a tensor of classes")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating tensor, got one of {logits.dtype}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y: expected classes of an integer dtype, got {y.dtype}")
    if logits.ndim < 2 or y.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            "logits, y: expected logits [B, C, ...] of one network and y [B, ...], got the shapes "
            f"{list(logits.shape)} and {list(y.shape)}"
        )
    if y.device != logits.device:
        raise ValueError(f"y: expected the device of the logits, {logits.device}, got {y.device}")


def _number(value: Any, argument: str, otherwise: float = 0.0) -> float:
    """`value` where it is a number >= 0; `otherwise` where it is one in a tensor, which is not read."""
    if not isinstance(value, Tensor):
        return check_number(value, argument, minimum=0.0)
    if value.ndim or value.is_complex() or value.dtype == torch.bool or value.layout is not torch.strided:
        raise ValueError(
            f"{argument}: expected a number or a 0-d tensor, got {shown(value)} of {value.dtype}; values= of "
            "member_losses and make_train_step gives each member one of its own"
        )
    return otherwise


def _divided(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """`logits / temperature`, in which an excluded class, of logit -inf, gives `temperature` no gradient."""
    if not isinstance(temperature, Tensor):
        return logits / temperature
    excluded = logits.isneginf()
    return torch.where(excluded, logits, torch.where(excluded, 0, logits) / temperature)
