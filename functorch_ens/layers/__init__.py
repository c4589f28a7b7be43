"""One file for each kind of layer: the layout of its weights, its pure form, its fast rule, its obstacle to vmap.

Importing this package imports those files, and each adds its rows to `registry`.
"""

from functorch_ens.layers import attention, conv, embedding, experts, linear, norm, other, recurrent

__all__ = ["attention", "conv", "embedding", "experts", "linear", "norm", "other", "recurrent"]
