"""The loss of every member of an ensemble, by the ordinary loss of one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from functorch_ens.checks import check_of_members
from functorch_ens.trees import take_apart


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
    """The loss of each member, `[E]`, by the ordinary `loss` of one network, without a Python loop.

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
            empty, one of `values` is not `[E, ...]`, `loss` returns more than one number, or a label is out of range.
    """
    stacked, form = take_apart(outputs)
    given, target_form = take_apart(targets)
    axis = stacked + given if member_targets else stacked
    if len({tuple(tensor.shape[:1]) for tensor in axis}) != 1 or axis[0].ndim == 0:
        raise ValueError(
            "outputs: expected tensors with one leading member axis [E, ...], got the shapes "
            f"{[list(tensor.shape) for tensor in axis]}"
        )
    if axis[0].shape[0] and not any(tensor.numel() for tensor in stacked):
        shapes = [list(tensor.shape) for tensor in stacked]
        raise ValueError(f"outputs: an empty batch has no loss, got the shapes {shapes}")
    own = check_values(values, axis[0].shape[0])

    def of_one(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        output = form.rebuild(rest)
        target = target_form.rebuild(rest if member_targets else iter(given))
        value: Any = loss(output, *target, **dict(zip(own, rest, strict=True)))
        if not isinstance(value, Tensor):
            raise TypeError(f"loss: expected a tensor, got {value!r}")
        return value

    try:
        losses = vmap(of_one, randomness="different")(*axis, *own.values())
    except Exception as error:
        if len(stacked) == len(given) == 1:
            _check_labels(given[0], stacked[0], int(member_targets))
            if not member_targets and stacked[0].shape[:1] == given[0].shape[:1] != stacked[0].shape[1:2]:
                raise ValueError(
                    "outputs: expected members first, and then the rows of the target, [E, B, ...]; one network's are "
                    f"outputs[None]; got outputs {list(stacked[0].shape)} and a target {list(given[0].shape)}"
                ) from error
        error.add_note(
            "functorch_ens: this is the loss of one member, called with outputs[i] of the shapes "
            f"{[list(tensor.shape[1:]) for tensor in stacked]}; a loss that takes numbers, and not tensors, cannot use "
            "values=; functorch_ens.cross_entropy can"
        )
        raise
    if losses.ndim != 1:
        raise ValueError(
            f"loss: expected one number for a member, got a tensor of shape {list(losses.shape[1:])}; "
            'reduce it, as reduction="mean" does in torch.nn.functional'
        )
    return losses


def check_values(values: Mapping[str, Tensor] | None, E: int | None = None) -> dict[str, Tensor]:
    """`values` as a dict; TypeError or ValueError where they are not `{name: [E, ...]}`, for any E if that is None."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"values: expected a dict of tensors [E, ...], got {values!r}")
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
    if not isinstance(label_smoothing, Tensor) and not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 <= it <= 1, got {label_smoothing!r}")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    log_probs = (logits / temperature).log_softmax(1)
    counted = y != -100
    even = torch.where(counted, log_probs.mean(1), 0).sum() / counted.sum()
    return (1 - label_smoothing) * F.nll_loss(log_probs, y) - label_smoothing * even
