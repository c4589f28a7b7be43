"""Products of a shared tensor and a stacked one, each computed in the cheapest of several equal ways.

Under vmap the weight or the input of a layer is either shared by all members or a stack of E. Which of the two is
stacked, and the shapes, decide which way is cheapest. Only a vmap rule sees both, so `product` and `scaled` are
operators of `torch.library` with a vmap rule each. For one member they are plain arithmetic, which torch.func, autograd
and torch.compile decompose.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_ens._torch import is_batched, is_compiling
from functorch_ens.anatomy import Layout

SIDES = ("auto", "activation", "weight")
"""Where a layer multiplies its `s` in: its input, its weight, or whichever is cheaper."""

FEW = 2**14
"""In eager mode, for inputs of fewer numbers, calling an operator from Python costs more than the operator saves."""

_LIBRARY = torch.library.Library("functorch_ens", "FRAGMENT")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` as one product of two matrices."""
    x, weight, bias = autocast(x, weight, bias)
    if x.ndim < 3:
        y = product(x, weight)
    else:
        y = product(x.flatten(0, -2), weight).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def pointwise(x: Tensor, matrix: Tensor, groups: int, spatial: int) -> Tensor:
    """Mix the channels of `x` `[..., channels, *spatial]` by `matrix` `[out, channels / groups]`, in each group apart.

    With spatial axes this is a convolution with a kernel of size 1. It is a product of matrices here, which vmap
    computes without moving the member axis of `x`.
    """
    if groups == 1 and not spatial:
        return linear(x, matrix)
    lead, places = x.shape[: x.ndim - 1 - spatial], x.shape[x.ndim - spatial :]
    rows = x.reshape(*lead, groups, matrix.shape[1], prod(places))
    y = rearrange(matrix, "(g o) c -> g o c", g=groups) @ rows
    return y.reshape(*lead, matrix.shape[0], *places)


def autocast(*tensors: Any) -> Any:
    """The arguments of an operation in the dtype of autocast: inside vmap autocast does not reach every operation."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer without its bias: `x` `[B, I]` or `[I]` and `weight` `[O, I]` to `[B, O]` or `[O]`."""
    if not _is_choice(x, weight):
        return F.linear(x, weight)
    return torch.ops.functorch_ens.product(x, weight)


def _is_choice(x: Tensor, own: Tensor) -> bool:
    """Whether the vmap rule has a choice: `x` is shared by all members, and `own` is stacked.

    Dynamo cannot trace the question. A compiled graph always calls the operator, which costs nothing there.
    """
    if is_compiling():
        return True
    return not _is_less(x.numel(), FEW) and is_batched(own) and not is_batched(x)


def _is_less(size: int, other: int) -> bool:
    """`size < other`; False where `size` is a symbol, so that a graph for all sizes gets no guard on it."""
    return not isinstance(size, torch.SymInt) and size < other


def _product_of_members(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """The vmap rule of `product`; the member axis of the result is the first."""
    x_dim, weight_dim = in_dims
    if weight_dim is None:
        assert x_dim is not None
        return F.linear(x.movedim(x_dim, 0), weight), 0  # [E, B, I] x [I, O]: the members are rows
    weight = weight.movedim(weight_dim, 0)
    if x_dim is not None:
        x = x.movedim(x_dim, 0)
    vector = x.ndim == (1 if x_dim is None else 2)
    if vector:
        x = rearrange(x, "... i -> ... 1 i")
    if _is_less(x.shape[-2], max(weight.shape[1:])):
        # Few rows: with the rows as columns, [E, O, I] x [I, B], the gradient of the weight is contiguous already.
        y = rearrange(weight @ x.mT, "e o b -> e b o").contiguous()
    elif x_dim is not None:
        y = x @ weight.mT
    else:
        # The members are columns, [B, I] x [I, E O]. A batched product would read the input E times.
        y = rearrange(F.linear(x, rearrange(weight, "e o i -> (e o) i")), "b (e o) -> e b o", e=info.batch_size)
    return (rearrange(y, "e 1 o -> e o") if vector else y), 0


def scaled(x: Tensor, weight: Tensor, s: Tensor, layout: Layout, side: str) -> tuple[Tensor, Tensor]:
    """The input `[..., in, *spatial]` of a layer and its weight, one of them times `s`; their product is the same."""
    if not _is_choice(x, s):
        return _times(x, s, weight.ndim - 2), weight
    return torch.ops.functorch_ens.scaled(x, weight, s, layout.groups, layout.transposed, side)


def _scaled(x: Tensor, weight: Tensor, s: Tensor, groups: int, transposed: bool, side: str) -> tuple[Tensor, Tensor]:
    return _times(x, s, weight.ndim - 2), weight


def _scaled_of_members(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    groups: int,
    transposed: bool,
    side: str,
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    """The vmap rule of `scaled`."""
    x_dim, weight_dim, s_dim = in_dims[:3]
    if weight_dim is not None:
        weight, weight_dim = weight.movedim(weight_dim, 0), 0
    shape = weight.shape if weight_dim is None else weight.shape[1:]
    spatial = len(shape) - 2
    own = s if s_dim is None else s.movedim(s_dim, 0)
    # With a shared x, scale the smaller of x and W: scaling makes E copies of it. Scaling W also saves a product in the
    # backward pass: with a scaled x, the gradient of `s` alone would need the gradient of that x. With a stacked x,
    # scaling it makes no copies, the backward pass needs its gradient anyway, and W stays shared.
    if side == "auto" and x_dim is None and s_dim is not None and not _is_less(x.numel(), shape.numel()):
        return (x, Layout(groups, transposed).multiplied(weight, s=own, spatial=spatial)), (None, 0)
    if x_dim is not None:
        x = x.movedim(x_dim, 0)
    if s_dim is not None:  # the member axis first, in front of all axes of one member's input
        leading = x.ndim - (x_dim is not None) - 1 - spatial
        own = rearrange(own, "e c -> e" + " 1" * leading + " c")
    batched = x_dim is not None or s_dim is not None
    return (_times(x, own, spatial), weight), (0 if batched else None, weight_dim)


def _times(x: Tensor, s: Tensor, spatial: int) -> Tensor:
    """`x` `[..., in, *spatial]` times `s` `[..., in]`, in the dtype of `x` (autocast)."""
    return x * by_channel(s, spatial).to(x.dtype)


def by_channel(vector: Tensor, spatial: int) -> Tensor:
    """`[..., channels]`, followed by `spatial` axes of size 1; not by einops, all of which Dynamo would trace."""
    return vector[(..., *[None] * spatial)] if spatial else vector


def _define(schema: str, one_member: Any, members: Any) -> None:
    """Define an operator composed of others: derivatives, devices and dtypes are theirs."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, one_member, "CompositeImplicitAutograd")
    torch.library.register_vmap(f"functorch_ens::{name}", members, lib=_LIBRARY)


_define("product(Tensor x, Tensor weight) -> Tensor", F.linear, _product_of_members)
_define(
    "scaled(Tensor x, Tensor weight, Tensor s, int groups, bool transposed, str side) -> (Tensor, Tensor)",
    _scaled,
    _scaled_of_members,
)
