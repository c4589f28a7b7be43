"""A pass that computes both gradients of a rank-1 layer, whose input all members share, from one matrix product.

Such a layer (the first of a network) computes y_e = (x * s_e) W^T. autograd computes two products of this size for its
gradients: dW = g^T (x * s), and g W, which is multiplied by x and summed to the gradient of s. But with

    M_e = g_e^T x,   dW = sum_e M_e * s_e,   ds_e = sum_o W * M_e

one product is enough. M is E times as large as W, so it is never stored: each tile is summed while it is in registers.
This takes a kernel of its own, for AVX-512; with half of the registers it is no faster than two products.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

log = logging.getLogger(__name__)

ENOUGH = 2**23
"""Products of fewer multiplications are faster than the call of an operator from Python."""

FEW = 8
"""With fewer rows for each member, summing M takes longer than computing it."""

SOURCE = Path(__file__).with_suffix(".cpp")

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)

_LIBRARY = torch.library.Library("functorch_ens", "FRAGMENT")


def _by_two_products(g: Tensor, x: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `weight` `[O, I]` and `s` `[E, I]`, from the output's, `g` `[E B, O]`, and `x` `[B, I]`."""
    scaled = rearrange(x * rearrange(s, "e i -> e 1 i"), "e b i -> (e b) i")
    of_s = reduce(rearrange(g @ weight, "(e b) i -> e b i", b=len(x)) * x, "e b i -> e i", "sum")
    return (g.mT @ scaled).contiguous(), of_s.contiguous()


def _on_cpu(g: Tensor, x: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    compute = kernel() if len(x) >= FEW and g.dtype == torch.float32 else None
    if compute is None:
        return _by_two_products(g, x, s, weight)
    g, x, s, weight = (tensor.contiguous() for tensor in (g, x, s, weight))
    found = torch.empty_like(weight), torch.empty_like(s)
    compute(g, x, s, weight, *found, len(s), len(x), *weight.shape, torch.get_num_threads())
    return found


_LIBRARY.define("rank1_gradients(Tensor g, Tensor x, Tensor s, Tensor weight) -> (Tensor, Tensor)")
_LIBRARY.impl("rank1_gradients", _on_cpu, "CPU")
torch.library.register_fake(
    "functorch_ens::rank1_gradients",
    lambda g, x, s, weight: (weight.new_empty(weight.shape), s.new_empty(s.shape)),
    lib=_LIBRARY,
)


def is_faster() -> bool:
    """Whether this processor has AVX-512."""
    return pick_vec_isa().bit_width() == 512


@cache
def kernel() -> Any:
    """The kernel, compiled by the first call; None where it does not compile or gains nothing."""
    if not is_faster():  # torch's cache may hold a graph that was compiled for another processor
        return None
    types = ["const float*"] * 4 + ["float*"] * 2 + ["int64_t"] * 5
    try:
        return CppPythonBindingsCodeCache.load_pybinding(types, SOURCE.read_text())
    except Exception as error:
        log.info("the gradients of rank-1 layers are computed by two products: %r", error)
        return None


class _Found(NamedTuple):
    """The nodes of a graph that hold the inputs of a rank-1 layer's gradients, and those that compute these."""

    g: Node
    x: Node
    s: Node
    weight: Node
    of_weight: Node
    of_s: Node
    product: Node
    """g W, which only `of_s` uses."""


def join_rank1_gradients(graph: Graph) -> None:
    """Change `graph`: for the gradients of a rank-1 layer with a shared input, one product replaces two."""
    for of_s in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        found = _match(of_s)
        if found is None or not is_faster():
            continue
        with graph.inserting_before(min(found.of_weight, found.product)):
            both = graph.call_function(torch.ops.functorch_ens.rank1_gradients.default, found[:4])
            of_weight, of_s = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
            shaped = graph.call_function(aten.reshape.default, (of_s, _shape(found.of_s)))
        both.meta["val"] = (found.of_weight.meta["val"], found.s.meta["val"])
        for new, like in ((of_weight, found.of_weight), (of_s, found.s), (shaped, found.of_s)):
            new.meta["val"] = like.meta["val"]
        for old, new in ((found.of_weight, of_weight), (found.of_s, shaped)):
            old.replace_all_uses_with(new)
            graph.erase_node(old)
    graph.eliminate_dead_code()


def _match(of_s: Any) -> _Found | None:
    """Match a sum of (g W) * x over the rows, `of_s`, and the g^T (x * s) of the same layer."""
    times, dims = of_s.args[:2]
    if not _calls(times, aten.mul.Tensor) or dims != [1] or not _are_tensors(times.args):
        return None
    for wide, x in (times.args, times.args[::-1]):
        product = _seen(wide)
        if not _calls(product, aten.mm.default) or not all(len(node.users) == 1 for node in (times, *_views(wide))):
            continue
        g, weight = product.args[0], _upright(product.args[1])
        for turned in filter(_is_turn, g.users):
            for of_weight in turned.users:
                scaled: Any = _seen(of_weight.args[1]) if _calls(of_weight, aten.mm.default) else None
                if _calls(scaled, aten.mul.Tensor) and _are_tensors(scaled.args) and x in scaled.args:
                    scale = scaled.args[1 - scaled.args.index(x)]
                    found = _Found(g, x, _seen(scale), weight, of_weight, of_s, product)
                    if _fits(found, wide, scale, scaled):
                        return found
    return None


def _fits(found: _Found, wide: Node, scale: Node, scaled: Node) -> bool:
    """Whether all tensors are float32 on a CPU, of the shapes of such a layer, large enough, and computed in time."""
    nodes = (found.g, found.of_weight, found.product, wide, scale, scaled)
    tensors = [node.meta["val"] for node in (*found, *nodes)]
    if not all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors):
        return False
    sizes = [size for node in (found.x, found.s, found.weight) for size in _shape(node)]
    if len(sizes) != 6 or not all(isinstance(size, int) for size in sizes[1:]):
        return False
    b, i, e, i_of_s, o, i_of_weight = sizes
    shapes = [[e * b, o], [o, i], [e * b, i], [e, b, i], [e, 1, i], [e, b, i]]
    # The number of rows may be a symbol; then the operator itself decides whether there are enough.
    known = b if isinstance(b, int) else FEW
    return (
        i == i_of_s == i_of_weight
        and all(map(_same, map(_shape, nodes), shapes))
        and known >= FEW
        and e * known * o * i >= ENOUGH
        and max(found[:4]) < min(found.of_weight, found.product)
    )


def _same(shape: list[Any], other: list[Any]) -> bool:
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other, strict=True))


def _calls(node: Any, target: Any) -> Any:
    return isinstance(node, Node) and node.target is target


def _are_tensors(arguments: Any) -> bool:
    return all(isinstance(each, Node) and isinstance(each.meta.get("val"), Tensor) for each in arguments)


def _shape(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)


def _is_turn(node: Any) -> Any:
    return _calls(node, aten.permute.default) and node.args[1] == [1, 0]


def _is_no_turn(node: Any) -> Any:
    return _calls(node, aten.permute.default) and node.args[1] == sorted(node.args[1])


def _upright(node: Any) -> Any:
    """`node` without two transpositions in a row, which cancel."""
    return node.args[0].args[0] if _is_turn(node) and _is_turn(node.args[0]) else node


def _views(node: Any) -> Iterator[Any]:
    """`node`, its source if it is a reshape, the source of that, and so on: the same numbers in the same order."""
    yield node
    while isinstance(node, Node) and (node.target in _RESHAPES or _is_no_turn(node)):
        node = node.args[0]
        yield node


def _seen(node: Any) -> Any:
    """The last of `_views(node)`."""
    *_, last = _views(node)
    return last
