"""Products over the member axis: equal to one member after another, whichever way they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import members, randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, compile_whole
from torch import Tensor, nn
from torch.func import grad, hessian, jvp, vmap

import functorch_ens as fe
from functorch_ens.anatomy import Layout
from functorch_ens.layers import operators
from functorch_ens.layers.operators import SIDES, product, scaled

sizes = st.integers(1, 4)


@pytest.fixture(autouse=True, scope="module")
def choose_for_small_inputs_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "FEW", 0)
        yield


def _one_by_one(function: Any, in_dims: tuple[int | None, ...], E: int, *tensors: Tensor) -> Tensor:
    """`vmap(function, in_dims)` as a loop."""

    def own(tensor: Tensor, dim: int | None, i: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, i)

    parts = [function(*map(partial(own, i=i), tensors, in_dims)) for i in range(E)]
    return torch.stack(parts)


def _with_members(E: int, dim: int | None, *shape: int) -> Tensor:
    """Random numbers, with the member axis at `dim`."""
    return randn(*shape) if dim is None else randn(*shape[:dim], E, *shape[dim:])


def _slopes(function: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return grad(lambda *args: function(*args).sin().sum(), argnums=tuple(range(len(tensors))))(*tensors)


@given(data=st.data(), E=members, sizes=st.tuples(sizes, sizes, sizes), vector=st.booleans())
def test_a_product_equals_one_member_after_another(
    data: st.DataObject, E: int, sizes: tuple[int, int, int], vector: bool
) -> None:
    B, into, out = sizes
    shape = (into,) if vector else (B, into)
    x_dim = data.draw(st.sampled_from([None, *range(len(shape) + 1)]))
    weight_dim = data.draw(st.sampled_from([0, 1, 2] if x_dim is None else [None, 0, 1, 2]))
    tensors = _with_members(E, x_dim, *shape), _with_members(E, weight_dim, out, into)
    dims = x_dim, weight_dim
    plain = partial(_one_by_one, lambda x, weight: x @ weight.T, dims, E)
    together = vmap(product, in_dims=dims)
    assert_same(together(*tensors), plain(*tensors))
    assert_same(_slopes(together, tensors), _slopes(plain, tensors))


def test_the_gradient_of_weights_of_few_rows_lies_as_they_do() -> None:
    """Else it is turned over, a copy of all members' weights. The output lies as a layer's does in either case."""
    for rows, direct in ((7, True), (8, False)):
        x, weight = randn(3, rows, 5), randn(3, 8, 5)
        together = vmap(torch.ops.functorch_ens.product)
        assert together(x, weight).is_contiguous()
        assert _slopes(together, (x, weight))[1].is_contiguous() == direct


@pytest.mark.parametrize("rows", [0, 2, 9])
@pytest.mark.parametrize("own_inputs", [False, True])
def test_an_input_of_another_size_does_not_fit(own_inputs: bool, rows: int) -> None:
    """One of size 1 could be broadcast."""
    together = vmap(torch.ops.functorch_ens.product, in_dims=(0 if own_inputs else None, 0))
    assert together(randn(*[3] * own_inputs, rows, 5), randn(3, 8, 5)).shape == (3, rows, 8)
    for size in (1, 4):
        with pytest.raises(RuntimeError):
            together(randn(*[3] * own_inputs, rows, size), randn(3, 8, 5))


@given(
    data=st.data(),
    E=members,
    sizes=st.tuples(sizes, sizes, sizes),
    spatial=st.integers(0, 2),
    groups=st.integers(1, 3),
    transposed=st.booleans(),
    side=st.sampled_from(["auto", "activation"]),
)
def test_scaled_is_a_factor_of_the_input_or_of_the_weight(
    data: st.DataObject,
    E: int,
    sizes: tuple[int, int, int],
    spatial: int,
    groups: int,
    transposed: bool,
    side: str,
) -> None:
    B, into, out = sizes
    layout, kernel = Layout(groups, transposed), [2] * spatial
    weight_shape = (groups * into, out, *kernel) if transposed else (groups * out, into, *kernel)
    dims = [data.draw(st.sampled_from([None, 0, 1])) for _ in range(3)]
    if dims == [None] * 3:
        dims[2] = 0
    x = _with_members(E, dims[0], B, groups * into, *[3] * spatial)
    weight, s = _with_members(E, dims[1], *weight_shape), _with_members(E, dims[2], groups * into)
    convolve: Any = {
        (0, False): lambda x, w: x.unflatten(-1, (groups, -1)).mul(w.unflatten(0, (groups, -1)).sum(1)).sum(-1),
        (0, True): lambda x, w: (x @ w).unflatten(-1, (1, -1)).sum(-1),
        (1, False): partial(torch.conv1d, groups=groups),
        (1, True): partial(torch.conv_transpose1d, groups=groups),
        (2, False): partial(torch.conv2d, groups=groups),
        (2, True): partial(torch.conv_transpose2d, groups=groups),
    }[spatial, transposed]

    def layer(x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        return convolve(*scaled(x, weight, s, layout, side))

    def plain(x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        return convolve(x * s.reshape(-1, *[1] * spatial), weight)

    together = vmap(layer, in_dims=tuple(dims))
    one_by_one = partial(_one_by_one, plain, tuple(dims), E)
    assert_same(together(x, weight, s), one_by_one(x, weight, s))
    assert_same(_slopes(together, (x, weight, s)), _slopes(one_by_one, (x, weight, s)))


@pytest.mark.parametrize(
    ("rows", "shared", "side", "expected"),
    [
        (5, True, "auto", "weight"),
        (4, True, "auto", "weight"),
        (3, True, "auto", "activation"),
        (5, True, "activation", "activation"),
        (5, False, "auto", "activation"),
    ],
)
def test_the_smaller_of_a_shared_input_and_its_weight_is_scaled(
    rows: int, shared: bool, side: str, expected: str
) -> None:
    x, weight, s = randn(*([] if shared else [2]), rows, 3), randn(4, 3), randn(2, 3)
    found = []

    def layer(x: Tensor, s: Tensor) -> Tensor:
        placed = scaled(x, weight, s, Layout(), side)
        if shared:
            found.append([torch._C._functorch.is_batchedtensor(tensor) for tensor in placed])
        else:
            found.append([True, torch._C._functorch.is_batchedtensor(placed[1])])
        return product(*placed)

    vmap(layer, in_dims=(None if shared else 0, 0))(x, s)
    assert found == [[expected == "activation", expected == "weight"]]


# torch's own forward mode still compiles with torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize("rows", [2, 9])
def test_transforms_look_through(rows: int) -> None:
    """Both sides under forward mode, second derivatives, an outer vmap, and compiled whole."""
    x, weight, s = randn(rows, 3), randn(4, 3), randn(2, 3)

    def members(s: Tensor, x: Tensor = x, weight: Tensor = weight) -> Tensor:
        def layer(s: Tensor) -> Tensor:
            return product(*scaled(x, weight, s, Layout(), "auto"))

        return vmap(layer)(s)

    def plain(s: Tensor, x: Tensor = x, weight: Tensor = weight) -> Tensor:
        return torch.stack([(x * each) @ weight.T for each in s])

    assert_same(jvp(members, (s,), (s.cos(),))[1], jvp(plain, (s,), (s.cos(),))[1])
    assert_same(hessian(lambda s: members(s).sin().sum())(s), hessian(lambda s: plain(s).sin().sum())(s))
    many = randn(5, 2, 3), randn(5, rows, 3), randn(5, 4, 3)
    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
        given = [many[i] if dim == 0 else one for i, (dim, one) in enumerate(zip(dims, (s, x, weight), strict=True))]
        assert_same(vmap(members, in_dims=dims)(*given), _one_by_one(plain, dims, 5, *given))

    def total(s: Tensor) -> Tensor:
        return members(s).sin().sum()

    assert_same(compile_whole(grad(total))(s), grad(lambda s: plain(s).sin().sum())(s))


def test_small_inputs_are_left_to_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def operator(x: Tensor, weight: Tensor) -> Tensor:
        called.append(x.shape)
        return x

    monkeypatch.setattr(operators, "FEW", 100)
    monkeypatch.setattr(torch.ops.functorch_ens, "product", operator)
    for rows in (9, 10):
        vmap(lambda weight, x: product(x, weight), in_dims=(0, None))(randn(2, 4, 10), randn(rows, 10))
    assert called == [(10, 10)]


@pytest.mark.parametrize("side", SIDES)
def test_a_forward_takes_the_side(side: str) -> None:
    model, x = nn.Linear(3, 2).double(), randn(7, 3)
    params = fe.batchensemble_params(model, 4)
    want = torch.stack([x @ fe.member_params(model, params, i)["weight"].T + model.bias.detach() for i in range(4)])
    assert_same(fe.make_forward(model, rank1_side=side)(params, x).detach(), want)
    with pytest.raises(ValueError, match=r"rank1_side: expected one of .*'weight'.*, got 'left'"):
        fe.make_forward(model, rank1_side="left")
