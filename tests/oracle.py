"""What the library must equal: a plain Python loop over members, each an ordinary network with its own weights.

Nothing here uses the library's arithmetic. A rank-1 weight is materialised entry by entry, from what `r` and `s` mean:
output channel o is scaled by r[o], input channel i by s[i]. A low-rank weight is W + B A, merged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cases import Conv1D, MixtralExperts, XLNetRelativeAttention
from plain import combined, opened, plain_loop
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

import functorch_ens as fe

# Relative to the largest value of a result. bfloat16 rounds every operation to 8 bits (4e-3), a few of which add up.
TOLERANCE = {torch.complex128: 1e-10, torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def compiler() -> str:
    """The backend of torch.compile to test with: where there is no C++ compiler, the one that needs none."""
    found = any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), "g++", "clang++"))
    return "inductor" if found else "aot_eager"


def compile_whole(function: Any) -> Any:
    """`function` compiled without a graph break."""
    return torch.compile(function, fullgraph=True, backend=compiler())


def both_kinds(model: nn.Module, E: int) -> list[fe.EnsembleParams]:
    """A classic ensemble and a BatchEnsemble whose members all differ."""
    classic = fe.ensemble_params(model, E, reset=False)
    for stack in classic.stacked.values():
        with torch.no_grad():
            stack += 0.3 * torch.randn_like(stack)
    return [classic, fe.batchensemble_params(model, E, bias="stacked")]


def low_rank(model: nn.Module, E: int, rank: int, rank1: bool) -> fe.EnsembleParams:
    """A LoRA ensemble whose members all differ; with `rank1` it has `r` and `s` too, and its base is trained."""
    given = fe.lora_params(model, E, rank=1)
    stacked = {}
    for name, stack in given.stacked.items():
        shape = (E, rank, stack.shape[-1]) if name.endswith("_A") else (E, stack.shape[1], rank)
        stacked[name] = torch.randn(shape, dtype=torch.float64).to(stack).requires_grad_()
    both = fe.batchensemble_params(model, E)
    return fe.EnsembleParams(both.shared, stacked | both.stacked) if rank1 else fe.EnsembleParams(given.shared, stacked)


def tensors_of(params: fe.EnsembleParams) -> dict[str, Tensor]:
    return {**params.shared, **params.stacked}


def materialise(module: nn.Module, weight: Tensor, r: Tensor, s: Tensor, leaf: str = "weight") -> Tensor:
    """`W * (r s^T)` for a weight of `module`: which r and which s belong to each (axis 0, axis 1), one at a time."""
    if isinstance(module, MixtralExperts):
        first, second = (s, r) if module.is_transposed else (r, s)
        parts = zip(weight, first.chunk(len(weight)), second.chunk(len(weight)), strict=True)
        return torch.stack([W * torch.outer(a, b) for W, a, b in parts])
    if isinstance(module, XLNetRelativeAttention):
        width, heads, size = weight.shape
        inside, outside = (s, r) if leaf == "o" else (r, s)  # by head and size; by place in the model
        return torch.stack([weight[i] * outside[i] * inside.view(heads, size) for i in range(width)])
    groups = getattr(module, "groups", 1)
    rows, columns = weight.shape[:2]
    outputs, inputs = [], []
    for a in range(rows):
        group = a // (rows // groups)
        for b in range(columns):
            if isinstance(module, _ConvTransposeNd):  # [in, out / groups, ...]
                output, into = group * columns + b, a
            elif isinstance(module, _ConvNd):  # [out, in / groups, ...]
                output, into = a, group * columns + b
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag | Conv1D):  # [vocabulary, embedding], [in, out]
                output, into = b, a
            else:  # [out, in, ...]
                output, into = a, b
            outputs.append(output)
            inputs.append(into)
    scale = r[torch.tensor(outputs)] * s[torch.tensor(inputs)]
    return weight * scale.reshape(rows, columns, *[1] * (weight.ndim - 2))


def merge(module: nn.Module, weight: Tensor, A: Tensor, B: Tensor, leaf: str = "weight") -> Tensor:
    """`W + B A` for a weight of `module`: axis 0 is the output, and the others the input; or the other way round."""
    if isinstance(module, MixtralExperts):
        n = len(weight)
        own = [(B @ a).T for a in A.chunk(n, 1)] if module.is_transposed else [b @ A for b in B.chunk(n)]
        return weight + torch.stack(own)
    if isinstance(module, XLNetRelativeAttention):
        return weight + (B @ A if leaf == "o" else (B @ A).T).view(weight.shape)
    if isinstance(module, _ConvTransposeNd | nn.Embedding | nn.EmbeddingBag | Conv1D):
        return weight + torch.einsum("ki,ok->io", A, B).reshape(weight.shape)
    return weight + torch.einsum("ok,ki->oi", B, A).reshape(weight.shape)


def member_weights(model: nn.Module, params: fe.EnsembleParams, i: int) -> dict[str, Tensor]:
    """The weights of member i by their first names, differentiable in `params`."""
    tensors = {**params.shared, **{name: stack[i] for name, stack in params.stacked.items()}}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # max_norm writes to what it is given
    weights = {}
    for name, _ in model.named_parameters():
        weights[name] = tensors[name]
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if f"{name}_lora_A" in tensors:
            weights[name] = merge(owner, weights[name], tensors[f"{name}_lora_A"], tensors[f"{name}_lora_B"], leaf)
        if f"{name}_r" in tensors:
            weights[name] = materialise(owner, weights[name], tensors[f"{name}_r"], tensors[f"{name}_s"], leaf)
    return weights


def loop(
    model: nn.Module,
    params: fe.EnsembleParams,
    *args: Any,
    buffers: dict[str, Tensor] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Every member called as an ordinary network, on a copy of `model`; outputs, and new buffers, stacked."""
    weights = [member_weights(model, params, i) for i in range(params.E)]
    output, new = plain_loop(model, weights, buffers or {}, args, kwargs, seed)
    return output if buffers is None else (output, new)


def gradients(call: Callable[..., Any], params: fe.EnsembleParams, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The gradient, in every parameter, of a fixed random combination of all outputs of `call(params, *args)`."""
    return gradients_of(call(params, *args, **kwargs), params)


def gradients_of(result: Any, params: fe.EnsembleParams) -> dict[str, Tensor]:
    """The gradient, in every parameter, of a fixed random combination of all tensors in `result`."""
    total = combined(result)
    assert total is not None
    trained = {name: tensor for name, tensor in tensors_of(params).items() if tensor.requires_grad}
    total.backward()  # autograd.grad() fails with reentrant checkpointing
    found = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in trained.items()}
    for tensor in trained.values():
        tensor.grad = None
    return found


def _opened(value: Any) -> Any:
    """A pytree in which dataclasses are dicts of their fields."""
    return pytree.tree_map(opened, value)


def assert_same(got: Any, want: Any, tolerance: float | None = None, floor: float = 1e-30) -> None:
    """Equal pytrees, within `tolerance` (or the dtype's) of the largest value in them, or `floor`, and of one form."""
    got_leaves, got_spec = pytree.tree_flatten(_opened(got))
    want_leaves, want_spec = pytree.tree_flatten(_opened(want))
    assert got_spec == want_spec
    numbers = [leaf.detach().abs().max().item() for leaf in want_leaves if isinstance(leaf, Tensor) and leaf.numel()]
    scale = max([floor, *numbers])
    for mine, theirs in zip(got_leaves, want_leaves, strict=True):
        if not isinstance(theirs, Tensor):
            assert repr(mine) == repr(theirs)  # a NaN is not equal to itself
            continue
        allowed = tolerance if tolerance is not None else TOLERANCE.get(theirs.dtype, 0.0)
        # Of the largest value of the whole result: a leaf of zeros is a sum that cancels.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=allowed * scale)


def snapshot(*objects: Any) -> list[Any]:
    """Copies of all tensors in modules and pytrees, to compare with `assert_untouched`."""
    return [
        [(name, tensor, tensor.detach().clone(), tensor._version) for name, tensor in _tensors(each)]
        for each in objects
    ]


def assert_untouched(before: list[Any], *objects: Any) -> None:
    """That `objects` hold the very tensors that they held, with the same values, not written to."""
    for saved, each in zip(before, objects, strict=True):
        now = list(_tensors(each))
        assert [name for name, *_ in saved] == [name for name, _ in now]
        for (name, tensor, value, version), (_, current) in zip(saved, now, strict=True):
            assert current is tensor and current._version == version, f"{name} was written to"
            assert torch.equal(current, value) or current.isnan().any(), f"{name} changed"


def _tensors(value: Any) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        yield from value.named_parameters()
        yield from value.named_buffers()
    else:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                yield pytree.keystr(path), leaf
