"""One call of a forward: its inputs, how one member computes, and how results are joined."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from functorch_ens import _torch
from functorch_ens.anatomy import Anatomy
from functorch_ens.forward.settings import Settings
from functorch_ens.forward.template import Modes, Templates
from functorch_ens.forward.watch import Alone, Notes, unmoved
from functorch_ens.holds import Generator, global_generators
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.trees import Form, Static, take_apart


class Members(NamedTuple):
    """The tensors of some members, stacked `[k, ...]`; or of a single one, without the member axis."""

    shared: dict[str, Tensor]
    stacked: dict[str, Tensor]
    buffers: dict[str, Tensor]
    own: dict[str, Tensor]
    """Without the member axis: the model's own buffers, which all members share where the caller has given none."""
    inputs: list[Tensor]
    """`[k, ...]` with `member_inputs`; otherwise every member gets the same tensors."""

    def split(self, size: int | None, member_inputs: bool) -> list[Members]:
        """These members in parts of `size`; with None, each alone and without the member axis.

        This is done by split and unbind, whose backward pass writes every gradient once. That of E indexings would add
        up E gradients of full size.
        """

        def cut(tensor: Tensor) -> tuple[Tensor, ...]:
            if size is None:  # the backward pass of unbind copies even a single member; that of squeeze does not
                return tensor.unbind() if len(tensor) > 1 else (tensor.squeeze(0),)
            return tensor.split(size)

        stacked = {name: cut(tensor) for name, tensor in self.stacked.items()}
        buffers = {name: cut(tensor) for name, tensor in self.buffers.items()}
        count = len(next(iter(stacked.values())))
        inputs = [cut(x) if member_inputs else (x,) * count for x in self.inputs]
        return [
            Members(
                self.shared,
                {name: parts[i] for name, parts in stacked.items()},
                {name: parts[i] for name, parts in buffers.items()},
                self.own,
                [parts[i] for parts in inputs],
            )
            for i in range(count)
        ]


class Returned(NamedTuple):
    """What members return: stacked `[k, ...]`, or from a single one without the member axis."""

    tensors: list[Any]
    """The output tensors. One whose shape differs between members is a list of k tensors."""
    buffers: dict[str, Tensor]
    """The new ones."""
    static: Static
    """The same for all members: the `Form` of the output, and the names of the model's own buffers that it updated."""


def combined(parts: list[Returned], leaves: Callable[[list[Any]], Any], buffers: Callable[..., Tensor]) -> Returned:
    """One `Returned` of several, whose output leaves are joined by `leaves` and whose buffers by `buffers`."""
    forms = [part.static.value[0] for part in parts]
    for form in forms[1:]:
        if repr(form) != repr(forms[0]):  # repr, because a NaN is not equal to itself
            raise TypeError(f"output: what is no tensor must be the same for all members, got {forms[0]} and {form}")
    updated = sorted({name for part in parts for name in part.static.value[1]})
    return Returned(
        [leaves(list(leaf)) for leaf in zip(*(part.tensors for part in parts), strict=True)],
        {name: buffers([part.buffers[name] for part in parts]) for name in parts[0].buffers},
        Static((forms[0], updated)),
    )


@dataclass(eq=False)
class Known:
    """What a forward knows of its model, from the model itself and from earlier calls."""

    anatomy: Anatomy
    templates: Templates
    settings: Settings
    written: set[str]
    """The names of what the model writes to in its own forward, besides buffers, as far as calls have shown."""
    takes_any_size: bool
    """Whether every layer is the same graph for any batch size under vmap."""
    unwatched: set[Hashable]
    """The kinds of calls in which the watch had nothing to do."""
    outside: list[Generator]
    """The generators that the model's code draws from, and that are not in its attributes."""

    def changed(self) -> str | None:
        """The name of a setting of the model that is not as the forward knows it; None where there is none."""
        return self.settings.changed(self.written)


class Call:
    """One call of a forward. Members return their results; nothing is written here."""

    def __init__(
        self,
        known: Known,
        modes: Modes,
        E: int,
        params: EnsembleParams,
        buffers: Mapping[str, Tensor] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        member_inputs: bool,
    ) -> None:
        inputs, self._arguments = take_apart((args, kwargs))
        if member_inputs:
            check_member_axis(inputs, E)
        self.E = E
        own = known.anatomy.own_buffers if buffers is None else {}
        self.members = Members(params.shared, params.stacked, dict(buffers or {}), own, inputs)
        self.member_inputs = member_inputs
        self.modes = modes
        self.is_traced = _torch.is_traced(inputs)
        self.notes: Notes | None = None
        self._begun: dict[torch.Generator, Tensor] = {}
        self._known = known
        if not self.is_traced:  # Dynamo would guard the set, which grows
            self._situation = self._known_situation()
            self.notes = None if self._situation in known.unwatched else Notes()
            self._generators = self._left = known.templates.generators
        self._returns_buffers = buffers is not None
        given = [] if _torch.is_compiling() else [*params.shared.items(), *params.stacked.items()]
        self._versions = [(name, tensor, _torch.version(tensor)) for name, tensor in given]

    def _known_situation(self) -> Hashable:
        """Key of a call: grad mode, modes, flags, shapes, constants. None where an argument is no such constant."""
        tensors = [*self.members.shared.values(), *self.members.stacked.values(), *self.members.inputs]
        constants = tuple(value for value in self._arguments.values if value is not ...)
        shapes = tuple((*x.shape, x.dtype) for x in self.members.inputs)
        if not all(value is None or isinstance(value, bool | int | float | str) for value in constants):
            return None
        flags = tuple(x.requires_grad for x in tensors)
        return torch.is_grad_enabled(), self.modes, flags, shapes, constants

    def begin_apart(self, notes: Notes | None) -> None:
        """Make this copy of a call one whose members leave nothing behind in the call itself."""
        self.notes, self._begun = notes, {}

    def end(self) -> None:
        """After a call: the generators of the model go on, and calls like it go without a watch that found nothing."""
        self._known.templates.generators = self._left
        if self.notes is not None and not self.notes.are_needed and self._situation is not None:
            self._known.unwatched.add(self._situation)

    def member(self, one: Members) -> Returned:
        """The output and the new buffers of one member."""
        # A forward may write to its inputs and buffers in place, so it gets copies of them.
        args, kwargs = self._arguments.rebuild(iter([x.clone() for x in one.inputs]))
        copies = {name: buffer.clone() for name, buffer in {**one.own, **one.buffers}.items()}
        weights = {**one.shared, **one.stacked}
        templates = self._known.templates
        if self.is_traced:
            output, new = templates.traced(self.modes, weights, copies, args, kwargs)
        else:
            template = templates.take()
            template.generators = self._generators  # all members begin where the call does, also in a backward pass
            try:
                with nullcontext() if self.notes is None else Alone(self.notes, self._begun, template.owns):
                    written = None if self.notes is None else self._known.written
                    output, new = template(self.modes, weights, copies, args, kwargs, written)
                self._left = template.generators
            except Exception:
                templates.idle.append(template)
                raise
            templates.idle.append(template)
        updated: list[str] = []
        if any(self.modes):
            # Dynamo cannot read the version counter of a tensor that grad wraps: it notices replaced buffers alone.
            versioned = not _torch.is_compiling()
            updated = [
                name
                for name in one.own
                if new[name] is not copies[name] or (versioned and _torch.version(copies[name]))
            ]
        tensors, form = take_apart(output, constants_only=True)
        return Returned(tensors, {name: new[name] for name in one.buffers}, Static((form, updated)))

    def result(self, returned: Returned) -> Any:
        """The output as the model gives it; with the new buffers where buffers were given."""
        form: Form
        form, updated = returned.static.value
        if updated:
            raise ValueError(update_lost(updated))
        output = form.rebuild(iter(returned.tensors))
        return (output, returned.buffers) if self._returns_buffers else output

    @property
    def outside(self) -> list[Generator]:
        """The generators that the model may draw from, and that are neither torch's nor in its attributes."""
        return [*self._known.outside, *global_generators()]

    def again(self) -> AbstractContextManager[None]:
        """Context for members that a backward pass computes again, which leaves generators as they were."""
        return unmoved(self._begun)

    def check_parameters(self) -> None:
        """ValueError, naming them, where the model has written to its parameters, and so to the caller's."""
        written = [name for name, tensor, version in self._versions if _torch.version(tensor) != version]
        if written:
            raise ValueError(
                f"model: {self._known.anatomy.kind} writes in place to its parameters {written}, which would change "
                "params; do that outside its forward"
            )

    def note(self) -> str:
        """A note for the model's own error: which inputs with which member axis it was called with."""
        given = [list(x.shape) for x in self.members.inputs]
        axis = (
            f"with member_inputs=True member i of {self.E} gets [i] of every tensor input [E, B, ...]"
            if self.member_inputs
            else f"each of the {self.E} members gets every input [B, ...] whole; member_inputs=True is for [E, B, ...]"
        )
        return f"functorch_ens: the model raised this for one member. The inputs have the shapes {given}: {axis}."


class Keywords(NamedTuple):
    """Which keyword arguments a model takes, as far as its signature says."""

    required: frozenset[str]
    accepted: frozenset[str]
    others: bool
    """Whether it takes any others, by `**kwargs`."""

    @classmethod
    def of(cls, model: nn.Module) -> Keywords:
        """None where the signature does not say: it hands on `*args`, is wrapped, or hooks may change the inputs."""
        try:
            arguments = inspect.signature(model.forward, follow_wrapped=False).parameters.values()
        except (TypeError, ValueError):  # written in C, or no signature at all
            arguments = {}.values()
        if _torch.forward_hooks_of(model) or any(a.kind is a.VAR_POSITIONAL for a in arguments):
            return cls(frozenset(), frozenset(), False)
        named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
        required = frozenset(a.name for a in arguments if a.default is a.empty and a.kind is not a.VAR_KEYWORD)
        return cls(required, frozenset(a.name for a in named), any(a.kind is a.VAR_KEYWORD for a in arguments))

    def take(self, given: Mapping[Any, Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the model can be called with the entries of `given` and with `kwargs` as its arguments.

        Raises TypeError where both have an argument of one name.
        """
        names = set(given)
        if not (names & self.accepted and self.required <= names | set(kwargs)):
            return False
        if not (self.others or names <= self.accepted):
            return False
        if twice := sorted(names & set(kwargs)):
            raise TypeError(f"{twice[0]}: expected once, got it in the batch and as a keyword argument of the step")
        return True


def check_member_axis(
    inputs: Iterable[Tensor], E: int, argument: str = "inputs", option: str = "member_inputs=True"
) -> None:
    """ValueError where one of `inputs` is not `[E, ...]`."""
    wrong = [list(x.shape) for x in inputs if x.ndim == 0 or x.shape[0] != E]
    if wrong:
        raise ValueError(
            f"{argument}: {option} expects every tensor to have a leading member axis of {E}, [E, B, ...]; got {wrong}"
        )


def update_lost(names: list[str]) -> str:
    """The message for buffers that the model updates although the caller did not ask for the new ones."""
    return (
        f"buffers: got None, but in training mode the model updates {names}; give buffers=ensemble_buffers(model, E) "
        "and keep the returned ones, or call model.eval()"
    )
