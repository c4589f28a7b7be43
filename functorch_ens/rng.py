"""Everything that touches random state: seeds, and torch's global generators saved and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_ens._torch import outside_transforms, pytree

MAX_SEED = 2**63 - 1


class RandomState(NamedTuple):
    """The states of the CPU's global generator, and of those of CUDA devices."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def of(cls, tensors: Any) -> RandomState:
        """The present state of the generators for the devices of a pytree of `tensors`."""
        devices = {leaf.device for leaf in pytree.tree_leaves(tensors)}
        cuda = sorted(device.index for device in devices if device.type == "cuda")
        return cls(torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in cuda})

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def equals(self, other: RandomState) -> bool:
        """Whether no random numbers have been drawn between the two states."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(state, other.cuda[index]) for index, state in self.cuda.items()
        )


class Reseeding:
    """Whether torch's global generator has been seeded anew since this object was made, until `end`.

    The generator remembers its seed, and draws from the rest of its state. In the meantime it remembers another number,
    so that the same seed is noticed too.
    """

    def __init__(self) -> None:
        with outside_transforms():
            self._seed = torch.get_rng_state()[:_SEED].clone()
            _mark(self._seed ^ 0x55)
        self._expected = torch.initial_seed()

    def happened(self) -> bool:
        """Whether the generator has another seed now."""
        return torch.initial_seed() != self._expected

    def end(self) -> None:
        """Give the generator its seed back, if nothing else has seeded it."""
        if not self.happened():
            _mark(self._seed)


_SEED = 8
"""The state of the CPU's generator begins with the seed that it remembers, of so many bytes."""


def _mark(seed: Tensor) -> None:
    with outside_transforms():  # torch.func.grad would refuse to write to a tensor of its surroundings
        torch.set_rng_state(torch.cat([seed, torch.get_rng_state()[_SEED:]]))


@contextmanager
def drawing_from(source: RandomState | int) -> Iterator[None]:
    """Inside, the global generators draw from `source`, a state or a seed; afterwards they are as they were before."""
    if isinstance(source, RandomState):
        cuda = list(source.cuda)
    else:
        cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        if isinstance(source, RandomState):
            source.restore()
        else:
            torch.default_generator.manual_seed(source)
            if cuda:
                torch.cuda.manual_seed_all(source)
        yield


@contextmanager
def repeatable(randomness: str, tensors: Any, *, last: bool) -> Iterator[None]:
    """What vmap's `randomness` means for one of several parts of a computation, the `last` of them or not.

    `"different"`: the next part draws other numbers. `"same"`: it draws the same ones again. `"error"`: RuntimeError
    where this part draws any.
    """
    if randomness == "different":
        yield
        return
    before = RandomState.of(tensors)
    yield
    if before.equals(RandomState.of(tensors)):
        return
    if randomness == "error":
        raise RuntimeError('randomness="error": the model drew random numbers; "different" and "same" allow it')
    if not last:
        before.restore()


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator seeded by one draw from `generator`, or from torch's global one where it is None.

    All initialisation runs on the CPU, so that the same generator state gives the same parameters on every device.
    """
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(MAX_SEED, (), generator=generator, device=device)
    return torch.Generator().manual_seed(int(seed))
