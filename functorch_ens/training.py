"""Training over the member axis: the loss of every member, and a compiled step of gradients and optimiser."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch._dynamo
import torch._inductor
from torch import Tensor
from torch.func import grad, vmap
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from functorch_ens.call import check_member_axis
from functorch_ens.checks import check_option
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
        return loss(form.rebuild(iter(output)), *target_form.rebuild(iter(target)))

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
        go to the model. The first call is computed once without the compiler, where errors are the model's own.

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
        for name, gradient in gradients.items():
            tensors[name].grad = gradient
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
        new = None if buffers is None else dict(buffers)
        plan = self._forward.compiled_plan(params) if self._compiles else self._forward.plan
        size = 1 if plan.strategy == "loop" else plan.chunk_size or params.E
        with torch.no_grad():  # torch.func takes the gradients: autograd has nothing to record
            if size >= params.E or plan.randomness != "different":
                return self._run(params.E, trained, fixed, new, batch, kwargs)
            E = self._forward.check(params, buffers)  # whole, since a part does not show what is too long
            return self._in_parts(size, E, trained, fixed, new, batch, kwargs)

    def _split(self, params: EnsembleParams) -> tuple[EnsembleParams, EnsembleParams]:
        """The parameters that the optimiser trains, and the others."""
        if not isinstance(params, EnsembleParams):
            raise TypeError(f"params: expected EnsembleParams, got {type(params).__name__}")
        mine = {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}
        names = {id(tensor): name for part in params for name, tensor in part.items()}
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
        buffers: dict[str, Tensor] | None,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The gradients of `size` members at a time: in memory is what these need, and one graph serves all parts."""

        def cut(tensors: Any, start: int) -> Any:
            return tree_map(lambda x: x[start : start + size] if isinstance(x, Tensor) else x, tensors)

        if self._forward.member_inputs:
            check_member_axis(take_apart((batch, kwargs))[0], E)
        gradients: dict[str, list[Tensor]] = {}
        losses, new = [], []
        for start in range(0, E, size):
            mine = (params._replace(stacked=cut(params.stacked, start)) for params in (trained, fixed))
            given = cut((batch, kwargs), start) if self._forward.member_inputs else (batch, kwargs)
            some, loss, states = self._run(E, *mine, cut(buffers, start), *given)
            for name, gradient in some.items():
                if name in trained.shared and name in gradients:
                    gradients[name][0] += gradient
                else:
                    gradients.setdefault(name, []).append(gradient)
            losses.append(loss)
            new.append(states)
        whole = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in gradients.items()}
        return whole, torch.cat(losses), {name: torch.cat([states[name] for states in new]) for name in new[0]}

    def _run(self, *arguments: Any) -> Any:
        """`_gradients`, by the compiler where that is wanted and works."""
        return self._start(arguments) if self._compiles and self._first else self._compute(*arguments)

    def _gradients(
        self,
        E: int,
        trained: EnsembleParams,
        fixed: EnsembleParams,
        buffers: dict[str, Tensor] | None,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        *inputs, target = batch if self._prepare is None else self._prepare(*batch)

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
        before = RandomState.of(arguments[1])
        plain = self._gradients(*arguments)
        after = RandomState.of(arguments[1])
        before.restore()
        self._first = False
        compiled = torch.compile(
            MethodType(_with_own_code(TrainStep._gradients), self), **self._options_for(arguments[1])
        )
        try:
            result = compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self._options.get("fullgraph") and not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            log.warning("torch.compile does not work here, so training goes on without it: %s", reason)
            after.restore()
            self._compiles = False
            return plain
        self._compute = compiled
        return result

    def _options_for(self, trained: EnsembleParams) -> dict[str, Any]:
        """Those of torch.compile: what was given, and what is known to be faster."""
        options = dict(self._options)
        extra = dict(options.pop("options", None) or {})
        if mode := options.pop("mode", None):  # torch.compile takes a mode or options, but a mode is a name for some
            extra = {**torch._inductor.list_mode_options(mode, options.get("dynamic")), **extra}
        on_cpu = all(tensor.device.type == "cpu" for tensor in tree_leaves(trained))
        if on_cpu and self._forward.compiled_plan(trained).strategy == "loop" and "backend" not in options:
            # A weight that serves one member's rows is not worth a change of its layout before each convolution.
            extra.setdefault("layout_optimization", False)
        theirs = extra.get("guard_filter_fn", lambda guards: [True] * len(guards))

        def needed(guards: Sequence[Any]) -> list[bool]:
            kept = zip(guards, theirs(guards), strict=True)
            return [keep and not _FIXED.search(guard.name) for guard, keep in kept]

        return {**options, "options": {**extra, "guard_filter_fn": needed}}


# What torch.compile would look at before every call, and never finds changed: what a forward has made for itself, and
# the code of this package and of torch. There are a thousand such guards, which take longer than a small step.
_FIXED = re.compile(
    r"\._forward\._(expected|norms|convolutions|template\._(module|pristine|aliases|pairs\[\d+\]\[1\]))"
    r"|^G\['(?!__)|^G\['__(import_(torch|functorch_ens|einops|contextlib)|builtins)|^__import__\("
)


def _with_own_code(function: Any) -> Any:
    """A copy of `function`: what torch.compile makes is kept by code, and without guards one model is like another."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


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
