"""Random layers and models, with inputs for them, as hypothesis strategies."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_written import DirectAccess, Matrices, Residual, Tied, shared_layer

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


class Conv1D(nn.Module):
    """Stands for the layer of this name in transformers, a Linear whose weight is `[in, out]`."""

    __module__ = "transformers.pytorch_utils"  # by which it is known

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.nf, self.nx = out, into
        self.weight = nn.Parameter(torch.randn(into, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.nf)


class FalconLinear(nn.Linear):
    """Stands for the layer of this name in transformers."""

    __module__ = "transformers.models.falcon.modeling_falcon"  # by which it is known

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class ScaledWordEmbedding(nn.Embedding):
    """Stands for the vocabularies of transformers that are multiplied by a number, or by a buffer."""

    __module__ = "transformers.models.bart.modeling_bart"  # by which it is known

    def __init__(self, words: int, width: int, buffer: bool = False, **options: Any) -> None:
        super().__init__(words, width, **options)
        self.embed_scale: Tensor | float = 3.0
        if buffer:
            del self.embed_scale
            self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale


class MixtralExperts(nn.Module):
    """Stands for such a class in transformers: stacks of matrices `[n, out, in]`, or `[n, in, out]`."""

    __module__ = "transformers.models.mixtral.modeling_mixtral"  # by which it is known

    def __init__(self, experts: int, width: int, inner: int, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed

        def stack(out: int, into: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(experts, *((into, out) if transposed else (out, into))))

        self.up_proj, self.down_proj = stack(inner, width), stack(width, inner)
        self.up_proj_bias = nn.Parameter(torch.randn(experts, inner))

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for k in range(len(self.up_proj_bias)):  # transformers too reads the whole weight for each expert
            up, down = self.up_proj[k], self.down_proj[k]
            if self.is_transposed:
                up, down = up.mT, down.mT
            output = output + routing[..., k, None] * F.linear(F.linear(x, up, self.up_proj_bias[k]).tanh(), down)
        return output


class Mixture(nn.Module):
    """A router and experts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = MixtralExperts(3, 4, 5, transposed)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x, self.router(x).softmax(-1))


class XLNetRelativeAttention(nn.Module):
    """Stands for the layer of this name in transformers: weights `[model, heads, size]`."""

    __module__ = "transformers.models.xlnet.modeling_xlnet"  # by which it is known

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.r = (nn.Parameter(torch.randn(width, heads, size)) for _ in range(5))
        self.r_w_bias = nn.Parameter(torch.randn(heads, size))
        self.seg_embed = nn.Parameter(torch.randn(2, heads, size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, r = (torch.einsum("bld,dhk->blhk", x, weight) for weight in (self.q, self.k, self.v, self.r))
        scores = torch.einsum("blhk,bmhk->bhlm", q + self.r_w_bias, k + r + self.seg_embed[0]).softmax(-1)
        return torch.einsum("bhlm,bmhk,dhk->bld", scores, v, self.o)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norm_net(kind: type[nn.Module]) -> Any:
    return nn.Sequential(nn.Conv1d(2, 3, 2), kind(3, affine=True, track_running_stats=True), nn.ReLU()).double()


@st.composite
def _linear(draw: st.DrawFn) -> Case:
    into, out, lead = draw(sizes), draw(sizes), draw(st.lists(sizes, max_size=3))
    kinds: list[Any] = [nn.Linear, FalconLinear]
    kind = draw(st.sampled_from([*kinds, Conv1D]))
    layer = Conv1D(out, into) if kind is Conv1D else kind(into, out, bias=draw(st.booleans()))
    return Case(layer, (randn(*lead, into),))


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
    kinds: list[Any] = [nn.Embedding, ScaledWordEmbedding, partial(ScaledWordEmbedding, buffer=True)]
    kind = draw(st.sampled_from(kinds))
    layer = kind(
        words,
        draw(sizes),
        padding_idx=draw(st.sampled_from([None, 0, words - 1])),
        max_norm=draw(st.sampled_from([None, 0.5])) if kind is nn.Embedding else None,  # it writes to its weight
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


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x[..., : self.attention.vdim])


class Step(nn.Module):
    """One step of a random model, on `[B, L, W]`, which keeps that shape."""

    def __init__(self, kind: str, width: int, layer: nn.Module | None) -> None:
        super().__init__()
        self.kind = kind
        self.layer = layer if layer is not None else _STEPS[kind](width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.kind in ("conv", "batch norm", "instance norm"):  # channels first
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "attention":
            return self.layer(x, other, other)[0]
        if self.kind in ("gru", "lstm"):
            return self.layer(x)[0]
        if self.kind == "bilinear":
            return self.layer(x, other)
        if self.kind == "concatenate":
            return self.layer(torch.cat([x, other], -1))
        if self.kind == "dropout":  # its random numbers are laid out as its input is in memory
            return self.layer(x.contiguous())
        return self.layer(x)


_STEPS: dict[str, Any] = {
    "linear": lambda width: nn.Linear(width, width),
    "conv": lambda width: nn.Conv1d(width, width, 3, padding=1),
    "depthwise": lambda width: nn.Conv1d(3, 3, 1, groups=3),  # over the positions
    "batch norm": lambda width: nn.BatchNorm1d(width),
    "instance norm": lambda width: nn.InstanceNorm1d(width, affine=True, track_running_stats=True),
    "layer norm": lambda width: nn.LayerNorm(width),
    "group norm": lambda width: nn.GroupNorm(3, 3),
    "dropout": lambda width: nn.Dropout(0.3),
    "tanh": lambda width: nn.Tanh(),
    "in place": lambda width: nn.ELU(inplace=True),
    "attention": lambda width: nn.MultiheadAttention(width, 2, batch_first=True),
    "gru": lambda width: nn.GRU(width, width, batch_first=True),
    "lstm": lambda width: nn.LSTM(width, width, batch_first=True),
    "bilinear": lambda width: nn.Bilinear(width, width, width),
    "concatenate": lambda width: nn.Linear(2 * width, width),
    "weight norm": lambda width: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
}


class RandomModel(nn.Module):
    """Steps with residual connections between them; two inputs."""

    def __init__(self, words: int, width: int, steps: list[Step], residual: list[bool]) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.steps = nn.ModuleList(steps)
        self.residual = residual
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, other = x.clone(), self.embed(indices)  # the first step may write to it
        for step, residual in zip(self.steps, self.residual, strict=True):
            before = x
            x = step(x.clone() if residual else x, other)
            x = x + before if residual else x
        return self.head(x), {"mean": x.mean(1)}


@st.composite
def _random_models(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.sampled_from([2, 4]))
    steps: list[Step] = []
    for kind in draw(st.lists(st.sampled_from(list(_STEPS)), min_size=1, max_size=6)):
        earlier: list[Any] = [step.layer for step in steps if step.kind == kind]
        again = bool(earlier) and draw(st.booleans())  # a layer used twice
        steps.append(Step(kind, width, earlier[0] if again else None))
    linear: list[Any] = [step.layer for step in steps if step.kind == "linear"]
    if len(linear) > 1 and draw(st.booleans()):
        linear[1].weight = linear[0].weight
    residual = draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps)))
    for i, (before, step) in enumerate(pairwise(steps), start=1):
        if step.kind == "in place" and before.kind in ("tanh", "in place"):
            residual[i] |= not residual[i - 1]  # on a copy: torch differentiates nothing whose output is overwritten
    model = RandomModel(5, width, steps, residual)
    if draw(st.booleans()):
        model.embed.requires_grad_(False)
    return Case(model.double(), (randn(2, 3, width), torch.randint(5, (2, 3))))


random_models = _random_models()
"""Random depth, layer kinds, norms, dropout, residual and concatenating connections, tied layers, two inputs."""


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
        "experts": (Mixture(), randn(*x)),
        "experts, transposed": (Mixture(transposed=True), randn(*x)),
        "relative attention": (XLNetRelativeAttention(4, 2, 3), randn(*x)),
        "tied": (Tied(), torch.randint(5, (2, 3))),
        "residual": (Residual(), randn(3, 4)),
        "a module used twice": (shared_layer(), randn(2, 4)),
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


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits `[E, ..., C]` in float64 and labels `[...]` of any integer dtype."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    between = draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
    E, C = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    logits = draw(st.sampled_from([0.1, 1.0, 10.0])) * randn(E, *between, C)
    return logits, torch.randint(C, between).to(draw(st.sampled_from(INTEGERS)))
