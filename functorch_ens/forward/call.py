"""One call of an ensemble's forward: what a member computes in it, and how the members' results go together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from functorch_ens.forward.template import Template
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.trees import Form, take_apart

_LOCK = threading.RLock()


class Call:
    """One call of a forward: what a single member computes in it, and how the members' results go together."""

    def __init__(
        self,
        template: Template,
        E: int,
        params: EnsembleParams,
        buffers: Mapping[str, Tensor] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        member_inputs: bool,
    ) -> None:
        self.E = E
        self.shared = params.shared
        self.stacked = params.stacked
        self.buffers = None if buffers is None else dict(buffers)
        self.inputs, self._arguments = take_apart((args, kwargs))
        self.member_inputs = member_inputs
        self.modes = template.modes()
        self._template = template
        self._own_buffers = template.own_buffers() if buffers is None else {}
        given = [] if torch.compiler.is_compiling() else [*params.shared.items(), *params.stacked.items()]
        self._versions = [(name, tensor, tensor._version) for name, tensor in given]
        if member_inputs:
            check_member_axis(self.inputs, E)
        self._form: Form | None = None  # of the output
        self._lost: set[str] = set()  # the model's own buffers that it has updated

    def member(
        self, shared: dict[str, Tensor], stacked: dict[str, Tensor], buffers: dict[str, Tensor], inputs: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One member's output, as a flat list of its tensors, and its new buffers."""
        # A forward may write to its inputs and buffers in place: to copies, never to what was passed in.
        args, kwargs = self._arguments.rebuild(iter([x.clone() for x in inputs]))
        copies = {name: buffer.clone() for name, buffer in {**self._own_buffers, **buffers}.items()}
        output, new = self._template({**shared, **stacked}, copies, args, kwargs)
        if any(self.modes):  # torch.compile cannot read the version of what grad wraps, and sees only what is replaced
            versioned = not torch.compiler.is_compiling()
            self._lost |= {
                name
                for name in self._own_buffers
                if new[name] is not copies[name] or (versioned and copies[name]._version)
            }
        values, form = take_apart(output, constants_only=True)
        if self._form is not None and repr(self._form) != repr(form):  # repr: a NaN is not equal to itself
            raise TypeError(f"output: what is no tensor must be the same for all members, got {self._form} and {form}")
        self._form = form
        return values, {name: new[name] for name in buffers}

    def result(self, tensors: list[Any], buffers: dict[str, Tensor]) -> Any:
        """The output as the model gives it, from its stacked `tensors`; with the new buffers where they were given."""
        if self._lost:
            raise ValueError(update_lost(sorted(self._lost)))
        assert self._form is not None
        output = self._form.rebuild(iter(tensors))
        return output if self.buffers is None else (output, buffers)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """The template in the modes of this call, and for it alone: it holds the tensors that it is called with."""
        with nullcontext() if torch.compiler.is_compiling() else _LOCK:
            self._template.follow(self.modes)
            yield

    def check_parameters(self) -> None:
        """ValueError, naming them, where the model has written to its parameters, and so to the caller's."""
        written = [name for name, tensor, version in self._versions if tensor._version != version]
        if written:
            raise ValueError(
                f"model: {self._template.kind} writes in place to its parameters {written}, which would change params; "
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


def check_member_axis(inputs: Iterable[Tensor], E: int) -> None:
    """ValueError where one of `inputs` is not `[E, ...]`."""
    wrong = [list(x.shape) for x in inputs if x.ndim == 0 or x.shape[0] != E]
    if wrong:
        raise ValueError(
            f"inputs: member_inputs=True expects every tensor to have a leading member axis of {E}, [E, B, ...]; "
            f"got {wrong}"
        )


def update_lost(names: list[str]) -> str:
    """What to say of buffers that a model has updated where nobody gets the new ones."""
    return (
        f"buffers: got None, but in training mode the model updates {names}; give buffers=ensemble_buffers(model, E) "
        "and keep the returned ones, or call model.eval()"
    )
