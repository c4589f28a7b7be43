"""Products of what all members share with what each member owns, by the cheapest of the ways that are equal.

Under vmap a layer's weight or input is either one tensor for all members or a stack of E. Which of them it is, and the
shapes, decide what is cheap, and only a rule for vmap sees both. So these are operators of `torch.library`, plain
arithmetic for one member, with such a rule each; torch.func, autograd and torch.compile look through them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_ens.layers.registry import Layout, Rank1

SIDES = ("auto", "activation", "weight")
"""Where a layer multiplies its `s` in: what enters it, its weight, or whichever is cheaper."""

FEW = 2**14
"""In eager mode, inputs of fewer numbers are not worth the call of an operator from Python."""

_LIBRARY = torch.library.Library("functorch_ens", "FRAGMENT")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer without its bias: `x` `[B, I]` or `[I]` and `weight` `[O, I]` to `[B, O]` or `[O]`."""
    if not _is_choice(x, weight):
        return F.linear(x, weight)
    return torch.ops.functorch_ens.product(x, weight)


def _is_choice(x: Tensor, own: Tensor) -> bool:
    """Whether a rule may choose between ways: where vmap has `x` as one for all members, and `own` as each its own.

    A compiler cannot trace the question, and calls the operator in any case: there it costs nothing.
    """
    if torch.compiler.is_compiling():
        return True
    is_own = torch._C._functorch.is_batchedtensor
    return x.numel() >= FEW and is_own(own) and not is_own(x)


def _product_of_members(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
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
    if x.shape[-2] < max(weight.shape[1:]):
        # Few rows: as columns, [E, O, I] x [I, B], the gradient of a weight comes as it lies, and is not turned over.
        y = rearrange(weight @ x.mT, "e o b -> e b o").contiguous()
    elif x_dim is not None:
        y = x @ weight.mT
    else:
        # The members are columns, [B, I] x [I, E O]. A batched product would read the input E times.
        y = rearrange(F.linear(x, rearrange(weight, "e o i -> (e o) i")), "b (e o) -> e b o", e=info.batch_size)
    return (rearrange(y, "e 1 o -> e o") if vector else y), 0


def scaled(x: Tensor, weight: Rank1) -> tuple[Tensor, Tensor]:
    """The input `[..., in, *spatial]` of a layer and its weight, one of them times `s`; their product is the same."""
    if not _is_choice(x, weight.s):
        return _times(x, weight.s, weight.weight.ndim - 2), weight.weight
    groups, transposed = weight.layout
    return torch.ops.functorch_ens.scaled(x, weight.weight, weight.s, groups, transposed, weight.side)


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
    x_dim, weight_dim, s_dim = in_dims[:3]
    if weight_dim is not None:
        weight, weight_dim = weight.movedim(weight_dim, 0), 0
    shape = weight.shape if weight_dim is None else weight.shape[1:]
    spatial = len(shape) - 2
    own = s if s_dim is None else s.movedim(s_dim, 0)
    # Where the input is one for all members, whichever of the two is smaller, for `s` makes E of it. A scaled weight
    # also saves a product in the backward pass: with a scaled input, the gradient of `s` needs that of the input, which
    # nothing else does. Where the members' inputs differ, the scaled input is free of both, and the weight stays one.
    if side == "auto" and x_dim is None and s_dim is not None and shape.numel() <= x.numel():
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
    """`[..., channels]` before so many spatial axes, of one each."""
    # Without any it is itself; torch.compile would look through all that einops does to find that out.
    return rearrange(vector, "... c -> ... c" + " 1" * spatial) if spatial else vector


def _define(schema: str, one_member: Any, members: Any) -> None:
    """An operator that is arithmetic of other ones: its derivatives, devices and dtypes are theirs."""
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
