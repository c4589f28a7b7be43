"""What a first call traces: no more than its own model needs, whatever this process has compiled before."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import functorch_ens as fe
from functorch_ens._compile import waiting

Graph = torch.fx.GraphModule


def _graphs(models: list[tuple[nn.Module, int, torch.Tensor]]) -> list[list[Graph]]:
    """The graphs that a first step of each (model, E, batch) makes, in one process."""
    found: list[list[Graph]] = []

    def keep(graph: Graph, inputs: Any) -> Any:
        found[-1].append(graph)
        return graph

    for model, E, x in models:
        found.append([])
        params, y = fe.batchensemble_params(model, E), torch.zeros(len(x), dtype=torch.long)
        optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
        step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile={"backend": keep})
        step.gradients(params, x, y, buffers=fe.ensemble_buffers(model, E))
    return found


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


@pytest.mark.compile
def test_no_size_is_a_symbol_because_another_step_had_another_size() -> None:
    """Dynamo remembers by the name of the code which sizes have changed; each step has code of its own name."""
    graphs = _graphs(
        [(_mlp(5), 2, torch.randn(6, 3)), (_mlp(7), 3, torch.randn(9, 3)), (_mlp(5), 4, torch.randn(8, 3))]
    )
    for of_one in graphs:
        assert len(of_one) == 1
        values = [node.meta.get("example_value") for node in of_one[0].graph.nodes]
        sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
        assert sizes and not any(isinstance(each, torch.SymInt) for each in [*values, *sizes])


@pytest.mark.compile
def test_dynamo_traces_no_einops_in_a_forward_by_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """einops parses its pattern in Python. Dynamo would trace that for every layer, at a higher cost than the layer."""
    import torch._dynamo.symbolic_convert as dynamo

    inlined: set[str] = set()
    run = dynamo.InliningInstructionTranslator.run

    def noted(self: Any) -> Any:
        inlined.add(self.f_code.co_filename)
        return run(self)

    monkeypatch.setattr(dynamo.InliningInstructionTranslator, "run", noted)
    conv = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4))
    _graphs([(conv, 2, torch.randn(5, 2, 4)), (_mlp(5), 2, torch.randn(6, 3))])
    assert any("functorch_ens" in name for name in inlined) and not [name for name in inlined if "einops" in name]


@pytest.mark.parametrize(("at_a_terminal", "seconds"), [(True, 0.05), (True, 5.0), (False, 0.05)])
def test_a_long_compilation_is_told_at_a_terminal(
    at_a_terminal: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: at_a_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(waiting, "WAIT", seconds)

    def slowly(graph: Any, inputs: Any) -> Any:
        time.sleep(0.5)
        return graph

    model = nn.Linear(3, 2)
    params = fe.ensemble_params(model, 2)
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    step = fe.make_train_step(fe.make_forward(model), F.cross_entropy, optimizer, compile={"backend": slowly})
    for _ in range(2):
        step(params, torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    told = at_a_terminal and seconds < 0.5
    assert [line[:30] for line in stream.getvalue().splitlines()] == [
        "functorch_ens: compiling, once",
        "functorch_ens: compiling took ",
    ] * told
