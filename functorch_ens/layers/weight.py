"""One member's weight, and the arithmetic that a fast rule needs: a shared weight, and what is the member's own.

Either or both of two things are a member's own. `r` and `s` scale the output and the input of a layer (Wen, Tran & Ba
2020, arXiv:2002.06715, section 3.1; the paper swaps the letters), `A` and `B` are low-rank factors (Hu et al. 2021,
arXiv:2106.09685):

    W_i = (W + B_i A_i) * (r_i s_i^T)        y_i = (W (x * s_i) + B_i (A_i (x * s_i))) * r_i + b
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from einops import rearrange
from torch import Tensor

from functorch_ens.anatomy import Layout, member_names
from functorch_ens.layers.operators import by_channel, linear, pointwise, scaled


class Rank1(NamedTuple):
    """One member's weight: the shared `weight`, with `r` `[out]` and `s` `[in]`, or with `A` and `B`, or with all four.

    A fast rule (`rank1_rule`) gets one of these for each weight that it serves. A rule that is not registered with
    `lora=True` gets `r` and `s` always, and never `A` and `B`.
    """

    weight: Tensor
    r: Tensor | None = None
    s: Tensor | None = None
    layout: Layout = Layout()
    side: str = "auto"
    """Where `scale_input` multiplies `s` in: the `rank1_side` of `make_forward`."""
    A: Tensor | None = None
    """`[rank, in]`; the weight is read as a matrix, as `Layout.factors` says."""
    B: Tensor | None = None
    """`[out, rank]`."""

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`A` and `B` in the dtype of the shared weight, for they may be kept in a wider one to be trained."""
        if self.A is None or self.B is None:
            return None
        return self.A.to(self.weight.dtype), self.B.to(self.weight.dtype)

    def _spatial(self) -> int:
        """The number of axes after output and input; TypeError where one of the two has several, as in a stack."""
        if self.layout.axes != (1, 1):
            raise TypeError(
                f"rule: a weight {list(self.weight.shape)} of {self.layout} is no weight [out, in, ...], which "
                "scale_input, scale_output, linear, apply and chunk are for; use materialise()"
            )
        return self.layout.spatial(self.weight)

    def scale_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input `x` `[..., in, *spatial]` and the shared weight, one of the two times `s`, as `side` says.

        An `x` of another number of channels comes back as it is: `x * s` could broadcast it, and the layer would not
        raise the error that it has for such an input.
        """
        spatial = self._spatial()
        if self.s is None:
            return x, self.weight
        channels = x.ndim - 1 - spatial
        if channels < 0 or x.shape[channels] != self.s.shape[0]:
            return x, self.weight
        if self.side == "weight":
            return x, self.layout.multiplied(self.weight, s=self.s, spatial=spatial)
        return scaled(x, self.weight, self.s, self.layout, self.side)

    def scale_output(self, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output `y` `[..., out, *spatial]` times `r`, plus `bias` `[out]`, in the dtype of `y` (autocast)."""
        spatial = self._spatial()
        if self.r is not None:
            y = y * by_channel(self.r, spatial).to(y.dtype)
        return y if bias is None else y + by_channel(bias, spatial).to(y.dtype)

    def apply(self, x: Tensor, operation: Callable[[Tensor, Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
        """The layer with the effective weight: `operation(x, weight)` is the layer's own, without a bias.

        It is called with the shared weight, and where there are `A` and `B`, also with a weight of `rank` channels on
        one side. So it must be linear in both arguments, and take the number of channels from the weight.
        """
        y = operation(*self.scale_input(x))
        if factors := self.factors:
            y = y + self._by_factors(x, *factors, operation)
        return self.scale_output(y, bias)

    def _by_factors(self, x: Tensor, A: Tensor, B: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`B (A (x * s))`: one factor is a kernel of the layer's own operation, the other mixes channels.

        `s` is multiplied into `A`, which is the member's own and small; scaling an `x` that members share copies it.
        """
        groups, transposed = self.layout.groups, self.layout.transposed
        spatial = self._spatial()
        s = None if self.s is None else self.s.to(A.dtype)
        if transposed:
            A = A if s is None else A * s
            mixed = pointwise(x, rearrange(A, "rank (g i) -> (g rank) i", g=groups), groups, spatial)
            return operation(mixed, self._kernel(B.mT))
        kernel = self._kernel(A)
        if s is not None:
            kernel = self.layout.multiplied(kernel, s=s, spatial=spatial)
        return pointwise(operation(x, kernel), B, groups, spatial)

    def _kernel(self, factor: Tensor) -> Tensor:
        """A factor `[rank, rest]` as a weight of the layer with `rank` channels in axis 0, the same for every group."""
        kernel = factor.reshape(-1, *self.weight.shape[1:])
        groups = self.layout.groups
        return kernel if groups == 1 else kernel.repeat(groups, *[1] * (kernel.ndim - 1))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` with the effective weight: `x` `[..., in]` to `[..., out]`, by the operators of our own rules."""
        return self.apply(x, linear, bias)

    def chunk(self, parts: int) -> list[Rank1]:
        """The weight cut along its output into equal `parts`, which share `s` and `A`."""
        self._spatial()
        rows = self.weight.chunk(parts)
        r = [None] * parts if self.r is None else self.r.chunk(parts)
        B = [None] * parts if self.B is None else self.B.chunk(parts)
        return [self._replace(weight=rows[i], r=r[i], B=B[i]) for i in range(parts)]

    def read_as(self, layout: Layout) -> Rank1:
        """The same weight for a layer that reads it the other way round: the input of one is the output of the other.

        That is so where one tensor is the weight of an embedding and of a Linear. Without groups, only.
        """
        if layout != self.layout.turned:
            return self
        A, B = (None, None) if self.A is None or self.B is None else (self.B.mT, self.A.mT)
        return self._replace(r=self.s, s=self.r, A=A, B=B, layout=layout)

    def materialise(self) -> Tensor:
        """The effective weight `(W + B A) * (r s^T)`, of the shape of `weight`."""
        weight = self.weight
        if factors := self.factors:
            weight = weight + self.layout.low_rank(*factors, weight)
        if self.r is None or self.s is None:
            return weight
        return self.layout.multiplied(weight, r=self.r, s=self.s, spatial=self.layout.spatial(weight))


def member_weight(tensors: Mapping[str, Tensor | None], name: str, layout: Layout, side: str = "auto") -> Rank1 | None:
    """One member's weight `name` among its `tensors`; None where it is the plain weight, or is not there."""
    weight = tensors[name]
    r_name, s_name, A_name, B_name = member_names(name)
    r, A = tensors.get(r_name), tensors.get(A_name)
    if weight is None or (r is None and A is None):
        return None
    return Rank1(weight, r, tensors.get(s_name), layout, side, A, tensors.get(B_name))
