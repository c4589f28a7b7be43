"""Training over the member axis: the loss of every member, and a compiled step of gradients and optimiser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.func import grad, vmap
from torch.optim import Optimizer

from functorch_ens.call import check_member_axis
from functorch_ens.checks import check_option
from functorch_ens.compiling import compiled_method
from functorch_ens.forward import Forward
from functorch_ens.params import EnsembleParams
from functorch_ens.randomness import RandomState
from functorch_ens.trees import take_apart

log = logging.getLogger(__name__)

# The devices that have fused kernels for those optimisers of torch.optim that take `fused`.
_FUSED_DEVICES = ("cpu", "cuda")


def member_losses(loss: Callable[..., Tensor], outputs: Any, *targets: Any, member_targets: bool = False) -> Tensor:
    """The loss of each member, `[E]`, by the ordinary `loss` of one network, without a Python loop.

    >>> import torch, functorch_ens as fe
    >>> logits, y = torch.zeros(5, 7, 3), torch.zeros(7, dtype=torch.long)
    >>> fe.member_losses(torch.nn.functional.cross_entropy, logits, y).shape
    torch.Size([5])

    Args:
        loss: `loss(output_of_one_member, *targets)`, a scalar.
        outputs: what a forward returned: `[E, B, C]`, or any pytree or dataclass of tensors `[E, ...]`.
        targets: for every member the same, `[B, ...]`; any pytrees.
        member_targets: True where every target is `[E, B, ...]`, member i's being `[i]`.

    Raises:
        ValueError: a tensor in `outputs` (or, with `member_targets`, in `targets`) has another leading axis than the
            first, or `loss` returns more than one number for a member.
    """
    stacked, form = take_apart(outputs)
    given, target_form = take_apart(targets)
    axis = stacked + given if member_targets else stacked
    if len({tuple(tensor.shape[:1]) for tensor in axis}) != 1 or axis[0].ndim == 0:
        raise ValueError(
            "outputs: expected tensors with one leading member axis [E, ...], got the shapes "
            f"{[list(tensor.shape) for tensor in axis]}"
        )

    def of_one(output: list[Tensor], target: list[Tensor]) -> Tensor:
        value: Any = loss(form.rebuild(iter(output)), *target_form.rebuild(iter(target)))
        if not isinstance(value, Tensor):
            raise TypeError(f"loss: expected a tensor, got {value!r}")
        return value

    losses = vmap(of_one, in_dims=(0, 0 if member_targets else None), randomness="different")(stacked, given)
    if losses.ndim != 1:
        raise ValueError(
            f"loss: expected one number for a member, got a tensor of shape {list(losses.shape[1:])}; "
            'reduce it, as reduction="mean" does in torch.nn.functional'
        )
    return losses


def make_train_step(
    forward: Forward,
    loss: Callable[..., Tensor],
    optimizer: Optimizer,
    *,
    reduction: str = "sum",
    prepare: Callable[..., tuple[Any, ...]] | None = None,
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
        optimizer: any of `torch.optim` over tensors of the parameters that are trained, all or some of them; it is
            only asked for `step()`, so schedulers work as ever. Groups that leave `fused` open get it where torch has
            a fused kernel for them.
        reduction: of the members' losses, for the gradients. `"sum"`: every member of a classic ensemble learns as it
            would alone. `"mean"`: the usual loss of a BatchEnsemble; r and s then get 1/E of the gradient.
        prepare: what is done with a batch first, inside the compiled graph: `prepare(*batch)` returns the inputs of
            the model and then the target. With the data held on the device and an index as the batch,
            `lambda i: (images[i].float() / 255, labels[i])`.
        compile: True compiles; a dict holds options for `torch.compile` (`{"mode": "reduce-overhead"}`, CUDA graphs);
            False does not. Where no compiler works, or not for this model, a warning says so, and the step goes on
            without.

    Returns:
        `step(params, *inputs, y, buffers=None, **kwargs)`: `params` are updated in place, as torch.optim does it, and
        the loss of each member before the update, `[E]`, is returned, with `buffers=` also the new buffers. `kwargs`
        go to the model. A parameter that a batch does not use has a gradient of zero. The first call is computed once
        without the compiler too, where errors are the model's own: torch's global random state is that of one call.
        With a loop, or a `chunk_size`, the members are gone through in parts, and `prepare` is called before, once.

    Raises:
        TypeError, ValueError: here, for arguments of the wrong kind; by `step`, where the optimiser holds tensors that
            are not in `params`, where `loss` gives more than a number, and as `forward` does.
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
    if not isinstance(compile, bool | Mapping):
        raise TypeError(f"compile: expected True, False or options of torch.compile, got {compile!r}")
    return TrainStep(forward, loss, optimizer, reduction, prepare, compile)


class TrainStep:
    """What `make_train_step` returns: call it as `step(params, *inputs, y, buffers=None, **kwargs)`."""

    def __init__(
        self,
        forward: Forward,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        reduction: str,
        prepare: Callable[..., tuple[Any, ...]] | None,
        compile: bool | Mapping[str, Any],
    ) -> None:
        self._forward = forward
        self._loss = loss
        self._optimizer = optimizer
        self._reduction = reduction
        self._prepare = prepare
        self._compute = self._gradients
        self._options = {} if compile is True or compile is False else dict(compile)
        self._compiles = compile is not False
        self._first = True
        _use_fused_kernels(optimizer)

    def __call__(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """The loss of each member, `[E]`, before `params` are updated; with `buffers`, also the new ones."""
        gradients, losses, new = self.gradients(params, *batch, buffers=buffers, **kwargs)
        tensors = {**params.shared, **params.stacked}
        places = set()
        for name, gradient in gradients.items():  # two may be one tensor (of a + b), which a hook could clip twice
            tensors[name].grad = gradient.clone() if gradient.data_ptr() in places else gradient
            places.add(gradient.data_ptr())
        try:
            self._optimizer.step()
        finally:
            for name in gradients:
                tensors[name].grad = None
        return losses if buffers is None else (losses, new)

    def gradients(
        self, params: EnsembleParams, /, *batch: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """What a step computes before it updates: by name the gradients, and the losses `[E]` and new buffers."""
        trained, fixed = self._split(params)
        plan = self._forward.compiled_plan(params) if self._compiles else self._forward.plan
        size = 1 if plan.strategy == "loop" else plan.chunk_size or params.E
        with torch.no_grad():  # torch.func takes the gradients: autograd has nothing to record
            if size >= params.E or plan.randomness != "different":
                return self._run(params.E, trained, fixed, buffers, batch, kwargs, False)
            E = self._forward.check(params, buffers)  # whole, since a part does not show what is too long
            return self._in_parts(size, E, trained, fixed, buffers, batch, kwargs)

    def _split(self, params: EnsembleParams) -> tuple[EnsembleParams, EnsembleParams]:
        """The parameters that the optimiser trains, and the others."""
        if not isinstance(params, EnsembleParams):
            raise TypeError(f"params: expected EnsembleParams, got {type(params).__name__}")
        mine = {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}
        names = {id(tensor): name for part in params for name, tensor in part.items()}
        if len(names) != len(params.shared) + len(params.stacked):
            raise ValueError(
                "params: one tensor has two names; tied parameters have one, as named_parameters() gives it"
            )
        strange = len(mine - names.keys())
        if strange:
            raise ValueError(
                f"params: the optimizer trains {strange} of its {len(mine)} tensors elsewhere: they are not in these "
                "params; make it from their tensors, tree_leaves(params)"
            )
        chosen = {names[i] for i in mine}
        trained, fixed = (
            EnsembleParams(
                *({k: v for k, v in part.items() if (k in chosen and v.requires_grad) is keep} for part in params)
            )
            for keep in (True, False)
        )
        return trained, fixed

    def _in_parts(
        self,
        size: int,
        E: int,
        trained: EnsembleParams,
        fixed: EnsembleParams,
        buffers: Mapping[str, Tensor] | None,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """The gradients of `size` members at a time: in memory is what these need, and one graph serves all parts."""
        batch = self._prepared(batch)  # once: it may draw random numbers, and its index may be one for all members
        inputs, form = take_apart((batch, kwargs))
        if self._forward.member_inputs:
            check_member_axis(inputs, E)
        gradients = {name: torch.empty_like(tensor) for name, tensor in trained.stacked.items()}
        losses: list[Tensor] = []
        new = {name: torch.empty_like(buffer) for name, buffer in (buffers or {}).items()}
        for start in range(0, E, size):
            part = slice(start, start + size)
            mine = (
                params._replace(stacked={name: stack[part] for name, stack in params.stacked.items()})
                for params in (trained, fixed)
            )
            states = None if buffers is None else {name: buffer[part] for name, buffer in buffers.items()}
            given = form.rebuild(iter(x[part] if self._forward.member_inputs else x for x in inputs))
            some, loss, states = self._run(E, *mine, states, *given, True)
            # Copies: what a part returns may be shared, or be memory that the next part writes to (CUDA graphs).
            losses.append(loss.clone())
            for whole, parts in ((gradients, some), (new, states)):
                for name, value in parts.items():
                    if name not in trained.shared:
                        whole[name][part] = value
                    elif name in whole:
                        whole[name] += value
                    else:
                        whole[name] = value.clone()
        return gradients, torch.cat(losses), new

    def _prepared(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of the model, and then the target."""
        if self._prepare is not None:
            batch = self._prepare(*batch)
        if not isinstance(batch, tuple) or not batch:
            where = "the batch" if self._prepare is None else "prepare: the batch that it returns"
            raise TypeError(f"{where}: expected the inputs of the model and then the target, a tuple, got {batch!r}")
        return batch

    def _run(self, *arguments: Any) -> Any:
        """`_gradients`, by the compiler where that is wanted and works."""
        return self._start(arguments) if self._compiles and self._first else self._compute(*arguments)

    def _gradients(
        self,
        E: int,
        trained: EnsembleParams,
        fixed: EnsembleParams,
        buffers: Mapping[str, Tensor] | None,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
        prepared: bool,
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        *inputs, target = batch if prepared else self._prepared(batch)

        def total(trained: EnsembleParams) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            params = EnsembleParams({**fixed.shared, **trained.shared}, {**fixed.stacked, **trained.stacked})
            outputs = self._forward(params, *inputs, buffers=buffers, **kwargs)
            outputs, new = (outputs, {}) if buffers is None else outputs
            losses = member_losses(self._loss, outputs, target, member_targets=self._forward.member_inputs)
            return losses.sum() if self._reduction == "sum" else losses.sum() / E, (losses, new)

        slopes, (losses, new) = grad(total, has_aux=True)(trained)
        tensors, slopes = ({**params.shared, **params.stacked} for params in (trained, slopes))
        return {name: _with_strides_of(tensors[name], slope) for name, slope in slopes.items()}, losses, new

    def _start(self, arguments: tuple[Any, ...]) -> Any:
        """The first call: once as it is, for the model's own errors and the choice of a strategy, and then compiled."""
        tensors = take_apart(arguments)[0]
        before = RandomState.of(tensors)
        plain = self._gradients(*arguments)
        after = RandomState.of(tensors)
        before.restore()
        options = dict(self._options)
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        if on_cpu and self._forward.compiled_plan(arguments[1]).strategy == "loop" and "backend" not in options:
            # A weight that serves one member's rows is not worth a change of its layout before each convolution.
            options["options"] = {"layout_optimization": False, **(options.get("options") or {})}
        compiled = compiled_method(self._gradients, options)
        try:
            result = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it has just been computed, so the error is the compiler's
            if self._options.get("fullgraph") and not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            log.warning("torch.compile does not work here, so training goes on without it: %s", reason)
            after.restore()
            self._compiles = False
            return plain
        self._first = False
        self._compute = compiled
        return result


def _with_strides_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` laid out as its parameter: Adam's fused kernel for CPUs goes wrong on any other, and says nothing."""
    if parameter.is_contiguous():
        return gradient.contiguous()
    return torch.empty_like(parameter).copy_(gradient)


def _use_fused_kernels(optimizer: Optimizer) -> None:
    """Turn `fused` on where it was left open, as torch itself does not on a CPU."""
    if optimizer.state:  # kept as the unfused step has begun it
        return
    for group in optimizer.param_groups:
        open_to_it = "fused" in group and group["fused"] is None and not group["foreach"]
        served = all(tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES for tensor in group["params"])
        if open_to_it and served and not group.get("differentiable"):
            group["fused"] = True
