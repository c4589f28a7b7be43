"""`fe.compile`, and the backend `"functorch_ens"` of torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import both_kinds, compiler
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import functorch_ens as fe
from functorch_ens._compile import extras, guards

inductor = pytest.mark.skipif(compiler() != "inductor", reason="it is about inductor")


def _mlp(activation: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), activation or nn.ReLU(), nn.Linear(5, 3)).double()


def _same(got: Any, want: Any) -> None:
    leaves = [torch.utils._pytree.tree_leaves(each) for each in (got, want)]
    assert len(leaves[0]) == len(leaves[1])
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def _by_name(fn: Any) -> Any:
    return torch.compile(fn, backend="functorch_ens")


WAYS: list[Callable[[Any], Any]] = [fe.compile, _by_name]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Graphs run as they are, for tests of what Dynamo traces and guards; the options that each was to be given."""
    seen: list[dict[str, Any]] = []

    def by_graph(graph: Any, inputs: Any, **options: Any) -> Any:
        seen.append(options)
        return graph

    monkeypatch.setattr(extras, "_inductor", lambda: by_graph)
    return seen


class Times(nn.Module):
    """Multiplies by numbers in a tuple, which is no setting that a forward looks at in every call."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return x * self.numbers[0]


@inductor
@pytest.mark.parametrize(("way", "kind"), [(fe.compile, 0), (_by_name, 0), (fe.compile, 1)])
def test_gradients_of_the_users_own_loss_equal_those_of_eager_code(way: Any, kind: int) -> None:
    model, x, y = _mlp(), torch.randn(7, 6).double(), torch.randint(3, (7,))
    forward, params = fe.make_forward(model), both_kinds(model, 3)[kind]

    def loss(params: fe.EnsembleParams, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(logits, y) for logits in forward(params, x)]).mean()

    def gradients(params: fe.EnsembleParams, x: Tensor, y: Tensor) -> Any:
        return torch.func.grad_and_value(loss)(params, x, y)

    compiled = way(gradients)
    _same(compiled(params, x, y), gradients(params, x, y))
    _same(compiled(params, x[:4], y[:4]), gradients(params, x[:4], y[:4]))


@inductor
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_with_backward_and_an_optimiser_trains_as_eager_code_does(way: Any) -> None:
    model, x, y = _mlp(), torch.randn(7, 6).double(), torch.randint(3, (7,))
    found = []
    for wrapped in (lambda fn: fn, way):
        params = fe.batchensemble_params(model, 3, generator=torch.Generator().manual_seed(0))
        optimizer, forward = torch.optim.SGD(fe.param_groups(params, lr=0.1)), wrapped(fe.make_forward(model))
        for _ in range(3):
            optimizer.zero_grad()
            fe.member_losses(F.cross_entropy, forward(params, x), y).sum().backward()
            optimizer.step()
        found.append([*params.shared.values(), *params.stacked.values()])
    _same(*found)


@pytest.mark.usefixtures("uncompiled")
def test_another_forward_under_the_same_name_is_computed_by_its_own_code() -> None:
    """The guards on what a forward holds are dropped; the one on its identity tells forwards apart."""
    x = torch.randn(7, 6).double()
    models = [_mlp(each) for each in (nn.ReLU(), Times(2.0), Times(3.0), Times(3.0))]
    forwards = [fe.make_forward(model) for model in models]
    forward = forwards[0]
    params = fe.batchensemble_params(models[0], 3)

    @fe.compile
    def by_closure(params: fe.EnsembleParams) -> Any:
        return forward(params, x)

    @fe.compile
    def by_argument(forward: fe.Forward, params: fe.EnsembleParams) -> Any:
        return forward(params, x)

    for forward in [*forwards, *forwards]:
        _same(by_closure(params), forward(params, x))
        _same(by_argument(forward, params), forward(params, x))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("way", WAYS)
def test_what_the_user_changes_is_seen_or_refused(way: Any) -> None:
    scale, x = 1.0, torch.randn(7, 6).double()
    model = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Dropout(0.5), nn.Linear(5, 3)).double().eval()
    forward, params = fe.make_forward(model), fe.batchensemble_params(model, 3)
    compiled = way(lambda params: forward(params, x) * scale)
    _same(compiled(params), forward(params, x))
    scale = 2.0
    _same(compiled(params), 2 * forward(params, x))
    model.train()
    assert not torch.equal(compiled(params), compiled(params))  # Dropout
    model.eval()
    _same(compiled(params), 2 * forward(params, x))
    model[1].negative_slope = 0.3  # type: ignore[assignment]  # a module's attribute
    with pytest.raises(RuntimeError, match=r"1\.negative_slope is 0.3 now and was 0.1"):
        compiled(params)
    _same(forward(params, x), fe.make_forward(model)(params, x))
    _same(compiled(params), 2 * forward(params, x))


@inductor
def test_a_pass_that_fails_leaves_the_graph_to_inductor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in list(graph.nodes)[:-1]:
                node.replace_all_uses_with(node)
            raise RuntimeError("this pass fails")

        def uuid(self) -> Any:
            return "fails"

    monkeypatch.setattr(extras, "_passes", lambda: {extras.PASS: Fails()})
    model, x = _mlp(), torch.randn(7, 6).double()
    forward, params = fe.make_forward(model), fe.batchensemble_params(model, 3)
    with caplog.at_level(logging.INFO, "functorch_ens"):
        _same(fe.compile(lambda params: forward(params, x))(params), forward(params, x))
    assert "this pass fails" in caplog.text


def test_the_extras_are_in_use(monkeypatch: pytest.MonkeyPatch, uncompiled: list[dict[str, Any]]) -> None:
    """Of a thousand guards a sixth is left, the passes are in the options, and options of the user's win."""
    counts: list[tuple[int, int]] = []
    filter_for = guards.filter_for

    def counted(*arguments: Any, **keywords: Any) -> Any:
        keep = filter_for(*arguments, **keywords)

        def count(guards: Any) -> Any:
            kept = keep(guards)
            counts.append((len(guards), sum(kept)))
            return kept

        return count

    monkeypatch.setattr(extras, "filter_for", counted)
    model, x = _mlp(), torch.randn(7, 6).double()
    forward, params = fe.make_forward(model), fe.batchensemble_params(model, 3)

    def of(params: fe.EnsembleParams) -> Any:
        return forward(params, x)

    fe.compile(of, options={"max_fusion_size": 7, "cpp.simdlen": 0})(params)
    patches = uncompiled[0]["config_patches"]
    assert patches["max_fusion_size"] == 7 and patches["cpp.simdlen"] == 0 and extras.PASS in patches
    assert counts[0][1] < 200 and counts[0][1] < counts[0][0] / 5
    fe.compile(of, mode="max-autotune-no-cudagraphs")(params)
    assert uncompiled[1]["config_patches"]["max_autotune"] is True


@pytest.mark.parametrize(("layers", "kept"), [(None, True), ("3", False)])
def test_convolutions_of_members_keep_their_layout(
    layers: str | None, kept: bool, uncompiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no member has anything of its own in a convolution, inductor chooses the layout."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(4, 1, 3, 3), torch.randint(3, (4,))
    forward, params = fe.make_forward(model), fe.batchensemble_params(model, 3, layers=layers)
    fe.compile(lambda params: forward(params, x))(params)
    assert (uncompiled[0]["config_patches"].get(extras.LAYOUT) is False) is kept
    given: list[dict[str, Any]] = []

    def uncompiled_step(function: Any, **options: Any) -> Any:
        given.append(options["options"])
        return function

    monkeypatch.setattr(torch, "compile", uncompiled_step)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.1))
    step = fe.make_train_step(forward, F.cross_entropy, optimizer)
    step.gradients(params, x, y)
    assert step.compiled_by == "functorch_ens" and (given[0].get(extras.LAYOUT) is False) is kept


def test_it_takes_what_torch_compile_takes() -> None:
    model, x = _mlp(), torch.randn(7, 6).double()
    want = model(x)
    decorated = fe.compile(backend="eager", fullgraph=True)(lambda x: model(x))
    assert torch.equal(decorated(x), want)
    assert torch.equal(fe.compile(model, backend="eager")(x), want)
    assert fe.compile(model, disable=True)(x) is not None
    options = {"epilogue_fusion": False, "guard_filter_fn": lambda guards: [True] * len(guards)}
    before = dict(options)
    fe.compile(model, options=options)
    assert options == before and config.epilogue_fusion is True
    with pytest.raises(RuntimeError, match="no_such_option"):
        fe.compile(model, options={"no_such_option": 1})
    with pytest.raises(TypeError, match="no_such"):
        fe.compile(model, no_such=1)
    with pytest.raises(RuntimeError, match="mode or options"):
        fe.compile(model, mode="default", options={"epilogue_fusion": False})
    with pytest.raises(TypeError, match="fn: expected a function or a module, got 3"):
        fe.compile(3)  # type: ignore[arg-type]  # that is the test


def test_torch_knows_the_backend_by_its_name() -> None:
    assert "functorch_ens" in torch._dynamo.list_backends()
