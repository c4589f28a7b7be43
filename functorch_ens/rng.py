"""The state of torch's global random generators, as it is put back for a computation that is done again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

MAX_SEED = 2**63 - 1


class RandomState(NamedTuple):
    """The states of the CPU's generator, and of those of CUDA devices."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def of(cls, tensors: Any) -> RandomState:
        """The state now, of the devices that a pytree of `tensors` is on."""
        devices = {leaf.device for leaf in pytree.tree_leaves(tensors)}
        cuda = sorted(device.index for device in devices if device.type == "cuda")
        return cls(torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in cuda})

    def restore(self) -> None:
        """Make it the state again."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def equals(self, other: RandomState) -> bool:
        """Whether no random numbers have been drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(state, other.cuda[index]) for index, state in self.cuda.items()
        )


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator seeded by one draw from `generator`, or from torch's global one where it is None.

    All initialisation runs on the CPU, so that the same generator state gives the same parameters on every device.
    """
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(MAX_SEED, (), generator=generator, device=device)
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators, and put them back as they were."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
