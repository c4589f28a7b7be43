"""The ways to compute the members of a call, as objects, and the order in which they are tried."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from functorch_ens.forward.call import Call, Members, Returned, combined
from functorch_ens.forward.watch import InsideMode, watched_vmap
from functorch_ens.rng import Parts

STRATEGIES = ("auto", "vmap", "loop")
"""What `make_forward(strategy=...)` takes."""


@dataclass(frozen=True)
class Plan(ABC):
    """One way to compute the members of a call."""

    randomness: str
    chunk_size: int | None
    probe: bool = False
    """Used only for diagnosis: if this plan works, vmap is at fault, and the caller gets an error."""

    strategy: ClassVar[str]
    """What users call it: `"vmap"` or `"loop"`."""
    one_by_one: ClassVar[bool] = False
    """Whether a layer computes one member at a time."""
    level: ClassVar[int] = logging.INFO
    """The level at which a change to this plan is logged."""

    @abstractmethod
    def compute(self, call: Call, members: Members) -> Returned:
        """The outputs and new buffers of `members`, stacked."""

    @abstractmethod
    def reason(self, where: str) -> str:
        """Why this plan is in use after vmap failed in `where`."""

    def at_a_time(self, E: int) -> int:
        """How many of E members a train step computes at a time: all, where parts would draw other random numbers."""
        return min(self.chunk_size or E, E) if self.randomness == "different" else E

    def of_size(self, chunk_size: int | None) -> Plan:
        """This plan, for so many members at a time."""
        return type(self)(self.randomness, chunk_size, self.probe)

    def for_own_convolutions(self) -> Plan:
        """The plan to compile on a CPU if convolution weights are stacked."""
        return self

    def for_any_size(self) -> Plan:
        """The plan to compile for inputs of all sizes, where vmap would make a graph for each."""
        return self


class Vmap(Plan):
    """All members at once, by `torch.func.vmap`."""

    strategy = "vmap"

    def compute(self, call: Call, members: Members) -> Returned:
        return self._mapped(self._one(call, members), _own(call, members), members, call)

    def reason(self, where: str) -> str:
        return "nothing in the model is known to need the loop"

    def for_own_convolutions(self) -> Plan:
        # vmap makes them one grouped convolution, which is slow on CPUs, and their norms more passes over memory.
        return Loop(self.randomness, self.chunk_size)

    def for_any_size(self) -> Plan:
        return Loop(self.randomness, self.chunk_size)

    def _mapped(self, function: Callable[..., Any], own: list[Tensor], members: Members, call: Call) -> Returned:
        keep = [*members.shared.values(), *members.stacked.values()]
        return Returned(*watched_vmap(function, own, randomness=self.randomness, keep=keep, notes=call.notes))

    def _one(self, call: Call, members: Members) -> Callable[..., Any]:
        """One member as a function of flat tensors, which Dynamo traces faster than pytrees."""
        stacked, buffers = members.stacked, members.buffers

        def member(*own: Tensor) -> Any:
            rest = iter(own)
            of_one = [dict(zip(stacks, rest, strict=False)) for stacks in (stacked, buffers)]
            inputs = list(rest) if call.member_inputs else members.inputs
            return tuple(call.member(Members(members.shared, of_one[0], of_one[1], members.own, inputs)))

        return member


class HelpedVmap(Vmap):
    """vmap, with every tensor that the model creates made batched from the start, and masks that can be trained.

    vmap takes a new tensor for one that all members share, and so refuses to write one member's values, or random
    numbers that differ between members, into it. And attention asks its mask whether it has a gradient, to choose a
    kernel that gives it one; a batched mask says no.
    """

    def compute(self, call: Call, members: Members) -> Returned:
        member, own = self._one(call, members), _own(call, members)

        def owning(zero: Tensor, *own: Tensor) -> Any:
            with _Helping(zero):
                return member(*own)

        zeros = torch.zeros(len(own[0]), device=own[0].device)
        return self._mapped(owning, [zeros, *own], members, call)

    def reason(self, where: str) -> str:
        return f"with new tensors and attention masks made each member's own, for without that vmap failed in {where}"


class Loop(Plan):
    """One member after another: this works for any model."""

    strategy = "loop"
    one_by_one = True
    level = logging.WARNING

    def compute(self, call: Call, members: Members) -> Returned:
        returned = []
        singles = members.split(None, call.member_inputs)
        parts = Parts(self.randomness, singles[0])
        for index, single in enumerate(singles):
            with parts.part(last=index == len(singles) - 1):
                returned.append(call.member(single))
        return combined(returned, _stack, torch.stack)

    def reason(self, where: str) -> str:
        return f"vmap failed in {where}"

    def at_a_time(self, E: int) -> int:
        return 1 if self.randomness == "different" else E


def plans_for(strategy: str, randomness: str, chunk_size: int | None, obstacle: str | None) -> list[Plan]:
    """The plans to try, in order. The last one is the loop, which works wherever the model itself does.

    `obstacle` says what in the model vmap is known not to serve. RuntimeError where the strategy is vmap all the same.
    """
    if strategy == "vmap" and obstacle:
        raise RuntimeError(f'strategy: got "vmap", but {obstacle}; strategy="loop" can')
    loop = Loop(randomness, chunk_size, probe=strategy == "vmap")
    if strategy == "loop" or obstacle:
        return [loop]
    return [Vmap(randomness, chunk_size), HelpedVmap(randomness, chunk_size), loop]


def _own(call: Call, members: Members) -> list[Tensor]:
    """The stacked tensors of `members`, as one flat list."""
    return [*members.stacked.values(), *members.buffers.values(), *(members.inputs if call.member_inputs else [])]


def _stack(leaves: list[Tensor]) -> Any:
    """One output of every member: `[k, ...]`, or a list where the members' shapes differ."""
    return torch.stack(leaves) if all(leaf.shape == leaves[0].shape for leaf in leaves) else leaves


_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name + suffix) for name in ("empty", "zeros", "ones", "full") for suffix in ("", "_like")
) | frozenset(getattr(Tensor, f"new_{name}") for name in ("empty", "zeros", "ones", "full"))


class _Helping(InsideMode):
    """Adds a batched zero to every new tensor, which makes it batched; gives attention the kernel for any mask."""

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self._zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None and mask.is_floating_point():
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
        made = self.call(func, args, kwargs)
        if func not in _FACTORIES:
            return made
        zero = self._zero.to(made.device)
        return made | (zero != 0) if made.dtype == torch.bool else made + zero.to(made.dtype)
