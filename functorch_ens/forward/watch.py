"""vmap under watch: what it would compute wrongly in silence is noticed, and no wrapper of it leaves a call.

Under vmap a member's tensors are wrappers, "batched tensors". Most operations on them are right, or raise. Some are
silently wrong: a batched tensor says that it has no gradient, and a few operators have a wrong rule. A mode of torch
sees each operation, and `watched_vmap` raises `VmapCannot` where one of these occurs; the loop serves such a model.
The mode costs time, so it is in force at the first call of a kind, and later only where it had something to do.
torch.compile traces what an eager call has tried, so it runs without the watch.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from functorch_ens import _torch
from functorch_ens._torch import pytree
from functorch_ens.draws import Draws
from functorch_ens.forward.failures import VmapCannot, is_transient
from functorch_ens.holds import names
from functorch_ens.rng import was_seeded

_IN_PLACE = "whose backward pass fails"
WRONG_UNDER_VMAP = {
    "index_fill": "whose values are wrong where one member's own number is filled into a shared tensor",
    "select_scatter": "whose gradient is wrong",
    "as_strided_": "which keeps the old shape",
    "addbmm_": "which keeps a shape that broadcasts",
    **dict.fromkeys(("pow_", "float_power_", "ldexp_", "hypot_", "cumprod_", "index_reduce_"), _IN_PLACE),
}
"""The operators that vmap has no right rule for, by their names in torch; benchmarks/operator_sweep.py finds them."""


class Notes:
    """What a watched call has found."""

    are_needed = False
    """Whether a mode has done something, so that it has to be in force at the next call of this kind too."""


def watched_vmap(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    randomness: str,
    keep: Sequence[Tensor] = (),
    notes: Notes | None,
) -> Any:
    """`vmap(function, randomness=randomness)(*tensors)`; its result equals that of a loop.

    Args:
        function: of one slice of each of `tensors`.
        tensors: `[k, ...]`.
        randomness: vmap's.
        keep: tensors whose flag `requires_grad` must stay as it is.
        notes: those of the call. None: without the watch, which has found nothing in such a call before.

    Raises: VmapCannot where `function` does something that vmap computes wrongly. It is raised after `function` has
        ended, so that no handler in it catches it.
    """
    if notes is None or _torch.is_compiling():
        return vmap(function, randomness=randomness)(*tensors)
    watch = _Watch(randomness, keep, notes)

    def watched(*slices: Tensor) -> Any:
        for each in slices:
            watch.remember(each)
        return function(*slices)

    try:
        with watch, Draws(before=watch.look_at_seed):
            result = vmap(watched, randomness=randomness)(*tensors)
    except Exception as error:
        if watch.problem is not None and not is_transient(error):
            raise watch.problem from error
        raise
    finally:
        watch.unwrap_what_is_kept()
    if watch.problem is not None:
        raise watch.problem
    return result


# --------------------------------------------------------------------------------------------------------------------
# The mode


class InsideMode(TorchFunctionMode):
    """A mode that also sees what torch's own Python functions call. (Others see those functions alone.)"""

    _running: Any = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`. Where `func` is a function of Python, its calls of torch come to this mode too."""
        if type(func) is not FunctionType or func is self._running or _torch.is_compiling():
            return func(*args, **kwargs)
        before, self._running = self._running, func  # a function that hands itself on again is called as it is
        try:
            with self:
                return _past_the_modes(func)(*args, **kwargs)
        finally:
            self._running = before


class _Unchecked(dict[str, Any]):
    """The globals of a module of torch, in which no function looks for modes."""

    def __init__(self, globals_: dict[str, Any]) -> None:
        super().__init__(dict.fromkeys(_LOOKS, lambda *args: False))
        self._globals = globals_

    def __missing__(self, name: str) -> Any:
        return self._globals[name]


_LOOKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_unchecked: dict[int, _Unchecked] = {}


def _past_the_modes(func: FunctionType) -> FunctionType:
    """`func` without its first lines, which hand it on to the modes in force: its own calls still go to them."""
    globals_ = func.__globals__
    if id(globals_) not in _unchecked:
        _unchecked[id(globals_)] = _Unchecked(globals_)
    twin = FunctionType(func.__code__, _unchecked[id(globals_)], func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


def _functions(name: str) -> Iterator[Any]:
    """Every function by which a user calls the operator `name`."""
    for owner in (torch, Tensor):
        if hasattr(owner, name):
            yield getattr(owner, name)
    packet = getattr(torch.ops.aten, name)
    yield packet
    for overload in packet.overloads():
        yield getattr(packet, overload)


_WRONG = {function: (name, why) for name, why in WRONG_UNDER_VMAP.items() for function in _functions(name)}
_ANSWERS: dict[Any, tuple[str, Callable[[Tensor], Any]]] = {
    getattr(Tensor, name).__get__: (name, read)
    for name, read in {
        "requires_grad": lambda tensor: tensor.requires_grad,
        "is_leaf": lambda tensor: tensor.is_leaf,
        "grad_fn": lambda tensor: tensor.grad_fn is None,
    }.items()
}
_SET_FLAG = Tensor.requires_grad.__set__  # type: ignore[attr-defined]  # a descriptor
_HOOKS = {Tensor.register_hook: "register_hook", Tensor.retain_grad: "retain_grad"}


class _Watch(InsideMode):
    """Notices what vmap computes wrongly, and remembers which wrappers have been made."""

    def __init__(self, randomness: str, keep: Sequence[Tensor], notes: Notes) -> None:
        super().__init__()
        self._notes = notes
        self.problem: VmapCannot | None = None
        self._randomness = randomness
        self._keep = {id(tensor) for tensor in keep}
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS:
            return self._read(func, args[0])
        if func is Tensor.requires_grad_ or func is _SET_FLAG:
            return self._set_flag(func, args, kwargs)
        if self.problem is None:
            self._look(func, args, kwargs)
        if kwargs.get("generator") is not None and self.problem is None:
            self._notes.are_needed = True
            with _torch.outside_transforms():  # one draw serves all members
                return func(*args, **kwargs)
        result = self.call(func, args, kwargs)
        if isinstance(result, Tensor):
            self.remember(result)
        elif isinstance(result, tuple | list):
            for each in result:
                if isinstance(each, Tensor):
                    self.remember(each)
        return result

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what is wrong in this operation."""
        if func in _WRONG and _any_wrapped(args, kwargs):
            name, why = _WRONG[func]
            self._note(f"it calls {name}, {why} under vmap")
        elif func in _HOOKS and _torch.is_batched(args[0]):
            self._note(f"it calls {_HOOKS[func]} on a tensor, which under vmap is that of all members")
        elif kwargs.get("generator") is not None and _any_wrapped(args, kwargs):
            self._note("it draws random numbers by a generator of its own, from values that differ between members")

    def look_at_seed(self) -> None:
        """Before a draw: note where the model has seeded torch's generator."""
        if self._randomness == "different" and self.problem is None and was_seeded():
            self._note("it seeds torch's generator, and then every member draws the same numbers")

    def _read(self, func: Any, tensor: Tensor) -> Any:
        """The answer of a batched tensor about its gradient; it is wrong where the tensor inside says otherwise."""
        if self.problem is None and _torch.is_batched(tensor):
            name, read = _ANSWERS[func]
            if read(tensor) != read(_torch.below_vmap(tensor)):
                self._note(f"it reads {name} of a tensor, which says {getattr(tensor, name)} under vmap")
        return func(tensor)

    def _set_flag(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`requires_grad_`, for the tensor inside: torch refuses it for a batched one."""
        self._notes.are_needed = True
        inner = _torch.below_vmap(args[0])
        if id(inner) in self._keep or _torch.is_wrapped(inner):
            self._note("it sets requires_grad of a tensor")
            return args[0] if func is Tensor.requires_grad_ else None
        with _torch.outside_transforms(), _torch.flags_can_be_set():
            func(inner, *args[1:], **kwargs)
        return args[0] if func is Tensor.requires_grad_ else None

    def _note(self, message: str) -> None:
        modules = []
        frame: Any = inspect.currentframe()
        while frame is not None:
            modules += [self for self in (frame.f_locals.get("self"),) if isinstance(self, nn.Module)]
            frame = frame.f_back
        self.problem = VmapCannot(message, modules[::-1])

    def remember(self, tensor: Tensor) -> None:
        if _torch.is_batched(tensor):
            self._made.append(weakref.ref(tensor))

    def unwrap_what_is_kept(self) -> None:
        """Turn the wrappers that are still alive, because the model or a hook keeps them, into tensors `[k, ...]`.

        A wrapper is dead after vmap: it could not be copied, saved, or computed with.
        """
        alive = {id(tensor): tensor for made in self._made if (tensor := made()) is not None}
        self._made.clear()  # torch swaps no tensor that weak references point to
        for tensor in alive.values():
            if _torch.is_batched(tensor):
                self._notes.are_needed = True
                _torch.unwrap_in_place(tensor)


class Alone(TorchFunctionMode):
    """Around each member: what one network would have to itself, and members of an ensemble share.

    All members draw the same numbers from a generator that is given to an operator: each begins where the first one
    began, which is noted in `begun`. Those that the template `owns` begin there anyway. And `as_strided` counts from
    the beginning of a member's tensor, not of the memory that all members share.
    """

    def __init__(self, notes: Notes, begun: dict[torch.Generator, Tensor], owns: Callable[[Any], bool]) -> None:
        super().__init__()
        self._notes = notes
        self._begun = begun
        self._owns = owns

    def __enter__(self) -> Any:
        for generator, state in self._begun.items():
            generator.set_state(state)
        return super().__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator not in self._begun and not self._owns(generator):
            self._notes.are_needed = True
            self._begun[generator] = generator.get_state()
        if func in _STRIDED and args[0].is_contiguous() and not _torch.is_wrapped(args[0]):
            self._notes.are_needed = True
            args = (args[0].clone(), *args[1:])
        return func(*args, **kwargs)


@contextmanager
def unmoved(begun: Iterable[torch.Generator]) -> Iterator[None]:
    """Leaves these generators as they are now."""
    now = {generator: generator.get_state() for generator in begun}
    try:
        yield
    finally:
        for generator, state in now.items():
            generator.set_state(state)


_STRIDED = {each for name in ("as_strided", "as_strided_copy", "as_strided_scatter") for each in _functions(name)}


def _any_wrapped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(leaf, Tensor) and _torch.is_wrapped(leaf) for leaf in pytree.tree_leaves((args, kwargs)))


_ASKED = frozenset(("requires_grad", "grad_fn", "is_leaf", "register_hook", "retain_grad", *WRONG_UNDER_VMAP))


def may_be_wrong(modules: Iterable[nn.Module]) -> bool:
    """Whether the code of a model, or of its hooks, has a name that the watch looks for.

    For a forward that is compiled before any call could be watched. Only the code of the classes outside torch is read.
    """
    for module in modules:
        theirs = [cls for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "functorch_ens."))]
        functions = [*(value for cls in theirs for value in vars(cls).values()), *_torch.forward_hooks_of(module)]
        if any(isinstance(each, FunctionType) and not _ASKED.isdisjoint(names(each.__code__)) for each in functions):
            return True
    return False
