"""`chunk_size="auto"`: how many members to compute at once, from the memory that one of them writes."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from functorch_ens._torch import TorchDispatchMode, pytree
from functorch_ens.forward.call import Call
from functorch_ens.forward.plans import Plan
from functorch_ens.forward.recompute import going_on_from
from functorch_ens.forward.watch import Notes
from functorch_ens.rng import drawing_apart

ON_CPU = 32 * 2**20
"""The bytes of a chunk on a CPU. glibc maps a tensor above 32 MiB anew at each allocation, so its pages fault again in
every call; benchmarks/growth.py measures what that costs."""
OF_GPU = 0.25
"""The share of a GPU's free memory that a chunk may take: a backward pass needs about twice what the forward writes."""


class MeasuredChunks:
    """Sizes of chunks, from the bytes of one member: what its forward writes, and the gradients of its parameters.

    The bytes are measured once for each kind of call, with the first two members. Batches whose sizes have the same
    power of two below them are of one kind.
    """

    reason: str = ""
    """Why the last size was chosen."""

    def __init__(self) -> None:
        self._most: dict[Hashable, tuple[int, int]] = {}
        """For each kind of call, the bytes of a member, and those that a chunk may take."""

    def size(self, plan: Plan, call: Call) -> int | None:
        """How many members of `call` to compute at a time. None: all."""
        members, E = call.members, call.E
        device = next(iter(members.stacked.values())).device
        if device.type not in ("cpu", "cuda") or (plan.one_by_one and device.type == "cpu"):
            how = "by the loop" if plan.one_by_one else f"on {device.type}"
            self.reason = f"all members are one chunk {how}"
            return None
        rows = sum(x.numel() for x in members.inputs) // (E if call.member_inputs else 1)
        kind = (plan, tuple(members.stacked), rows.bit_length(), device)
        if kind not in self._most:
            gradients = sum(stack.nbytes // E for stack in members.stacked.values())
            self._most[kind] = gradients + _written(plan, call), _budget(device)
        one, budget = self._most[kind]
        size = _even(E, max(1, budget // max(one, 1)))
        self.reason = f"one takes {one / 2**20:.3g} MiB, and a chunk on {device.type} may take {budget / 2**20:.4g} MiB"
        return size if size < E else None


def _even(E: int, most: int) -> int:
    """The size of equal parts of E members: parts of one size share a compiled graph. Else of parts as equal as can be.

    Equal parts are taken where they are at least half as large as they may be.
    """
    divisors = [size for size in range(1, min(most, E) + 1) if E % size == 0]
    return divisors[-1] if 2 * divisors[-1] >= min(most, E) else -(-E // -(-E // most))


def _budget(device: torch.device) -> int:
    """The bytes that a chunk may take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(OF_GPU * (torch.cuda.mem_get_info(device)[0] + unused))
    return ON_CPU


def _written(plan: Plan, call: Call) -> int:
    """The bytes that the forward of one member writes; all random state stays as it is."""
    probe = copy.copy(call)
    probe.begin_apart(None if call.notes is None else Notes())
    two = call.members.split(2, call.member_inputs)[0]
    tensors = [*two.shared.values(), *two.stacked.values()]
    states = [(each, each.read()) for each in call.outside]
    with torch.no_grad(), going_on_from(states), drawing_apart(tensors, hand_back=False), _Writes() as writes:
        plan.compute(probe, two)
    # The call copies inputs, and under vmap both members share the copy.
    copies = 0 if call.member_inputs else sum(x.nbytes for x in two.inputs) * (2 if plan.one_by_one else 1)
    return max(0, writes.bytes - copies) // len(next(iter(two.stacked.values())))


class _Writes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(x) for x in pytree.tree_leaves((args, kwargs)) if _has_memory(x)}
        self.bytes += sum(x.nbytes for x in pytree.tree_leaves(result) if _has_memory(x) and _address(x) not in given)
        return result


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
