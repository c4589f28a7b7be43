"""The operator for both gradients of a rank-1 layer with one input for all, and the pass that puts it into graphs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, compiler, low_rank, tensors_of
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens._compile import rank1_gradients
from functorch_ens._compile.passes import Passes

pytestmark = pytest.mark.skipif(compiler() != "inductor", reason="it is a kernel, and a pass of inductor")

aten = torch.ops.aten
PASS = "post_grad_custom_pre_pass"
OPERATOR = torch.ops.functorch_ens.rank1_gradients.default


@pytest.fixture(scope="module")
def wide() -> None:
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        if not rank1_gradients.is_faster():
            pytest.skip("it is for AVX-512")


def _layer(E: int, B: int, out: int, into: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype) for shape in ((E * B, out), (B, into), (E, into), (out, into))]


def _by_autograd(g: Tensor, x: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """By a loop over members, in float64."""
    s, weight = (tensor.double().requires_grad_() for tensor in (s, weight))
    outputs = torch.cat([F.linear(x.double() * s_e, weight) for s_e in s])
    return torch.autograd.grad(outputs, (weight, s), g.double())


def _assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("wide")
@given(E=st.integers(1, 4), B=st.integers(1, 9), out=st.integers(1, 20), into=st.integers(1, 100))
def test_it_is_what_autograd_finds(E: int, B: int, out: int, into: int) -> None:
    """Whatever part of its last tile is there."""
    assert rank1_gradients.kernel() is not None
    given = _layer(E, B, out, into)
    copies = [tensor.clone() for tensor in given]
    _assert_close(OPERATOR(*given), _by_autograd(*given))
    assert all(map(torch.equal, given, copies))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("threads", [1, 3])
def test_with_any_number_of_threads_and_any_strides(threads: int) -> None:
    before = torch.get_num_threads()
    given = [tensor.t().contiguous().t() for tensor in _layer(3, 40, 70, 300)]
    torch.set_num_threads(threads)
    try:
        found = OPERATOR(*given)
    finally:
        torch.set_num_threads(before)
    _assert_close(found, _by_autograd(*given))
    assert all(tensor.is_contiguous() for tensor in found)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("B", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_an_operator_as_torch_wants_them(B: int, dtype: torch.dtype) -> None:
    """Its results are laid out as its fake ones, with the kernel and without."""
    given = tuple(_layer(3, B, 5, 6, dtype))
    torch.library.opcheck(OPERATOR, given, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
    _assert_close(OPERATOR(*given), _by_autograd(*given))


def test_without_the_kernel_it_is_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given = _layer(3, 4, 5, 6)
    monkeypatch.setattr(rank1_gradients, "kernel", lambda: None)
    _assert_close(OPERATOR(*given), _by_autograd(*given))


def test_no_kernel_for_other_processors_or_where_it_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    find = rank1_gradients.kernel.__wrapped__
    load = Mock(side_effect=RuntimeError("no compiler"))
    monkeypatch.setattr("torch._inductor.codecache.CppPythonBindingsCodeCache.load_pybinding", load)
    for faster in (True, False):
        monkeypatch.setattr(rank1_gradients, "is_faster", lambda faster=faster: faster)
        assert find() is None
    assert load.call_count == 1


# --------------------------------------------------------------------------------------------------------------------
# The pass


class Counted(Passes):
    """The passes, and how often the operator is in what they leave."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        graph.lint()
        self.count += len(graph.find_nodes(op="call_function", target=OPERATOR))

    def uuid(self) -> Any:
        return None  # not from a cache


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size are worth it."""
    monkeypatch.setattr(rank1_gradients, "ENOUGH", 0)
    monkeypatch.setattr(rank1_gradients, "FEW", 0)


@pytest.fixture
def everything(any_size: None, wide: None) -> None:
    """Nothing but the graph itself decides."""


def _count(
    model: nn.Module,
    x: Tensor,
    params: fe.EnsembleParams | None = None,
    chosen: Any = None,
    tolerance: float | None = None,
    **options: Any,
) -> int:
    """How often the operator is in a step; its gradients are those of the step that is not compiled."""
    params = fe.batchensemble_params(model, 3) if params is None else params
    trained = [tensor for part in params for name, tensor in part.items() if chosen is None or chosen(name)]
    forward, y = fe.make_forward(model, rank1_side="activation"), torch.randint(4, (x.shape[0],))
    passes = Counted()
    found = []
    for compile in ({"options": {PASS: passes}}, False):
        optimizer = torch.optim.SGD(trained)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=compile, **options)
        found.append(step.gradients(params, x, y))
        assert step.compiled_by == ("functorch_ens" if compile else "eager")  # no rung has failed
    got, want = found
    assert_same(got, want, tolerance=tolerance)
    return passes.count


def _mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_it_is_in_the_first_layer_of_a_batchensemble(reduction: str) -> None:
    assert _count(_mlp(21, 13, 9, 4), torch.randn(7, 21), reduction=reduction) == 1


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("rank1", [False, True])
def test_it_is_right_beside_low_rank_factors(rank1: bool) -> None:
    model = _mlp(21, 13, 4)
    params = low_rank(model, 3, 2, rank1)
    count = _count(model, torch.randn(7, 21), params, lambda name: tensors_of(params)[name].requires_grad)
    assert count == rank1  # the base is frozen without r and s


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prepare", [None, lambda x, y: ((x - 1) / 2, y)])
def test_it_is_there_whatever_is_before_and_after(flatten: bool, bias: bool, prepare: Any) -> None:
    layer = nn.Linear(24, 4, bias=bias)
    model, x = (nn.Sequential(nn.Flatten(), layer), torch.randn(5, 3, 8)) if flatten else (layer, torch.randn(5, 24))
    assert _count(model, x, prepare=prepare) == 1


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("B", "into"), [(1, 9), (2, 1), (3, 3), (3, 4), (4, 3)])
def test_it_is_right_where_sizes_are_alike(B: int, into: int) -> None:
    assert _count(nn.Linear(into, 4), torch.randn(B, into)) in (0, 1)


@pytest.mark.usefixtures("everything")
def test_it_is_not_where_there_are_no_two_products() -> None:
    model, x = _mlp(21, 13, 4), torch.randn(7, 21)
    assert _count(model, x, fe.ensemble_params(model, 3)) == 0
    for left_out in ("0.weight", "0.weight_s"):
        assert _count(model, x, chosen=lambda name, left_out=left_out: name != left_out) == 0
    assert _count(model.double(), x.double()) == 0
    assert _count(nn.Sequential(nn.Linear(21, 4)), x, autocast=torch.bfloat16, tolerance=0.05) == 0
    before = nn.Sequential(nn.LayerNorm(21), nn.Linear(21, 4))  # whose output needs a gradient too
    assert _count(before, x) == 0


@pytest.mark.usefixtures("wide")
def test_it_is_not_in_small_layers_or_of_few_rows() -> None:
    for into, B, count in ((64, 16, 0), (2**13, 7, 0), (2**13, 8, 1)):
        torch._dynamo.reset()
        assert _count(_mlp(into, 2**9, 4), torch.randn(B, into)) == count


@pytest.mark.usefixtures("wide")
def test_it_is_there_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiler does not know how many, the operator decides."""
    torch._dynamo.reset()
    kernel = Mock(wraps=rank1_gradients.kernel)
    monkeypatch.setattr(rank1_gradients, "kernel", kernel)
    model, passes = _mlp(2**11, 2**9, 4), Counted()
    params = fe.batchensemble_params(model, 3)
    make = partial(fe.make_train_step, fe.make_forward(model, rank1_side="activation"), F.mse_loss)
    step, plain = (
        make(torch.optim.SGD(tree_leaves(params)), compile=compile) for compile in ({"options": {PASS: passes}}, False)
    )
    for B, kernels in ((9, 1), (10, 1), (7, 0), (11, 1)):
        batch = torch.randn(B, 2**11), torch.randn(B, 4)
        assert_same(step.gradients(params, *batch), plain.gradients(params, *batch))
        assert kernel.call_count == kernels
        kernel.reset_mock()
    assert passes.count == 2  # of nine rows, and of any number


class Scaled(nn.Module):
    """A layer whose input is multiplied by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(21, 4)
        self.shift = nn.Parameter(torch.randn(21))

    def forward(self, x: Tensor) -> Any:
        return self.layer((x + self.shift) * 0.5)


@pytest.mark.usefixtures("everything")
def test_numbers_are_not_taken_for_tensors() -> None:
    model = Scaled()
    params = fe.ensemble_params(model, 3, stacked="shift", reset=False)
    assert _count(model, torch.randn(7, 21), params) == 0


def _passed(function: Any, *tensors: Tensor) -> Any:
    """`function` as a graph, after the pass."""
    module = make_fx(function, tracing_mode="fake")(*tensors)
    rank1_gradients.join_rank1_gradients(module.graph)
    module.graph.lint()
    module.recompile()
    return module


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("kind", ["channels", "rows", "two scales", "late"])
def test_what_looks_alike_is_told_apart(kind: str) -> None:
    E, n, out = 3, 6, 5
    g, x, s, weight = _layer(E, n, out, n)

    def gradients(g: Tensor, x: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        product = aten.mm.default(g, weight)
        late = s.exp() if kind == "late" else s
        scale = aten.reshape.default(late, [E, n, 1] if kind == "rows" else [E, 1, n])
        scaled = aten.reshape.default(aten.mul.Tensor(x, scale), [E * n, n])
        of_weight = aten.mm.default(aten.permute.default(g, [1, 0]), scaled)
        times = aten.mul.Tensor(aten.reshape.default(product, [E, n, n]), x * 2 if kind == "two scales" else x)
        return of_weight, aten.sum.dim_IntList(times, [1], True)

    module = _passed(gradients, g, x, s, weight)
    count = len(module.graph.find_nodes(op="call_function", target=OPERATOR))
    assert count == (kind == "channels")
    assert_same(module(g, x, s, weight), gradients(g, x, s, weight))


@pytest.mark.usefixtures("any_size")
def test_it_is_not_for_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank1_gradients, "is_faster", lambda: False)
    assert _count(_mlp(21, 4), torch.randn(7, 21)) == 0
