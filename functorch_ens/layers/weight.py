"""One member's rank-1 weight, and the arithmetic that a fast rule needs.

A member's effective weight is `W_i = W * (r_i s_i^T)`: `s` scales the input of a layer, `r` its output,

    y_i = (W (x * s_i)) * r_i + b

(Wen, Tran & Ba 2020, arXiv:2002.06715, section 3.1; the paper swaps the letters `r` and `s`.)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from functorch_ens.anatomy import Layout
from functorch_ens.layers.operators import by_channel, linear, scaled


class Rank1(NamedTuple):
    """One member's rank-1 weight: the shared `weight`, with `r` `[out]` and `s` `[in]`.

    A fast rule (`rank1_rule`) gets one of these for each weight that it serves.
    """

    weight: Tensor
    r: Tensor
    s: Tensor
    layout: Layout = Layout()
    side: str = "auto"
    """Where `scale_input` multiplies `s` in: the `rank1_side` of `make_forward`."""

    def scale_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input `x` `[..., in, *spatial]` and the shared weight, one of the two times `s`, as `side` says.

        An `x` of another number of channels comes back as it is: `x * s` could broadcast it, and the layer would not
        raise the error that it has for such an input.
        """
        spatial = self.weight.ndim - 2
        channels = x.ndim - 1 - spatial
        if channels < 0 or x.shape[channels] != self.s.shape[0]:
            return x, self.weight
        if self.side == "weight":
            return x, self.layout.multiplied(self.weight, s=self.s, spatial=spatial)
        return scaled(x, self.weight, self.s, self.layout, self.side)

    def scale_output(self, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output `y` `[..., out, *spatial]` times `r`, plus `bias` `[out]`, in the dtype of `y` (autocast)."""
        spatial = self.weight.ndim - 2
        y = y * by_channel(self.r, spatial).to(y.dtype)
        return y if bias is None else y + by_channel(bias, spatial).to(y.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` with the effective weight: `x` `[..., in]` to `[..., out]`, by the operators of our own rules."""
        return self.scale_output(linear(*self.scale_input(x)), bias)

    def materialise(self) -> Tensor:
        """The effective weight `W * (r s^T)`, of the shape of `weight`."""
        return self.layout.multiplied(self.weight, r=self.r, s=self.s, spatial=self.weight.ndim - 2)
