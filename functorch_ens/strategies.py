"""How the members of a call are computed: all at once, or one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import vmap

from functorch_ens.call import Call

Members = tuple[list[Tensor], dict[str, Tensor]]
"""The tensors of the members' outputs and their new buffers, stacked: `[E, ...]` each."""


def run_vmap(call: Call, chunk_size: int | None, randomness: str) -> Members:
    """All members at once, `chunk_size` at a time."""
    in_dims = (0, 0, 0 if call.member_inputs else None)
    run = vmap(call.member, in_dims=in_dims, randomness=randomness, chunk_size=chunk_size)
    return run(call.stacked, call.buffers or {}, call.inputs)


def run_loop(call: Call, randomness: str) -> Members:
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
