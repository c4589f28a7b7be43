"""The state of torch's global random generators, as it is put back for a computation that is done again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


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
