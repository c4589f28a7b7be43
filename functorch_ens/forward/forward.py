"""`make_forward`: the forward of an ensemble as one pure function of its parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from functorch_ens.anatomy import parameter_sites
from functorch_ens.checks import check_bool, check_option, check_positive_int
from functorch_ens.forward.call import Call, update_lost
from functorch_ens.forward.run import Plan, run
from functorch_ens.forward.template import Template
from functorch_ens.layers.operators import SIDES
from functorch_ens.params.fits import Expected
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.rng import RandomState

log = logging.getLogger(__name__)

# Modules that vmap cannot serve, and what they call.
_LOOP_ONLY: dict[type[nn.Module], str] = {
    nn.RNNBase: "a fused RNN kernel, which vmap has no rule for",
    nn.RReLU: "aten::rrelu, which vmap has no rule for",
    nn.CrossMapLRN2d: "an autograd.Function that torch.func cannot follow",
    nn.AdaptiveLogSoftmaxWithLoss: "operations that depend on the values of its target",
}


def make_forward(
    model: nn.Module,
    *,
    strategy: str = "auto",
    chunk_size: int | None = None,
    randomness: str = "different",
    member_inputs: bool = False,
    rank1_side: str = "auto",
) -> Forward:
    """Build the forward of an ensemble of `model`, a pure function of the ensemble's parameters.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> forward = fe.make_forward(model)
    >>> forward(fe.batchensemble_params(model, E=5), torch.ones(7, 3)).shape
    torch.Size([5, 7, 2])

    Args:
        model: the network; it is only read. Its structure is read now, its training mode at each call. What is wrapped
            by torch.compile is taken as it was written: compile the forward instead.
        strategy: `"vmap"` computes all members at once; `"loop"` one after another, which works for any model; `"auto"`
            takes vmap, or the loop where vmap cannot serve the model. The choice is logged, and is `forward.strategy`;
            `forward.reason` says why.
        chunk_size: how many members are computed at once, or gone through before the next ones; None is all. Also what
            a backward pass keeps in memory is that of `chunk_size` members: the others' is computed again when it is
            needed, for the time of one more forward. (Inside `torch.compile` nothing is computed again.)
        randomness: `"different"` dropout for every member, the `"same"`, or `"error"` where anything is random.
        member_inputs: False gives every input `[B, ...]` to each member. True: every tensor input is `[E, B, ...]`, and
            member i gets `[i]`.
        rank1_side: where a layer's `s` is multiplied in: on what enters it (`"activation"`), on its weight
            (`"weight"`, which multiplies `W * (r s^T)` out), or, `"auto"`, on the input, unless that is the same for
            all members and has more numbers than the weight. The results are equal up to rounding.

    Returns:
        `forward(params, *args, buffers=None, **kwargs)`, which calls the model with `args` and `kwargs`. Every tensor
        in its output, any pytree or dataclass, has gained a leading member axis `[E, ...]`; one whose shape differs
        between members (the boxes that a detector finds) has become a list of E tensors. With `buffers=`
        (`ensemble_buffers`) it returns the output and the new buffers; without, it reads the model's own. Safe in
        `torch.func` transforms and `torch.compile`.

    Raises:
        TypeError, ValueError: here, for unknown options and for models whose parameters cannot be replaced; by
            `forward`, where `params`, `buffers` or the member axis of an input do not fit the model, or where the model
            would update buffers (BatchNorm in training mode) that were not given. The model's own errors come through,
            with a note on the member axis.
        RuntimeError: where `strategy="vmap"` cannot serve the model, naming the module and the operation (here where
            the model shows it, else by `forward`); by `forward`, where `randomness="error"` and the model draws random
            numbers.

    `torch.utils.checkpoint` inside the model has no effect: `chunk_size` is what saves that memory. The gradients of
    sparse embeddings are dense. Inside `torch.compile(fullgraph=True)` nothing can be tried: `"auto"` does not fall
    back there (call once without, and the choice is made), an update in place of a buffer other than a norm's, or of a
    tensor in a plain attribute, is not noticed, and the loop knows no `randomness` but `"different"`.
    """
    check_option(strategy, ("auto", "vmap", "loop"), "strategy")
    check_option(randomness, ("different", "same", "error"), "randomness")
    check_bool(member_inputs, "member_inputs")
    check_option(rank1_side, SIDES, "rank1_side")
    if chunk_size is not None:
        chunk_size = check_positive_int(chunk_size, "chunk_size")
    return Forward(model, strategy, chunk_size, randomness, member_inputs, rank1_side)


class Forward:
    """What `make_forward` returns: call it as `forward(params, *args, buffers=None, **kwargs)`."""

    strategy: str
    """The strategy in use: `"vmap"` or `"loop"`."""
    reason: str
    """Why that one."""
    plan: Plan
    """How the members are computed."""
    member_inputs: bool
    """Whether every tensor input has a leading member axis."""

    def __init__(
        self,
        model: nn.Module,
        strategy: str,
        chunk_size: int | None,
        randomness: str,
        member_inputs: bool,
        rank1_side: str,
    ) -> None:
        self._expected = Expected(model, parameter_sites(model))
        self._template = Template(model, rank1_side)
        self._convolutions = {
            f"{name}.weight" if name else "weight"
            for name, module in model.named_modules()
            if isinstance(module, _ConvNd)
        }
        self._norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NormBase)]
        self.member_inputs = member_inputs
        self._may_switch = strategy == "auto"
        obstacle = _obstacle(model)
        if strategy == "vmap" and obstacle:
            raise RuntimeError(f'strategy: got "vmap", but {obstacle}; strategy="loop" can')
        if strategy == "auto":
            chosen, reason = (
                ("loop", obstacle) if obstacle else ("vmap", "nothing in the model is known to need the loop")
            )
        else:
            chosen, reason = strategy, "it was asked for"
        self._use(Plan(chosen, chunk_size, randomness), reason)

    @property
    def made(self) -> list[object]:
        """The objects that it has made for itself and never changes: Dynamo need not guard them."""
        return [self._expected, self._convolutions, *self._template.made]

    def __call__(
        self, params: EnsembleParams, /, *args: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Every member's output for the inputs `args` and `kwargs`, as `make_forward` describes."""
        E = self.check(params, buffers)
        call = Call(self._template, E, params, buffers, args, kwargs, self.member_inputs)
        if torch.compiler.is_compiling():
            with call.replay():
                return call.result(*run(call, self.compiled_plan(params)))
        with call.replay():
            try:
                return self._compute(call)
            finally:
                call.check_parameters()

    def mode(self, *, training: bool | None = None) -> AbstractContextManager[None]:
        """For a `with` block: the model in training mode, or in eval mode, or as it is; afterwards as it was before."""
        return self._template.mode(training)

    def check(self, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> int:
        """The number of members; TypeError or ValueError, as a call raises it, where these do not fit the model."""
        E = self._expected.check_params(params)
        if buffers is None:
            self._check_no_update()
        else:
            self._expected.check_buffers(buffers, E)
        return E

    def compiled_plan(self, params: EnsembleParams) -> Plan:
        """The plan inside torch.compile: there `"auto"` takes the loop for convolutions of each member's own on a CPU.

        vmap makes one grouped convolution of them, which CPUs are slow at, and its norms more passes over memory.
        """
        if self._may_switch and self.strategy == "vmap":
            stacks = [stack for name, stack in params.stacked.items() if name in self._convolutions]
            if stacks and stacks[0].device.type == "cpu":
                return self.plan._replace(strategy="loop", owned=False)
        return self.plan

    def _compute(self, call: Call) -> Any:
        """By the plan in use; where that is by vmap and fails, by the first other plan that works, and from then on."""
        before = RandomState.of([*call.shared.values(), *call.stacked.values()])
        try:
            return call.result(*run(call, self.plan))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.strategy == "loop":
                error.add_note(call.note())
                raise
            failure = error
        where = f"{self._where(failure)}: {(str(failure).strip() or repr(failure)).splitlines()[0]}"
        if not self.plan.owned:
            owned = self.plan._replace(owned=True)
            before.restore()
            try:
                result = call.result(*run(call, owned))
            except torch.OutOfMemoryError:
                raise
            except Exception:
                pass
            else:
                self._use(owned, f"with new tensors made each member's own, for without that vmap failed in {where}")
                return result
        loop = self.plan._replace(strategy="loop", owned=False)
        before.restore()
        try:
            result = call.result(*run(call, loop))
        except Exception as error:  # then it is the model's own, which vmap words badly
            error.add_note(call.note())
            raise error from None
        if not self._may_switch:
            raise RuntimeError(f'vmap cannot serve {where}; strategy="loop" can') from failure
        self._use(loop, f"vmap failed in {where}", logging.WARNING)
        return result

    def _where(self, error: Exception) -> str:
        """The innermost module of the model that was at work when `error` was raised."""
        found = self._template.kind
        trace = error.__traceback__
        while trace is not None:
            for module in (trace.tb_frame.f_locals.get(argument) for argument in ("self", "layer")):
                if isinstance(module, nn.Module) and (name := self._template.name_of(module)):
                    found = f"{name} ({type(module).__name__})"
            trace = trace.tb_next
        return found

    def _use(self, plan: Plan, reason: str, level: int = logging.INFO) -> None:
        self.plan, self.strategy, self.reason = plan, plan.strategy, reason
        log.log(level, "%s: strategy %r: %s", self._template.kind, plan.strategy, reason)

    def _check_no_update(self) -> None:
        """ValueError where a norm would update its running statistics, which nobody would then have."""
        updated = [name for name, norm in self._norms if norm.training and norm.running_mean is not None]
        if updated:
            raise ValueError(update_lost([f"{name}.running_mean" if name else "running_mean" for name in updated]))


def _obstacle(model: nn.Module) -> str | None:
    """What in `model` vmap is known not to serve; None where there is nothing."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        for kind, operation in _LOOP_ONLY.items():
            if isinstance(module, kind):
                return f"{where} calls {operation}"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"{where} has backward hooks, which vmap passes by"
    return None
