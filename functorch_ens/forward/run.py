"""How the members of a call are computed: all at once, or one after another; whole, or a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from functorch_ens.forward.call import Call
from functorch_ens.forward.owned import Owned
from functorch_ens.forward.recompute import recomputed
from functorch_ens.rng import RandomState

Members = tuple[list[Any], dict[str, Tensor]]
"""The tensors of the members' outputs and their new buffers, stacked: `[E, ...]` each.

An output whose shape differs between members (the boxes that a detector finds) is a list of E tensors."""


class Slice(NamedTuple):
    """What some of the members compute with; `stacked`, `buffers` and, with member_inputs, `inputs` are `[k, ...]`."""

    shared: dict[str, Tensor]
    stacked: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: list[Tensor]


class Plan(NamedTuple):
    """How to compute the members."""

    strategy: str
    chunk_size: int | None
    randomness: str
    owned: bool = False
    """Under vmap: whether every tensor that the model makes is each member's own from the start."""


def run(call: Call, plan: Plan) -> Members:
    """All members of `call`, as `plan` says."""
    everything = Slice(call.shared, call.stacked, call.buffers or {}, call.inputs)
    compute = _at_once if plan.strategy == "vmap" else _one_by_one
    size = plan.chunk_size
    if size is None or size >= call.E:
        return compute(call, plan, everything)
    # What is computed again reads the buffers of now, whatever the caller writes to them in between.
    everything = everything._replace(buffers={name: buffer.clone() for name, buffer in everything.buffers.items()})
    chunks = _split(everything, size, call.member_inputs)
    results = []
    for index, chunk in enumerate(chunks):
        with _random(plan.randomness, last=index == len(chunks) - 1, chunk=chunk):
            results.append(recomputed(lambda part: compute(call, plan, part), chunk, call.replay))
    leaves = [_join(parts) for parts in zip(*(leaves for leaves, _ in results), strict=True)]
    return leaves, {name: torch.cat([new[name] for _, new in results]) for name in everything.buffers}


def _at_once(call: Call, plan: Plan, members: Slice) -> Members:
    """By vmap."""
    stacked, buffers, inputs = members.stacked, members.buffers, members.inputs
    own = [*stacked.values(), *buffers.values(), *(inputs if call.member_inputs else [])]

    # Flat, and only what is each member's own: torch.compile takes its time to look through what vmap does with trees.
    def member(*own: Tensor) -> Any:
        rest = iter(own)
        stacked_of_one, buffers_of_one = (dict(zip(stacks, rest, strict=False)) for stacks in (stacked, buffers))
        return call.member(members.shared, stacked_of_one, buffers_of_one, list(rest) if call.member_inputs else inputs)

    if not plan.owned:
        return vmap(member, randomness=plan.randomness)(*own)

    def owning(zero: Tensor, *own: Any) -> Any:
        with Owned(zero):
            return member(*own)

    zeros = torch.zeros(len(own[0]), device=own[0].device)
    return vmap(owning, randomness=plan.randomness)(zeros, *own)


def _one_by_one(call: Call, plan: Plan, members: Slice) -> Members:
    """By a loop."""
    parts = _split(members, None, call.member_inputs)
    results = []
    for index, part in enumerate(parts):
        with _random(plan.randomness, last=index == len(parts) - 1, chunk=part):
            results.append(call.member(*part))
    leaves = [_stack(list(leaf)) for leaf in zip(*(leaves for leaves, _ in results), strict=True)]
    return leaves, {name: torch.stack([new[name] for _, new in results]) for name in members.buffers}


def _split(members: Slice, size: int | None, member_inputs: bool) -> list[Slice]:
    """`members` in slices of `size`; of None, each alone and without the leading axis.

    Not by indexing: the backward pass of split and unbind writes every gradient once, where E indexings would add up E
    of full size.
    """

    def cut(tensor: Tensor) -> tuple[Tensor, ...]:
        if size is None:  # squeeze, since the gradient of unbind is a copy even of one
            return tensor.unbind() if len(tensor) > 1 else (tensor.squeeze(0),)
        return tensor.split(size)

    stacked = {name: cut(tensor) for name, tensor in members.stacked.items()}
    buffers = {name: cut(tensor) for name, tensor in members.buffers.items()}
    count = len(next(iter(stacked.values())))
    inputs = [cut(x) if member_inputs else (x,) * count for x in members.inputs]
    return [
        Slice(
            members.shared,
            {name: parts[i] for name, parts in stacked.items()},
            {name: parts[i] for name, parts in buffers.items()},
            [parts[i] for parts in inputs],
        )
        for i in range(count)
    ]


def _stack(leaves: list[Tensor]) -> Any:
    """One output of every member: `[k, ...]`, or as they are where their shapes differ."""
    return torch.stack(leaves) if len({leaf.shape for leaf in leaves}) == 1 else leaves


def _join(parts: tuple[Any, ...]) -> Any:
    """One output of every chunk."""
    if all(isinstance(part, Tensor) for part in parts) and len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    return [leaf for part in parts for leaf in part]


@contextmanager
def _random(randomness: str, last: bool, chunk: Slice) -> Iterator[None]:
    """What vmap's `randomness` means for one of several parts: draws of its own, the same as the others', or none."""
    if randomness == "different":
        yield
        return
    before = RandomState.of(chunk)
    yield
    if not before.equals(RandomState.of(chunk)):
        if randomness == "error":
            raise RuntimeError('randomness="error": the model drew random numbers; "different" and "same" allow it')
        if not last:
            before.restore()
