"""Layers that are computed in another form than their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from cases import randn
from measure import peak_memory
from oracle import (
    assert_same,
    assert_untouched,
    both_kinds,
    compile_whole,
    gradients,
    loop,
    snapshot,
)
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import functorch_ens as fe


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_does_not_renormalise_the_parameters(kind: type[nn.Module], strategy: str) -> None:
    model = kind(5, 3, max_norm=0.1).double()
    x = torch.tensor([[0], [2], [2]])
    for params in both_kinds(model, 2):
        before = snapshot(model, params)
        forward = fe.make_forward(model, strategy=strategy)
        y = forward(params, x)
        assert (y.norm(dim=-1) < 0.1 + 1e-6).all()
        assert_same(y, loop(model, params, x))
        assert_same(gradients(forward, params, x), gradients(partial(loop, model), params, x))
        assert_untouched(before, model, params)


@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble"])
def test_projections_of_sequences_are_one_product(kind: str) -> None:
    """vmap alone copied the weight of a projection for every position, and was 40 times slower than the loop."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.down(self.up(x.transpose(0, 1)).relu()).transpose(0, 1)

    model, x = Block(), torch.randn(2, 100, 64)
    params = both_kinds(model, 2)[kind == "BatchEnsemble"]
    peaks = {}
    for strategy in ("vmap", "loop"):
        forward = fe.make_forward(model, strategy=strategy)
        gradients(forward, params, x)
        peaks[strategy] = peak_memory(partial(gradients, forward, params, x), torch.device("cpu"))
    assert peaks["vmap"] < 1.5 * peaks["loop"]


def test_attention_keeps_apart_what_its_caller_passed_apart() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    q, k, v = randn(2, 3, 4), randn(2, 5, 4), randn(2, 5, 4)
    for args in ((q, q, q), (q, k, k), (q, k, v), (q[0], k[0], v[0])):
        for params in both_kinds(model, 2):
            assert_same(fe.make_forward(model, strategy="vmap")(params, *args), loop(model, params, *args))
    assert model.batch_first


def test_an_lstm_cell_says_what_is_wrong_with_its_input() -> None:
    model = nn.LSTMCell(4, 3)
    forward, params = fe.make_forward(model), fe.ensemble_params(model, 2)
    with pytest.raises(ValueError, match="LSTMCell: Expected input to be 1D or 2D, got 3D"):
        forward(params, torch.ones(1, 2, 4))
    with pytest.raises(RuntimeError):
        forward(params, torch.ones(2, 5))
    assert forward(params, torch.ones(4))[0].shape == (2, 3)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_compiles_at_the_first_call(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), StochasticDepth(0.5, mode), nn.Linear(4, 2))
    params, x = fe.ensemble_params(model, 3), torch.randn(6, 4)
    assert compile_whole(fe.make_forward(model))(params, x).shape == (3, 6, 2)


def test_stochastic_depth_drops_rows_of_each_member_at_its_rate() -> None:
    model = nn.Sequential(nn.Linear(1, 1), StochasticDepth(0.25, "row"))
    params, x = fe.ensemble_params(model, 4), torch.ones(4000, 1)
    kept = fe.make_forward(model, strategy="vmap")(params, x)[..., 0] != 0
    assert (kept.float().mean(1) - 0.75).abs().max() < 0.05
    assert not torch.equal(kept[0], kept[1])


def test_a_transformer_in_eval_mode_has_a_gradient_also_compiled() -> None:
    # In float32: of float64 the compiler of torch 2.11 makes a backward pass of attention with mixed dtypes.
    model, x = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), torch.randn(2, 3, 4)
    params = fe.batchensemble_params(model, 3)
    forward = fe.make_forward(model)
    step = torch.func.grad(lambda params: forward(params, x).square().sum())
    with torch.no_grad():
        assert_same(compile_whole(step)(params), step(params))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(8, 4), (2, 3, 8)),
        (nn.Conv1d(8, 4, 2), (2, 8, 5)),
        (nn.Conv2d(8, 4, 2, padding=1, padding_mode="circular"), (2, 8, 5, 5)),
        (nn.ConvTranspose1d(8, 4, 2), (2, 8, 5)),
        (_Attention(), (2, 3, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_autocast_computes_in_its_dtype(model: nn.Module, shape: tuple[int, ...], strategy: str) -> None:
    """Inside vmap, autocast does not reach convolutions, and the bias of a linear layer is added in float32."""
    x = torch.randn(shape)
    for params in both_kinds(model, 2):
        forward = fe.make_forward(model, strategy=strategy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = forward(params, x), loop(model, params, x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0.05)
        assert forward(params, x).dtype == torch.float32
