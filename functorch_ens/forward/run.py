"""Compute all members of a call: whole, or in chunks that the backward pass computes again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_ens.forward.call import Call, Returned, combined
from functorch_ens.forward.plans import Plan
from functorch_ens.forward.recompute import recomputed
from functorch_ens.rng import Parts


def run(call: Call, plan: Plan) -> Returned:
    """The outputs and new buffers of all members of `call`, computed by `plan`."""
    everything, size = call.members, plan.chunk_size
    if size is None or size >= call.E:
        return plan.compute(call, everything)
    # Clone the buffers: backward recomputes from them, and the caller may have overwritten them by then.
    everything = everything._replace(buffers=_cloned(everything.buffers), own=_cloned(everything.own))
    chunks = everything.split(size, call.member_inputs)
    parts = Parts(plan.randomness, chunks[0])
    returned = []
    for index, chunk in enumerate(chunks):
        with parts.part(last=index == len(chunks) - 1):
            returned.append(recomputed(lambda chunk: plan.compute(call, chunk), chunk, call.again, call.outside))
    return combined(returned, _join, torch.cat)


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _join(parts: list[Any]) -> Any:
    """One output of every chunk: `[E, ...]`, or a list of E where the members' shapes differ."""
    if all(isinstance(part, Tensor) for part in parts) and all(part.shape[1:] == parts[0].shape[1:] for part in parts):
        return torch.cat(parts)
    return [leaf for part in parts for leaf in part]
