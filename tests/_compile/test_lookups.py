"""The pass over compiled graphs that compares instead of scattering: the same numbers, and only where it may."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, compiler
from torch import Tensor, nn
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens._compile.passes import Passes

aten = torch.ops.aten
with_inductor = pytest.mark.skipif(compiler() != "inductor", reason="it is a pass of inductor")


def _passed(function: Any, *tensors: Tensor, symbolic: bool = False) -> GraphModule:
    """The graph of `function`, as the pass leaves it."""
    module = make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*tensors)
    mode = next(node.meta["val"].fake_mode for node in module.graph.nodes if node.op == "placeholder")
    assert isinstance(mode, FakeTensorMode)
    with V.set_fake_mode(mode):
        Passes()(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def _scatters(graph: Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=aten.scatter_add.default))


def _added(shape: list[int], dim: int, index: Tensor, source: Tensor, start: float = 0) -> Tensor:
    """`source`, added into numbers that are all `start`."""
    whole = aten.full.default(shape, start, dtype=source.dtype, device=source.device, pin_memory=False)
    return aten.scatter_add.default(whole, dim, index, source)


def _lookup(shape: list[int], dim: int, start: float = 0) -> Any:
    """What is looked up in a table, and numbers added into one of this shape at the same places."""

    def both(table: Tensor, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return aten.gather.default(table, dim, index), _added(shape, dim, index, source, start)

    return both


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_one_number_a_row_is_compared(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    rows = list(shape)
    rows[dim] = 1
    given = torch.randn(shape), torch.randint(shape[dim], rows), torch.randn(rows).mul(9).to(dtype)
    lookup = _lookup(shape, dim)
    module = _passed(lookup, *given)
    assert not _scatters(module.graph)
    for got, want in zip(module(*given), lookup(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)  # also of the same dtype


@pytest.mark.parametrize(
    ("table", "index", "source", "start"),
    [
        ([3, 4], [3, 2], [3, 2], 0.0),  # two numbers a row may meet
        ([3, 4], [2, 1], [2, 1], 0.0),  # rows that get none
        ([3, 4], [3, 1], [3, 2], 0.0),  # of which some are not added
        ([3, 4], [3, 1], [3, 1], 1.0),  # into something
        ([3, 5], [3, 1], [3, 1], 0.0),  # in range of another table
    ],
)
def test_anything_else_is_left_as_it_is(table: list[int], index: list[int], source: list[int], start: float) -> None:
    lookup = _lookup([3, 4], 1, start)
    given = torch.randn(table), torch.zeros(index, dtype=torch.long), torch.randn(source, dtype=torch.float64)
    module = _passed(lookup, *given)
    assert _scatters(module.graph) == 1
    assert_same(module(*given), lookup(*given))


def test_what_is_not_looked_up_is_scattered() -> None:
    """It is the scatter that finds what is out of range."""
    given = torch.tensor([[3], [0], [4]]), torch.randn(3, 1)
    module = _passed(partial(_added, [3, 4], 1), *given)
    assert _scatters(module.graph) == 1
    with pytest.raises(RuntimeError, match="out of bounds"):
        module(*given)


def test_sizes_that_are_not_known_are_left_as_they_are() -> None:
    def lookup(table: Tensor, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return _lookup([len(index), 4], 1)(table, index, source)

    given = torch.randn(3, 4), torch.tensor([[3], [0], [1]]), torch.randn(3, 1)
    module = _passed(lookup, *given, symbolic=True)
    assert _scatters(module.graph) == 1
    assert_same(module(*given), lookup(*given))


@with_inductor
@pytest.mark.parametrize("params_of", [fe.ensemble_params, fe.batchensemble_params])
def test_a_train_step_has_no_scatter_left(monkeypatch: pytest.MonkeyPatch, params_of: Any) -> None:
    counts = []
    run = Passes.__call__

    def counted(self: Passes, graph: Graph) -> None:
        before = _scatters(graph)
        run(self, graph)
        counts.append((before, _scatters(graph)))

    monkeypatch.setattr(Passes, "__call__", counted)
    monkeypatch.setattr(Passes, "uuid", lambda self: None)  # no cache, or there may be nothing to compile
    model = nn.Linear(4, 3).double()
    params = params_of(model, 5)
    optimizer = torch.optim.SGD(tree_leaves(params))
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, -100, 0, 1, 2])
    steps = [fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile=c) for c in (True, False)]
    compiled, plain = (step.gradients(params, x, y) for step in steps)
    assert_same(compiled, plain)
    assert counts == [(1, 0)]


@with_inductor
def test_a_loss_that_scatters_itself_still_refuses_labels() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        chosen = torch.zeros_like(log_probs).scatter_add(1, y[:, None], torch.ones_like(log_probs[:, :1]))
        return -(chosen * log_probs).sum(1).mean()

    model = nn.Linear(4, 3)
    params = fe.ensemble_params(model, 2)
    step = fe.make_train_step(fe.make_forward(model), loss, torch.optim.SGD(tree_leaves(params)))
    step(params, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    with pytest.raises(ValueError, match="labels: expected 0 <= y < 3"):
        step(params, torch.randn(5, 4), torch.tensor([7, 1, 2, 0, 1]))
