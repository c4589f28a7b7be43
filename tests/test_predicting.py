"""Predictions in batches are the forward of the whole, in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import randn
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same, both_kinds
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import functorch_ens as fe


def _net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    return net.double()


@given(
    N=st.integers(1, 20), size=st.integers(1, 25), own_inputs=st.booleans(), strategy=st.sampled_from(["vmap", "loop"])
)
def test_batches_give_the_forward_of_the_whole(N: int, size: int, own_inputs: bool, strategy: str) -> None:
    model, x = _net(), randn(N, 3)
    model[0].eval()  # a mode of its own, which stays as it is
    params, buffers = fe.ensemble_params(model, 3), fe.ensemble_buffers(model, 3)
    buffers["1.running_mean"] += randn(3, 5)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    modes = [module.training for module in model.modules()]
    forward = fe.make_forward(model, member_inputs=own_inputs, strategy=strategy)
    got = fe.predict(forward, params, x, buffers=buffers, batch_size=size)
    assert modes == [module.training for module in model.modules()]
    assert_same(buffers, before)
    assert not got.requires_grad
    for i in range(3):
        alone = _net().eval()
        alone.load_state_dict({**fe.member_params(model, params, i), **{k: v[i] for k, v in buffers.items()}})
        assert_same(got[i], alone(x).detach())


def test_several_inputs_and_outputs_and_what_is_prepared() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Any:
            y = self.layer(a + b)
            return {"y": y * scale, "none": None, "pair": (y, y[:, 0])}

    model, a, b = Two(), torch.arange(21).reshape(7, 3), randn(7, 3)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    got = fe.predict(forward, params, a, b, batch_size=3, prepare=lambda a, b: (a.double() / 255, b), scale=2.0)
    want = forward(params, a.double() / 255, b, scale=2.0)
    assert got["none"] is None
    assert_same((got["y"], got["pair"]), (want["y"].detach(), tuple(x.detach() for x in want["pair"])))


@dataclass
class _Answer:
    logits: Tensor
    name: str = "answer"


class _Answers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2).double(), kind

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        kinds = {"dataclass": _Answer(y), "mean": y.mean(0), "scalar": y.sum(), "count": (y, len(x)), "turned": y.T}
        return kinds[self.kind]


def test_a_dataclass_is_put_together_and_what_has_no_row_for_each_input_is_refused() -> None:
    x = randn(10, 3)
    model = _Answers("dataclass")
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    got = fe.predict(forward, params, x, batch_size=4)
    assert isinstance(got, _Answer) and got.name == "answer"
    assert_same(got.logits, forward(params, x).logits.detach())
    for kind in ("mean", "scalar", "count", "turned"):
        forward = fe.make_forward(_Answers(kind))
        with pytest.raises(ValueError, match=r"output: expected tensors \[2, \d, ...\], a row for each input"):
            fe.predict(forward, params, x, batch_size=4)


class _OwnModes(nn.Sequential):
    """One of its layers stays in training mode (Monte Carlo dropout); with `flag`, its eval sets one of its own."""

    flag: bool | None = None

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self[1].train()
        if self.flag is not None:
            self.flag = mode
        return self


def test_a_model_says_itself_what_eval_mode_is(caplog: pytest.LogCaptureFixture) -> None:
    model, x = _OwnModes(nn.Linear(3, 4), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(4, 2)).double(), randn(50, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)
    torch.manual_seed(0)
    got = fe.predict(forward, params, x)
    assert all(module.training for module in model.modules())
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        assert_same(got, forward(params, x))
    assert not caplog.records or "also sets" not in caplog.text
    model.flag = True
    for _ in range(2):
        fe.predict(forward, params, x)
    assert caplog.text.count("its own eval() also sets flag") == 1


def test_an_eval_that_needs_values_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Merging(nn.Sequential):
        def eval(self) -> Any:
            assert next(self.parameters()).sum().item() != 0
            return super().eval()

    dropout = nn.Dropout(0.5)
    dropout.train = lambda mode=True: dropout  # type: ignore[method-assign]
    on_instance = nn.Sequential(nn.Linear(3, 4), dropout)
    fe.predict(fe.make_forward(on_instance), fe.ensemble_params(on_instance, 2), torch.ones(1, 3))
    assert "set on an instance" in caplog.text
    caplog.clear()
    model, x = Merging(nn.Linear(3, 4), nn.Dropout(0.5)).double(), randn(5, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)
    got = [fe.predict(forward, params, x) for _ in range(2)][1]
    assert caplog.text.count("its own eval() cannot be tried on a copy without memory") == 1
    model.eval()
    assert_same(got, forward(params, x).detach())


def test_an_error_leaves_the_mode_as_it_was() -> None:
    model = _net().train()
    params, buffers = fe.ensemble_params(model, 2), fe.ensemble_buffers(model, 2)
    with pytest.raises(RuntimeError):
        fe.predict(fe.make_forward(model), params, randn(5, 4), buffers=buffers)
    assert all(module.training for module in model.modules())


class _Scaled(nn.Module):
    """Takes its two inputs by name too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.layer(x if scale is None else x * scale)


class _Endless(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


@pytest.mark.parametrize("own_inputs", [False, True])
def test_batches_of_a_loader_give_the_same_as_tensors(own_inputs: bool) -> None:
    model, x, scale, y = _Scaled(), randn(7, 3), randn(7, 1), torch.arange(7)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model, member_inputs=own_inputs)
    plain = fe.make_forward(model)
    want, scaled = plain(params, x).detach(), plain(params, x, scale).detach()
    pairs, named = TensorDataset(x, y), [{"x": a, "scale": b} for a, b in zip(x, scale, strict=True)]
    loaders: list[tuple[Any, Any, Any]] = [
        (DataLoader(pairs, batch_size=3), None, want),
        (DataLoader(_Endless(list(zip(x, y, strict=True))), batch_size=3), None, want),
        ([x[:3], x[3:]], None, want),
        ((batch for batch in (x[:3], x[3:])), None, want),
        (DataLoader(named, batch_size=3), None, scaled),  # type: ignore[arg-type]  # a list is a data set too
        (DataLoader(TensorDataset(x, scale, y), batch_size=3), lambda x, scale, y: (x, scale), scaled),
        (DataLoader(named, batch_size=3), lambda batch: (batch["x"], batch["scale"]), scaled),  # type: ignore[arg-type]
    ]
    for loader, prepare, expected in loaders:
        assert_same(fe.predict(forward, params, loader, prepare=prepare), expected)


def test_a_dict_of_tensors_is_one_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["x"] * batch["scale"])

    model, batch = Named(), {"x": randn(7, 3), "scale": randn(7, 1)}
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    assert_same(fe.predict(forward, params, batch, batch_size=3), forward(params, batch).detach())


def test_bad_batches() -> None:
    model = nn.Linear(3, 2).double()
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    for batches, error, message in (
        ([], ValueError, "inputs: expected at least one batch, got none"),
        ([["a", "b"]], TypeError, r"inputs: expected batches of tensors \[B, ...\], got \['a', 'b'\]"),
        ({"x": [1.0]}, TypeError, r"inputs: expected tensors .*, got list; give torch.as_tensor\(inputs\)"),
        ("x", TypeError, "inputs: expected tensors .*, got 'x'"),
    ):
        with pytest.raises(error, match=message):
            fe.predict(forward, params, batches)
    with pytest.raises(TypeError, match=r"prepare: expected .* called with \(input\), got one that takes \(a, b\)"):
        fe.predict(forward, params, randn(4, 3), prepare=lambda a, b: a)


def test_bad_arguments() -> None:
    model = nn.Linear(3, 2).double()
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    for inputs, error, message in (
        ((), TypeError, "inputs: expected tensors .*, got none"),
        ((1.0,), TypeError, r"inputs: expected tensors \[N, ...\], .* got 1.0"),
        (([1.0],), TypeError, r"inputs: expected batches of tensors \[B, ...\], got 1.0"),
        ((randn(0, 3),), ValueError, r"inputs: expected .* N > 0, got the shapes \[\[0, 3\]\]"),
        ((randn(4, 3), randn(5, 3)), ValueError, r"of one length .* got the shapes \[\[4, 3\], \[5, 3\]\]"),
        ((torch.tensor(1.0),), ValueError, r"of one length .* got the shapes \[\[\]\]"),
    ):
        with pytest.raises(error, match=message):
            fe.predict(forward, params, *inputs)
    with pytest.raises(ValueError, match="batch_size: expected a positive int, got 0"):
        fe.predict(forward, params, randn(4, 3), batch_size=0)
    with pytest.raises(TypeError, match="forward: expected the forward of an ensemble"):
        fe.predict(model, params, randn(4, 3))  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_progress_bar(progress: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    model, x = nn.Linear(3, 2).double(), randn(7, 3)
    params, forward = fe.ensemble_params(model, 2), fe.make_forward(model)
    want = fe.predict(forward, params, x)
    for data, total in ((x, 4), (DataLoader(TensorDataset(x), batch_size=2), 4), (iter(x.split(2)), None)):
        capfd.readouterr()
        assert_same(fe.predict(forward, params, data, batch_size=2, progress=progress), want)
        shown = capfd.readouterr().err
        if progress:
            assert "predict" in shown and (total is None or f"0/{total}" in shown)
        else:
            assert not shown


@pytest.mark.compile
@pytest.mark.parametrize("kind", [0, 1])
def test_compiled_batches_equal_eager_ones_and_are_compiled_once(kind: int) -> None:
    """Five whole batches and a smaller one; a second call, of other parameters, compiles nothing."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)).double()
    x, graphs = torch.randn(27, 6).double(), []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    forward, buffers = fe.make_forward(model), fe.ensemble_buffers(model, 3)
    for params in (both_kinds(model, 3)[kind], both_kinds(model, 3)[kind]):
        want = fe.predict(forward, params, x, buffers=buffers, batch_size=5)
        got = fe.predict(forward, params, x, buffers=buffers, batch_size=5, compile={"backend": keep})
        assert_same(got, want)
        assert len(graphs) == 1
    loader = [(rows, None) for rows in x.split(9)]
    got = fe.predict(forward, params, loader, buffers=buffers, compile={"backend": "eager"})
    assert_same(got, want)


@pytest.mark.compile
def test_compiled_code_that_is_wrong_or_fails_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(20, 6)
    params = fe.ensemble_params(model, 2)

    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *inputs: tuple(each + 1 for each in graph(*inputs))

    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler today")

    for backend, told in ((wrong, "differs from that of eager code"), (fails, "no compiler today")):
        caplog.clear()
        forward = fe.make_forward(model)
        got = fe.predict(forward, params, x, batch_size=5, compile={"backend": backend})
        torch.testing.assert_close(got, forward(params, x))
        assert told in caplog.text and len([r for r in caplog.records if "does not use torch" in r.getMessage()]) == 1


@pytest.mark.compile
def test_a_compiler_that_fails_later_leaves_the_call_to_eager_code(caplog: pytest.LogCaptureFixture) -> None:
    model, x, graphs = nn.Linear(6, 3), torch.randn(20, 6), []

    def once(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        if len(graphs) > 1:
            raise RuntimeError("no second graph")
        return graph

    forward, params = fe.make_forward(model), fe.ensemble_params(model, 2)
    for size in (5, 4, 10):
        got = fe.predict(forward, params, x, batch_size=size, compile={"backend": once})
        torch.testing.assert_close(got, forward(params, x))
    assert len([r for r in caplog.records if "does not use torch.compile here: no second" in r.getMessage()]) == 1
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fe.predict(forward, params, torch.randn(20, 7), batch_size=5, compile={"backend": "eager"})


def test_compile_is_a_choice_or_options() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(TypeError, match="compile: expected True, False or options"):
        fe.predict(fe.make_forward(model), fe.ensemble_params(model, 2), torch.ones(4, 6), compile=3)  # type: ignore[arg-type]
