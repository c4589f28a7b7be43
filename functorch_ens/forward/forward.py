"""`make_forward`: the forward of an ensemble, as one pure function of its parameters."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy, member_names
from functorch_ens.checks import check_bool, check_option, check_positive_int, first_line
from functorch_ens.forward.call import Call, Keywords, Known, update_lost
from functorch_ens.forward.chunks import MeasuredChunks
from functorch_ens.forward.failures import VmapCannot, interrupt_in, is_of_vmap, is_transient
from functorch_ens.forward.plans import STRATEGIES, Plan, plans_for
from functorch_ens.forward.run import run
from functorch_ens.forward.settings import Settings
from functorch_ens.forward.template import Modes, Templates
from functorch_ens.forward.watch import may_be_wrong
from functorch_ens.holds import Generator, generator, held, is_iterator
from functorch_ens.layers.conv import CONVOLUTION
from functorch_ens.layers.norm import RUNNING_NORM
from functorch_ens.layers.operators import SIDES
from functorch_ens.layers.registry import obstacle, takes_any_size
from functorch_ens.params.pytree import EnsembleParams, check_buffers, check_kinds, check_params
from functorch_ens.rng import RandomState, drawing_apart

log = logging.getLogger(__name__)

_IDENTITIES = itertools.count()


def make_forward(
    model: nn.Module,
    *,
    strategy: str = "auto",
    chunk_size: int | str | None = None,
    randomness: str = "different",
    member_inputs: bool = False,
    rank1_side: str = "auto",
) -> Forward:
    """Build the forward of an ensemble of `model`: a pure function of the ensemble's parameters.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> forward = fe.make_forward(model)
    >>> forward(fe.batchensemble_params(model, E=5), torch.ones(7, 3)).shape
    torch.Size([5, 7, 2])

    Args:
        model: the network, which is only read: its structure now, its training mode at each call.
        strategy: `"vmap"` computes all members at once, `"loop"` one after another; `"auto"` takes vmap, or the loop
            where vmap cannot serve the model. The choice is logged, and is `forward.strategy` and `forward.reason`.
        chunk_size: compute so many members at once; None is all. Backward recomputes each chunk, to save memory.
            `"auto"` chooses by the memory of one member, and `forward.chunk_size` and `forward.reason` tell the size.
        randomness: `"different"` random numbers (dropout) for every member, the `"same"`, or `"error"` where any are.
        member_inputs: False gives every input `[B, ...]` to all members; True gives member i `[i]` of `[E, B, ...]`.
        rank1_side: multiply `s` into a layer's input (`"activation"`), its `"weight"`, or (`"auto"`) the cheaper one.

    Returns:
        `forward(params, *args, buffers=None, **kwargs)`. Every tensor in the model's output gains a leading axis E; one
        whose shape differs between members becomes a list. With `buffers=` it returns `(output, new buffers)`.

    Raises:
        TypeError, ValueError: for unknown options, and for a model whose parameters cannot be replaced. `forward`
            raises them where `params`, `buffers` or inputs do not fit, or where an update of buffers would be lost.
        RuntimeError: vmap was asked for and cannot serve the model, or `randomness="error"` and the model draws.
    """
    check_option(strategy, STRATEGIES, "strategy")
    check_option(randomness, ("different", "same", "error"), "randomness")
    check_bool(member_inputs, "member_inputs")
    check_option(rank1_side, SIDES, "rank1_side")
    if not (chunk_size is None or (isinstance(chunk_size, str) and chunk_size == "auto")):
        chunk_size = check_positive_int(chunk_size, "chunk_size", or_else="None or 'auto'")
    return Forward(model, strategy, chunk_size, randomness, member_inputs, rank1_side)


class Forward:
    """What `make_forward` returns: call it as `forward(params, *args, buffers=None, **kwargs)`."""

    chunk_size: int | None
    """How many members it computes at once; None: all. With `chunk_size="auto"`, the size that it has chosen last."""
    member_inputs: bool
    """Whether every tensor input has a leading member axis."""
    revision: int
    """How many times the user has changed the model (a constant, a hook, a submodule), and a call has noticed."""
    compiled: dict[Hashable, Any]
    """What `predict` has compiled of this forward."""
    identity: str
    """Another one for each forward and revision: compiled code is told by its guard which forward it was made of."""

    def __init__(
        self,
        model: nn.Module,
        strategy: str,
        chunk_size: int | str | None,
        randomness: str,
        member_inputs: bool,
        rank1_side: str,
    ) -> None:
        self._options = (model, strategy, chunk_size, randomness, member_inputs, rank1_side)
        self.member_inputs = member_inputs
        self._is_free = strategy == "auto"
        self._lock = threading.Lock()
        self.revision = 0
        self._told: set[str] = set()
        self.compiled = {}
        self._build()

    def _build(self) -> None:
        """Look at the model as it is now."""
        self.identity = str(next(_IDENTITIES))
        model, strategy, chunk_size, randomness, _, rank1_side = self._options
        self._anatomy = anatomy = Anatomy(model)
        self._convolutions = {f"{name}.weight" if name else "weight" for name in anatomy.instances(CONVOLUTION)}
        norms = anatomy.instances(RUNNING_NORM).items()
        self._norms = [(anatomy.written.index(norm), name, norm) for name, norm in norms]
        templates, settings = Templates(anatomy, rank1_side), Settings(anatomy)
        self._tell_of_iterators(
            templates.traced.iterators,
            "begins anew in every call and for every member, as all memory of a model does. What goes on from call "
            "to call is a generator of random numbers, a buffer or an input",
        )
        outside = self._outside(model, chunk_size)
        self._known = Known(anatomy, templates, settings, set(), takes_any_size(anatomy), set(), outside)
        self._may_be_wrong = may_be_wrong(anatomy.modules.values())
        self._has_computed = False
        found = obstacle(anatomy)
        self._measured = MeasuredChunks() if isinstance(chunk_size, str) else None
        self.chunk_size = None if isinstance(chunk_size, str) else chunk_size
        self._plans = plans_for(strategy, randomness, self.chunk_size, found)
        self._use(found or self.plan.reason("") if self._is_free else "it was asked for", logging.INFO)

    def _outside(self, model: nn.Module, chunk_size: int | str | None) -> list[Generator]:
        """The generators that a backward pass sets back, and that are not in attributes; only chunks need them."""
        found = [] if chunk_size is None else list(held(model, by_code=True))
        self._tell_of_iterators(
            {name for name, value in found if is_iterator(value)},
            "is no attribute, and cannot be set back: if the forward advances it, the gradients of chunks are wrong. "
            "Keep it in an attribute, or leave out chunk_size",
        )
        return [each for _, value in found if (each := generator(value))]

    def _tell_of_iterators(self, found: set[str], what: str) -> None:
        """Warn, once, of the iterators in the attributes `found`."""
        names = {name or self._anatomy.kind for name in found} - self._told
        if names:
            self._told |= names
            log.warning("%s: the iterator in %s %s", self._anatomy.kind, ", ".join(sorted(names)), what)

    def keywords(self) -> Keywords:
        """Which keyword arguments the model takes."""
        return Keywords.of(self._anatomy.written[0])

    def refresh(self) -> None:
        """Where the user has changed the model since, look at it anew, and raise `revision`."""
        changed = self._known.changed()
        if changed is None:
            return
        with self._lock:
            if self._known.changed() is None:  # another thread has come first
                return
            before = self._known.templates
            self._build()
            self._known.templates.go_on_from(before)
            self.revision += 1
        level = logging.WARNING if self.revision == 2 else logging.INFO
        log.log(
            level,
            "%s: %s has changed, so the forward is made anew, for the %s time; a compiled step is compiled anew too. "
            "What changes often costs less as an input or in a buffer",
            self._anatomy.kind,
            changed,
            {1: "1st", 2: "2nd", 3: "3rd"}.get(self.revision, f"{self.revision}th"),
        )

    def tell_kept(self) -> None:
        """Warn, once, of tensors that the model has now where it had none, and that this forward does not see."""
        kept = self._known.settings.kept - self._known.written - self._told
        if kept:
            self._told |= kept
            log.warning(
                "%s: %s is a tensor now and was none when the forward was made. It is taken for a cache, which the "
                "forward does not see; make a new forward if the model is to compute with it",
                self._anatomy.kind,
                ", ".join(sorted(kept)),
            )

    @property
    def plan(self) -> Plan:
        """How the members are computed."""
        return self._plans[0]

    @property
    def strategy(self) -> str:
        """The strategy in use: `"vmap"` or `"loop"`."""
        return self.plan.strategy

    @property
    def reason(self) -> str:
        """Why its plan is the one in use, and with `chunk_size="auto"` why its size is."""
        return "; ".join(filter(None, [self._reason, "" if self._measured is None else self._measured.reason]))

    @property
    def made(self) -> list[object]:
        """The objects that this forward has made and never changes, so that Dynamo need guard `identity` alone."""
        return [*self._anatomy.facts, self._convolutions, *self._known.templates.traced.made]

    @property
    def known(self) -> object:
        """What this forward knows of its model. Where `refresh` is called before each call, it needs no guards."""
        return self._known

    def __call__(
        self, params: EnsembleParams, /, *args: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Every member's output for the inputs `args` and `kwargs`, as `make_forward` describes."""
        if _torch.is_compiling():
            assert self.identity  # read, so that Dynamo guards it
            self._check_constants()
        else:
            self.refresh()
        return self.called(params, args, kwargs, buffers, self.modes())

    def called(
        self,
        params: EnsembleParams,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        buffers: Mapping[str, Tensor] | None,
        modes: Modes,
        *,
        whole: bool = False,
    ) -> Any:
        """The same, with the modules in the given training modes, whatever those of the model are now.

        `whole`: these members are a chunk, which the caller has cut where `chunk_size="auto"` says so.
        """
        call = self._call(params, args, kwargs, buffers, modes)
        if call.is_traced:
            if torch.compiler.is_exporting():
                self._known.templates.traced.read()
            plan = self.compiled_plan(params)
            if not self._known.takes_any_size and _torch.has_symbolic_sizes(call.members.inputs):
                plan = plan.for_any_size()
            if not whole and self._measured is not None:
                plan = plan.of_size(self.chunk_size)  # as an eager call has chosen it
            return call.result(run(call, plan))
        self.check_kinds(params, buffers)
        layers = _torch.layers_in_force()
        try:
            return self._compute(call, whole)
        except NameError as error:
            if not _torch.wait_for_traces(error):
                raise
            return self._compute(call, whole)
        except KeyboardInterrupt:
            _torch.leave_layers_beyond(layers)
            raise
        finally:
            call.check_parameters()

    def _call(
        self,
        params: EnsembleParams,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        buffers: Mapping[str, Tensor] | None,
        modes: Modes,
    ) -> Call:
        """The call for these arguments, which are checked."""
        E = self.check(params, buffers, modes)
        return Call(self._known, modes, E, params, buffers, args, kwargs, self.member_inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is the model and the options, and is made anew from them."""
        return Forward, self._options

    def modes(self, *, training: bool | None = None) -> Modes:
        """Which modules of the model are in training mode: those that are now, or after `train()` or `eval()`."""
        if training is not None:
            plain = all(
                type(module).train is nn.Module.train
                and type(module).eval is nn.Module.eval
                and {"train", "eval"}.isdisjoint(vars(module))
                for module in self._anatomy.written
            )
            return (training,) * len(self._anatomy.written) if plain else self._known.templates.modes(training)
        return tuple([module.training for module in self._anatomy.written])

    def put_back(self, modes: Modes) -> None:
        """Put the model into these modes, where a function of the user has left it in others."""
        for module, mode in zip(self._anatomy.written, modes, strict=True):
            if module.training is not mode:
                module.training = mode

    def check(self, params: EnsembleParams, buffers: Mapping[str, Tensor] | None, modes: Modes) -> int:
        """The number of members; TypeError or ValueError, as a call raises it, where these do not fit the model."""
        E = check_params(params, self._anatomy)
        if buffers is None:
            self._check_no_update(modes)
        else:
            check_buffers(buffers, self._anatomy, E)
        return E

    def check_kinds(self, params: EnsembleParams, buffers: Mapping[str, Tensor] | None) -> None:
        """TypeError or ValueError where tensors that have passed `check` are sparse, of whole numbers or on meta."""
        check_kinds(params, buffers, self._anatomy)

    def compiled_plan(self, params: EnsembleParams) -> Plan:
        """The plan inside torch.compile: `"auto"` may take another one.

        For a member's own convolutions on a CPU, and for a model whose code asks what vmap answers wrongly, before a
        call outside of torch.compile has shown whether it does.
        """
        if self._is_free:
            if self._may_be_wrong and not self._has_computed:
                return self._plans[-1]
            stacks = [stack for name, stack in params.stacked.items() if name in self._convolutions]
            if stacks and stacks[0].device.type == "cpu":
                return self.plan.for_own_convolutions()
        return self.plan

    def convolves_members(self, *params: EnsembleParams) -> bool:
        """Whether a member has something of its own in a convolution: its weight, or vectors and factors of it."""
        stacked = {name for each in params for name in each.stacked}
        return any(name in stacked or not stacked.isdisjoint(member_names(name)) for name in self._convolutions)

    @property
    def chooses_size(self) -> bool:
        """Whether it has `chunk_size="auto"`."""
        return self._measured is not None

    def choose_size(
        self,
        params: EnsembleParams,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        buffers: Mapping[str, Tensor] | None,
        modes: Modes,
    ) -> int | None:
        """How many members to compute at a time in this call, by `chunk_size="auto"`; None: all.

        Nothing is chosen where no plan can compute two members: the call itself then says why.
        """
        call = self._call(params, args, kwargs, buffers, modes)
        for plan in self._plans:
            try:
                return self._sized(plan, call).chunk_size
            except Exception as error:
                if interrupt := interrupt_in(error):
                    raise interrupt from None
        return None

    def _sized(self, plan: Plan, call: Call) -> Plan:
        """`plan`, for as many members at a time as `chunk_size="auto"` chooses. Two members are not parted."""
        if self._measured is None or call.E <= 2:
            return plan
        if _torch.inside_transform():  # what is measured there is the transform too
            return plan.of_size(self.chunk_size)
        size = self._measured.size(plan, call)
        with self._lock:
            self.chunk_size = size
            told = f"{call.E if size is None else size} of {call.E} members at a time"
            if told not in self._told:
                self._told.add(told)
                log.info("%s: %s: %s", self._anatomy.kind, told, self._measured.reason)
        return plan.of_size(size)

    def _compute(self, call: Call, whole: bool) -> Any:
        """The result by the first plan that works, which is then the plan in use."""
        plans = self._plans
        if plans[0].strategy == "vmap" and _torch.every_module_has_backward_hooks():
            why = VmapCannot("all modules have backward hooks, which vmap passes by", [])
            plans = self._settle(plans, len(plans) - 1, why)
        tensors = [*call.members.shared.values(), *call.members.stacked.values()]
        before = RandomState.of(tensors)
        failure: Exception | None = None
        for index, plan in enumerate(plans):
            if failure is not None and call.notes is None and not before.equals(RandomState.of(tensors)):
                before.restore()
            if isinstance(failure, VmapCannot) and plan.strategy == "vmap":
                continue
            try:
                plan = plan if whole else self._sized(plan, call)
                # A watched call may be tried again: then it draws the same numbers.
                with nullcontext() if call.notes is None else drawing_apart(tensors):
                    result = call.result(run(call, plan))
            except Exception as error:
                if interrupt := interrupt_in(error):
                    raise interrupt from None
                if index + 1 < len(plans) and is_of_vmap(error):
                    failure = failure or error
                    continue
                if not (is_transient(error) or _torch.inside_transform()):
                    error.add_note(call.note())
                if failure is not None:
                    raise error from None
                raise
            if failure is not None:
                self._settle(plans, index, failure)
            call.end()
            self._has_computed = True
            if self._known.settings.kept:
                self.tell_kept()
            return result
        raise AssertionError("the loop over plans returns or raises")

    def _settle(self, plans: list[Plan], index: int, failure: Exception) -> list[Plan]:
        """The plans from `index` on, which are now in use, because the first one raised `failure`."""
        where = f"{self._where(failure)}: {first_line(failure)}"
        plan = plans[index]
        if plan.probe:
            raise RuntimeError(f'vmap cannot serve {where}; strategy="loop" can') from failure
        with self._lock:
            if len(self._plans) > len(plans) - index:  # else another thread has come as far
                self._plans = plans[index:]
                self._use(plan.reason(where), plan.level)
        return plans[index:]

    def _where(self, error: Exception) -> str:
        """The innermost module of the model that was at work when `error` was raised."""
        modules: list[Any] = list(error.modules) if isinstance(error, VmapCannot) else []
        trace = error.__traceback__
        while trace is not None and not isinstance(error, VmapCannot):
            modules += [trace.tb_frame.f_locals.get(argument) for argument in ("self", "layer")]
            trace = trace.tb_next
        found = [(name, module) for module in modules if (name := self._known.templates.name_of(module))]
        return f"{found[-1][0]} ({type(found[-1][1]).__name__})" if found else self._anatomy.kind

    def _use(self, reason: str, level: int) -> None:
        self._reason = reason
        log.log(level, "%s: strategy %r: %s", self._anatomy.kind, self.strategy, self._reason)

    def _check_constants(self) -> None:
        """RuntimeError where a number of the model has changed; where one changes later, Dynamo compiles anew."""
        for place, module, name, value in self._known.settings.constants:
            now = getattr(module, name)
            if now != value and (now == now or value == value):  # nan is not equal to itself
                raise RuntimeError(
                    f"model: {place} is {now!r} now and was {value!r} when the forward was made; call the forward once "
                    "outside torch.compile, or make a new one"
                )

    def _check_no_update(self, modes: Modes) -> None:
        """Raise ValueError if a norm would update its running statistics and the new ones would be lost."""
        updated = [name for at, name, norm in self._norms if modes[at] and norm.running_mean is not None]
        if updated:
            raise ValueError(update_lost([f"{name}.running_mean" if name else "running_mean" for name in updated]))
