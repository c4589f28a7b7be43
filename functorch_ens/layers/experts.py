"""Mixtures of experts as transformers writes them: stacks of matrices, one for each expert.

Each expert has vectors of its own, `W_i[k] = W[k] * (r_i[k] s_i[k]^T)`: `r` `[n * out]` and `s` `[n * in]` are those of
the n experts one after another. Low-rank experts `[n, out, in]` share `A`, and each has its own rows of `B`; of experts
`[n, in, out]` it is the other way round.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from functorch_ens import _torch
from functorch_ens.anatomy import Layout, member_names
from functorch_ens.layers.registry import register


def _layouts(layer: nn.Module, transposed: bool) -> dict[str, Layout]:
    """By name, the layout of every stack of matrices in `layer`; `transposed`: they are `[n, in, out]`."""
    own = _torch.parameters_of(layer)
    stacks = {name: weight for name, weight in own.items() if weight is not None and weight.ndim == 3}
    return {name: Layout(len(weight), transposed, axes=(2, 1)) for name, weight in stacks.items()}


def _pure(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, which reads its weights once for every expert, with each of them multiplied out once."""
    own = _torch.parameters_of(layer)
    before = dict(own)
    merged = {name: getattr(layer, name) for name in _layouts(layer, False)}
    own.update({added: None for name in merged for added in member_names(name) if added in own})
    own.update(merged)
    try:
        original: Any = type(layer).__mro__[1]  # the template's class is a subclass of it
        return original.forward(layer, *args, **kwargs)
    finally:
        own.update(before)


# The names come in this order: the first pattern that matches decides.
register(
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts",
    layout=lambda layer: _layouts(layer, True),
    pure={"forward": _pure},
)
register(
    "transformers.models.*Experts",
    layout=lambda layer: _layouts(layer, getattr(layer, "is_transposed", False)),
    pure={"forward": _pure},
)
