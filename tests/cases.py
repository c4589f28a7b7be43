"""Random layers and models, with inputs for them, as hypothesis strategies."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

sizes = st.integers(1, 4)
members = st.integers(1, 4)


class Case(NamedTuple):
    """A model, in float64 and eval mode, and the arguments to call it with."""

    model: nn.Module
    args: tuple[Any, ...]

    def to(self, dtype: torch.dtype) -> Case:
        """A copy in another dtype; indices stay integers."""
        return Case(
            copy.deepcopy(self.model).to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in self.args)
        )


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norm_net(kind: type[nn.Module]) -> Any:
    return nn.Sequential(nn.Conv1d(2, 3, 2), kind(3, affine=True, track_running_stats=True), nn.ReLU()).double()


@st.composite
def _linear(draw: st.DrawFn) -> Case:
    into, out, lead = draw(sizes), draw(sizes), draw(st.lists(sizes, max_size=3))
    return Case(nn.Linear(into, out, bias=draw(st.booleans())), (randn(*lead, into),))


@st.composite
def _conv(draw: st.DrawFn) -> Case:
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    stride = draw(st.integers(1, 2))
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    layer = kinds[n - 1](
        into,
        out,
        kernel_size=draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.sampled_from([0, 1, *(["same"] if stride == 1 else []), "valid"])),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return Case(layer, (randn(*batch, into, *draw(st.lists(st.integers(5, 6), min_size=n, max_size=n))),))


@st.composite
def _conv_transpose(draw: st.DrawFn) -> Case:
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layer = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][n - 1](
        into,
        out,
        kernel_size=draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, max(stride, dilation) - 1)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    return Case(layer, (randn(draw(st.integers(1, 3)), into, *[draw(st.integers(3, 4))] * n),))


@st.composite
def _embedding(draw: st.DrawFn) -> Case:
    words = draw(st.integers(2, 6))
    layer = nn.Embedding(
        words,
        draw(sizes),
        padding_idx=draw(st.sampled_from([None, 0, words - 1])),
        max_norm=draw(st.sampled_from([None, 0.5])),
        scale_grad_by_freq=draw(st.booleans()),
    )
    with torch.no_grad():
        layer.weight.normal_()  # a padding row that is not zero shows that its gradient is stopped
    return Case(layer, (torch.randint(words, draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))),))


@st.composite
def _fast_layers(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    case = draw(st.one_of(_linear(), _conv(), _conv_transpose(), _embedding()))
    return Case(case.model.double().eval(), case.args)


fast_layers = _fast_layers()
"""Layers that have a fast rule, with all their options and random weights."""


class Matrices(nn.Module):
    """Bare parameters, lists and dicts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.offset = nn.Parameter(torch.randn(4))
        self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(2, 4)])
        self.named = nn.ParameterDict({"a": torch.randn(2, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.T + self.offset) @ self.many[0].T @ self.many[1].T @ self.named["a"].T


class Tied(nn.Module):
    """A language model's tied weight: an embedding's `[words, features]` is also the output layer's `[out, in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.score = nn.Linear(3, 5, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.mix(self.embed(x)).tanh())


class Residual(nn.Module):
    """Branches that are added and concatenated, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = x + self.norm(self.layer(x)).relu()
        return {"hidden": hidden, "logits": self.head(torch.cat([hidden, self.layer(hidden)], -1))}


class DirectAccess(nn.Module):
    """Reads the weights of its layers itself, as torchvision's Swin transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.linear(x, self.inner.weight, self.inner.bias).tanh())


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x[..., : self.attention.vdim])


def _twice(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), layer)


def _models() -> dict[str, Any]:
    x = (2, 3, 4)
    return {
        "bilinear": (nn.Bilinear(3, 4, 2), randn(5, 3), randn(5, 4)),
        "attention": (SelfAttention(), randn(*x)),
        "attention, bias_kv, vdim": (SelfAttention(add_bias_kv=True, vdim=3), randn(*x)),
        "transformer": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), randn(*x)),
        "lstm": (nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2, batch_first=True), randn(*x)),
        "gru": (nn.GRU(4, 3, batch_first=True), randn(*x)),
        "gru cell": (nn.GRUCell(4, 3), randn(2, 4)),
        "lstm cell": (nn.LSTMCell(4, 3), randn(2, 4)),
        "embedding bag": (nn.EmbeddingBag(5, 3, mode="mean"), torch.randint(5, (4, 2))),
        "matrices": (Matrices(), randn(5, 3)),
        "tied": (Tied(), torch.randint(5, (2, 3))),
        "residual": (Residual(), randn(3, 4)),
        "a module used twice": (_twice(nn.Linear(3, 3)), randn(2, 3)),
        "direct access": (DirectAccess(), randn(3, 3)),
        "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), randn(2, 4)),
        "mlp, layer norm": (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), randn(6, 4)),
        "convnet, batch norm": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
            randn(3, 2, 4, 4),
        ),
        "autoencoder": (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.ConvTranspose1d(3, 2, 3)), randn(2, 2, 6)),
    }


MODELS = list(_models())


def model_case(name: str) -> Case:
    """The model called `name` in MODELS, freshly made."""
    model, *args = _models()[name]
    return Case(model.double().eval(), tuple(args))
