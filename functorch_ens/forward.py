"""`make_forward`: the forward of an ensemble as one pure function of its parameters."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from functorch_ens.checks import check_bool, check_option, check_positive_int
from functorch_ens.params import EnsembleParams
from functorch_ens.structure import parameter_sites
from functorch_ens.template import Template
from functorch_ens.validate import Expected

log = logging.getLogger(__name__)
_LOCK = threading.RLock()

# Modules that vmap cannot serve: torch has no batching rule for what they call.
_LOOP_ONLY: dict[type[nn.Module], str] = {
    nn.RNNBase: "a fused RNN kernel",
    nn.LSTMCell: "aten::lstm_cell",
    nn.RReLU: "aten::rrelu",
}


def make_forward(
    model: nn.Module,
    *,
    strategy: str = "auto",
    chunk_size: int | None = None,
    randomness: str = "different",
    member_inputs: bool = False,
) -> Forward:
    """Build the forward of an ensemble of `model`, a pure function of the ensemble's parameters.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> forward = fe.make_forward(model)
    >>> forward(fe.batchensemble_params(model, E=5), torch.ones(7, 3)).shape
    torch.Size([5, 7, 2])

    Args:
        model: the network; it is only read. Its structure is read now, its training mode at each call.
        strategy: `"vmap"` computes all members at once; `"loop"` one after another, which works for any model; `"auto"`
            takes vmap, or the loop where vmap cannot serve the model. The choice is logged, and is `forward.strategy`.
        chunk_size: how many members vmap computes at once; None is all.
        randomness: `"different"` dropout for every member, the `"same"`, or `"error"` where anything is random.
        member_inputs: False gives every input `[B, ...]` to each member. True: every tensor input is `[E, B, ...]`, and
            member i gets `[i]`.

    Returns:
        `forward(params, *args, buffers=None, **kwargs)`, which calls the model with `args` and `kwargs`. Every tensor
        in its output, any pytree, has gained a leading member axis `[E, ...]`. With `buffers=` (`ensemble_buffers`) it
        returns the output and the new buffers; without, it reads the model's own. Safe in `torch.func` transforms and
        `torch.compile`.

    Raises:
        TypeError, ValueError: here, for unknown options; by `forward`, where `params`, `buffers` or the member axis of
            an input do not fit the model, or where the model would update buffers (BatchNorm in training mode) that
            were not given. The model's own errors come through, with a note on the member axis.
        RuntimeError: by `forward`, where vmap cannot serve the model and was asked for, or where `randomness="error"`
            and the model draws random numbers.

    Inside `torch.compile(fullgraph=True)` nothing can be tried: `"auto"` does not fall back there (call once without,
    and the choice is made), an update in place of a buffer other than a norm's is not noticed, and the loop knows no
    `randomness` but `"different"`.
    """
    check_option(strategy, ("auto", "vmap", "loop"), "strategy")
    check_option(randomness, ("different", "same", "error"), "randomness")
    check_bool(member_inputs, "member_inputs")
    if chunk_size is not None:
        chunk_size = check_positive_int(chunk_size, "chunk_size")
    return Forward(model, strategy, chunk_size, randomness, member_inputs)


class Forward:
    """What `make_forward` returns: call it as `forward(params, *args, buffers=None, **kwargs)`."""

    strategy: str
    """The strategy in use: `"vmap"` or `"loop"`."""
    reason: str
    """Why that one."""

    def __init__(
        self, model: nn.Module, strategy: str, chunk_size: int | None, randomness: str, member_inputs: bool
    ) -> None:
        self._expected = Expected(model, parameter_sites(model))
        self._template = Template(model)
        self._model = model
        self._norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NormBase)]
        self._chunk_size = chunk_size
        self._randomness = randomness
        self._member_inputs = member_inputs
        self._may_switch = strategy == "auto"
        self._use(*(_choose(model) if strategy == "auto" else (strategy, "it was asked for")))

    def __call__(
        self, params: EnsembleParams, /, *args: Any, buffers: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Every member's output for the inputs `args` and `kwargs`, as `make_forward` describes."""
        E = self._expected.check_params(params)
        if buffers is None:
            self._check_no_update()
        else:
            self._expected.check_buffers(buffers, E)
        call = _Call(self._template, self._model, E, params, buffers, args, kwargs, self._member_inputs)
        if torch.compiler.is_compiling():
            return self._compute(call)
        # One call at a time: a template holds the tensors of the call that it serves.
        with _LOCK:
            return self._compute(call)

    def _compute(self, call: _Call) -> Any:
        self._template.follow()
        if torch.compiler.is_compiling():
            return call.result(*self._members(call))
        try:
            members = self._members(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.strategy == "loop":
                error.add_note(call.note())
                raise
            failure = error
        else:
            return call.result(*members)
        finally:
            call.check_parameters()
        return self._after_vmap(call, failure)

    def _members(self, call: _Call) -> tuple[list[Tensor], dict[str, Tensor]]:
        if self.strategy == "vmap":
            return _vmap(call, self._chunk_size, self._randomness)
        return _loop(call, self._randomness)

    def _after_vmap(self, call: _Call, failure: Exception) -> Any:
        """Where vmap failed: the model's own error if the loop too has one, else the loop's answer, or word of it."""
        try:
            members = _loop(call, self._randomness)
        except Exception as error:
            error.add_note(call.note())
            raise error from None
        result = call.result(*members)
        summary = str(failure).strip().partition("\n")[0]
        if not self._may_switch:
            kind = type(self._model).__name__
            raise RuntimeError(f'vmap cannot serve {kind}, strategy="loop" can: {summary}') from failure
        self._use("loop", f"vmap failed: {summary}", logging.WARNING)
        return result

    def _use(self, strategy: str, reason: str, level: int = logging.INFO) -> None:
        self.strategy, self.reason = strategy, reason
        log.log(level, "%s: strategy %r: %s", type(self._model).__name__, strategy, reason)

    def _check_no_update(self) -> None:
        """ValueError where a norm would update its running statistics, which nobody would then have."""
        updated = [name for name, norm in self._norms if norm.training and norm.running_mean is not None]
        if updated:
            raise ValueError(_update_lost([f"{name}.running_mean" if name else "running_mean" for name in updated]))


def _choose(model: nn.Module) -> tuple[str, str]:
    """The strategy for `model`, and why."""
    for name, module in model.named_modules():
        for kind, operation in _LOOP_ONLY.items():
            if isinstance(module, kind):
                return (
                    "loop",
                    f"{name or 'the model'} ({type(module).__name__}) calls {operation}, which vmap has no rule for",
                )
    return "vmap", "nothing in the model is known to need the loop"


_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(...))


def _update_lost(names: list[str]) -> str:
    return (
        f"buffers: got None, but in training mode the model updates {names}; give buffers=ensemble_buffers(model, E) "
        "and keep the returned ones, or call model.eval()"
    )


class _Call:
    """One call of a forward: what a single member computes in it, and how the members' results go together."""

    def __init__(
        self,
        template: Template,
        model: nn.Module,
        E: int,
        params: EnsembleParams,
        buffers: Mapping[str, Tensor] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        member_inputs: bool,
    ) -> None:
        self.E = E
        self._kind = type(model).__name__
        given = [] if torch.compiler.is_compiling() else [*params.shared.items(), *params.stacked.items()]
        self._versions = [(name, tensor, tensor._version) for name, tensor in given]
        self.stacked = params.stacked
        self.buffers = None if buffers is None else dict(buffers)
        self._shared = params.shared
        self._template = template
        self._own_buffers = dict(model.named_buffers()) if buffers is None else {}
        self._training = any(module.training for module in model.modules())
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.inputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.member_inputs = member_inputs
        if member_inputs:
            wrong = [list(x.shape) for x in self.inputs if x.ndim == 0 or x.shape[0] != E]
            if wrong:
                raise ValueError(
                    f"inputs: member_inputs=True expects every tensor to have a leading member axis of {E}, "
                    f"[E, B, ...]; got {wrong}"
                )
        self._form: tuple[pytree.TreeSpec, list[Any]] | None = None  # of the output; `...` stands for a tensor
        self._lost: set[str] = set()  # the model's own buffers that it has updated

    def member(
        self, stacked: dict[str, Tensor], buffers: dict[str, Tensor], inputs: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One member's output, as a flat list of its tensors, and its new buffers."""
        # A forward may write to its inputs and buffers in place: to copies, never to what was passed in.
        tensors = iter([x.clone() for x in inputs])
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        copies = {name: buffer.clone() for name, buffer in {**self._own_buffers, **buffers}.items()}
        output, new = self._template({**self._shared, **stacked}, copies, args, kwargs)
        if self._training:  # torch.compile cannot read the version of what grad wraps, and sees only what is replaced
            versioned = not torch.compiler.is_compiling()
            self._lost |= {
                name
                for name in self._own_buffers
                if new[name] is not copies[name] or (versioned and copies[name]._version)
            }
        values, spec = pytree.tree_flatten(output)
        form = spec, [... if isinstance(value, Tensor) else value for value in values]
        wrong = [type(value).__name__ for value in form[1] if not isinstance(value, _CONSTANTS)]
        if wrong:
            raise TypeError(
                f"output: expected tensors, numbers, text or None in a pytree, got {wrong}; "
                "torch.utils._pytree.register_pytree_node or register_dataclass make a type of output one"
            )
        if self._form is not None and repr(self._form) != repr(form):  # repr: a NaN is not equal to itself
            raise TypeError(f"output: what is no tensor must be the same for all members, got {self._form} and {form}")
        self._form = form
        return [value for value in values if isinstance(value, Tensor)], {name: new[name] for name in buffers}

    def result(self, tensors: list[Tensor], buffers: dict[str, Tensor]) -> Any:
        """The output as the model gives it, from its stacked `tensors`; with the new buffers where they were given."""
        if self._lost:
            raise ValueError(_update_lost(sorted(self._lost)))
        assert self._form is not None
        stacked = iter(tensors)
        spec, values = self._form
        output = pytree.tree_unflatten([next(stacked) if value is ... else value for value in values], spec)
        return output if self.buffers is None else (output, buffers)

    def check_parameters(self) -> None:
        """ValueError, naming them, where the model has written to its parameters, and so to the caller's."""
        written = [name for name, tensor, version in self._versions if tensor._version != version]
        if written:
            raise ValueError(
                f"model: {self._kind} writes in place to its parameters {written}, which would change params; "
                "do that outside its forward"
            )

    def note(self) -> str:
        """What a reader of the model's own error must know about the member axis."""
        given = [list(x.shape) for x in self.inputs]
        axis = (
            f"with member_inputs=True member i of {self.E} gets [i] of every tensor input [E, B, ...]"
            if self.member_inputs
            else f"each of the {self.E} members gets every input [B, ...] whole; member_inputs=True is for [E, B, ...]"
        )
        return f"functorch_ens: the model raised this for one member. The inputs have the shapes {given}: {axis}."


def _vmap(call: _Call, chunk_size: int | None, randomness: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All members at once."""
    in_dims = (0, 0, 0 if call.member_inputs else None)
    run = vmap(call.member, in_dims=in_dims, randomness=randomness, chunk_size=chunk_size)
    return run(call.stacked, call.buffers or {}, call.inputs)


def _loop(call: _Call, randomness: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One member after another."""
    # unbind, not [i]: its backward writes every member's gradient once, where E indexings would add up E of full size.
    stacked = {name: tensor.unbind() for name, tensor in call.stacked.items()}
    buffers = {name: tensor.unbind() for name, tensor in (call.buffers or {}).items()}
    inputs = [x.unbind() if call.member_inputs else [x] * call.E for x in call.inputs]
    results = []
    for i in range(call.E):
        with _random(randomness, last=i == call.E - 1, devices=[tensor.device for tensor in call.stacked.values()]):
            results.append(
                call.member(
                    {name: parts[i] for name, parts in stacked.items()},
                    {name: parts[i] for name, parts in buffers.items()},
                    [parts[i] for parts in inputs],
                )
            )
    leaves = [torch.stack(parts) for parts in zip(*(leaves for leaves, _ in results), strict=True)]
    return leaves, {name: torch.stack([new[name] for _, new in results]) for name in buffers}


@contextmanager
def _random(randomness: str, last: bool, devices: Iterable[torch.device]) -> Iterator[None]:
    """What vmap's `randomness` means for one member of the loop: draws of its own, the same as the others', or none."""
    if randomness == "different":
        yield
        return
    cuda = sorted({device.index for device in devices if device.type == "cuda"})
    before = _random_state(cuda)
    yield
    after = _random_state(cuda)
    if not all(map(torch.equal, before, after)):
        if randomness == "error":
            raise RuntimeError('randomness="error": the model drew random numbers; "different" and "same" allow it')
        if not last:
            _set_random_state(before, cuda)


def _random_state(cuda: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in cuda)]


def _set_random_state(state: list[Tensor], cuda: list[int]) -> None:
    torch.set_rng_state(state[0])
    for index, value in zip(cuda, state[1:], strict=True):
        torch.cuda.set_rng_state(value, index)
