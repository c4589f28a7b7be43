"""Models to try an ensemble library on: every layer of torch.nn, ways to write a model, and all of torchvision."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint


class Sample(NamedTuple):
    """A model, and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Case(NamedTuple):
    """One model of the zoo. `make` builds it, anew and with random weights."""

    family: str
    name: str
    make: Callable[[], Sample]


FAMILIES: tuple[str, ...] = (
    "nn",
    "written",
    "classification",
    "quantization",
    "segmentation",
    "video",
    "optical_flow",
    "detection",
)
"""`nn`: the layers of torch.nn; `written`: ways to write a model; the others are torchvision's, as it calls them."""


def exact(case: Case) -> Sample:
    """The model of `case` and its inputs in float64 and complex128; integers stay."""
    model, args, kwargs = case.make()
    model._apply(_to_exact)
    return Sample(model, *pytree.tree_map(_to_exact, (args, kwargs)))


def _to_exact(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.to(torch.complex128) if value.is_complex() else value


def cases(family: str) -> list[Case]:
    """The models of one family."""
    if family == "nn":
        return [Case(family, name, make) for name, make in _layers().items()]
    if family == "written":
        return [Case(family, name, make) for name, make in _written().items()]
    return [Case(family, name, partial(_torchvision, family, name)) for name in torchvision_names(family)]


# --------------------------------------------------------------------------------------------------------------------
# torch.nn

NOT_LAYERS = frozenset(
    "Module Container Sequential ModuleList ModuleDict ParameterList ParameterDict RNNBase RNNCellBase NLLLoss2d "
    "LinearCrossEntropyOptions".split()
)
"""The names in torch.nn that are containers, bases, options, or deprecated."""


class After(nn.Module):
    """A layer without parameters of its own, after one that has some."""

    def __init__(self, first: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.layer = layer

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.layer(self.first(x), *others)


class Unpool(nn.Module):
    """Max pooling and its inverse, which takes the indices."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.pool = getattr(nn, f"MaxPool{n}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{n}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(self.first(x)))


def _of(layer: Callable[[], nn.Module], *inputs: Any, **kwargs: Any) -> Callable[[], Sample]:
    """A case: `inputs` are shapes of random numbers (lists), or functions that make an input."""

    def make() -> Sample:
        args = tuple(torch.randn(each) if isinstance(each, list) else each() for each in inputs)
        return Sample(layer(), args, kwargs)

    return make


def _after(layer: Callable[[], nn.Module], shape: list[int], *others: Any) -> Callable[[], Sample]:
    """A case of a layer without parameters, after a linear one over the last axis."""
    return _of(lambda: After(nn.Linear(shape[-1], shape[-1]), layer()), shape, *others)


def _integers(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape)


def _lazy(layer: Callable[[], nn.Module], shape: list[int]) -> Callable[[], Sample]:
    def make() -> Sample:
        with warnings.catch_warnings(action="ignore"):
            model = After(nn.Linear(shape[-1], shape[-1]), layer())
        model(torch.randn(shape))
        return Sample(model, (torch.randn(shape),), {})

    return make


def _layers() -> dict[str, Callable[[], Sample]]:
    """Every layer of torch.nn by its name, some with options after a comma."""
    found: dict[str, Callable[[], Sample]] = {}
    shapes = {1: [3, 4, 8], 2: [3, 4, 8, 8], 3: [2, 4, 8, 8, 8]}
    for n, shape in shapes.items():
        simple: dict[str, Any] = {"Conv": (4, 6, 3), "ConvTranspose": (4, 6, 3)}
        for kind, arguments in simple.items():
            found[f"{kind}{n}d"] = _of(partial(getattr(nn, f"{kind}{n}d"), *arguments), shape)
        found[f"Conv{n}d, groups"] = _of(partial(getattr(nn, f"Conv{n}d"), 4, 8, 3, 2, 1, groups=2), shape)
        norm = getattr(nn, f"BatchNorm{n}d")
        found[f"BatchNorm{n}d"] = _after(partial(norm, 4), shape)
        found[f"BatchNorm{n}d, momentum None"] = _after(partial(norm, 4, momentum=None), shape)
        norm = partial(getattr(nn, f"InstanceNorm{n}d"), 4, affine=True, track_running_stats=True)
        found[f"InstanceNorm{n}d, running"] = _after(norm, shape)
        found[f"InstanceNorm{n}d"] = _after(partial(getattr(nn, f"InstanceNorm{n}d"), 4), shape)
        lazy: dict[str, Any] = {
            "Conv": {"out_channels": 6, "kernel_size": 3},
            "ConvTranspose": {"out_channels": 6, "kernel_size": 3},
            "BatchNorm": {},
            "InstanceNorm": {"affine": True},
        }
        for kind, arguments in lazy.items():
            found[f"Lazy{kind}{n}d"] = _lazy(partial(getattr(nn, f"Lazy{kind}{n}d"), **arguments), shape)
        for kind in ("ConstantPad", "ZeroPad", "CircularPad", "ReflectionPad", "ReplicationPad"):
            more = (0.5,) if kind == "ConstantPad" else ()
            found[f"{kind}{n}d"] = _after(partial(getattr(nn, f"{kind}{n}d"), 1, *more), shape)
        found[f"AvgPool{n}d"] = _after(partial(getattr(nn, f"AvgPool{n}d"), 2), shape)
        found[f"MaxPool{n}d"] = _after(partial(getattr(nn, f"MaxPool{n}d"), 2), shape)
        found[f"LPPool{n}d"] = _after(partial(getattr(nn, f"LPPool{n}d"), 2, 2), shape)
        found[f"AdaptiveAvgPool{n}d"] = _after(partial(getattr(nn, f"AdaptiveAvgPool{n}d"), 3), shape)
        found[f"AdaptiveMaxPool{n}d"] = _after(partial(getattr(nn, f"AdaptiveMaxPool{n}d"), 3), shape)
        found[f"MaxUnpool{n}d"] = _of(partial(Unpool, n), shape)
        found[f"Dropout{n}d"] = _after(getattr(nn, f"Dropout{n}d"), shape)
        if n > 1:
            found[f"FractionalMaxPool{n}d"] = _after(
                partial(getattr(nn, f"FractionalMaxPool{n}d"), 2, output_ratio=0.5), shape
            )
    image = shapes[2]
    for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "Softmax2d"):
        found[name] = _after(getattr(nn, name), image)
    for name in (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 "
        "RReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Flatten"
    ).split():
        found[name] = _after(getattr(nn, name), [3, 6])
    for name in ("LogSoftmax", "Softmax", "Softmin"):
        found[name] = _after(partial(getattr(nn, name), -1), [3, 6])
    for inplace in ("ReLU", "ELU", "Hardswish", "SiLU", "Dropout", "RReLU"):
        found[f"{inplace}, inplace"] = _after(partial(getattr(nn, inplace), inplace=True), [3, 6])
    found |= {
        "Linear": _of(lambda: nn.Linear(4, 3), [2, 4]),
        "LazyLinear": _lazy(lambda: nn.LazyLinear(3), [2, 4]),
        "Bilinear": _of(lambda: nn.Bilinear(3, 4, 2), [5, 3], [5, 4]),
        "PReLU": _after(lambda: nn.PReLU(4), [3, 4]),
        "Threshold": _after(lambda: nn.Threshold(0.1, 0.0), [3, 6]),
        "LayerNorm": _after(lambda: nn.LayerNorm(4), [3, 4]),
        "RMSNorm": _after(lambda: nn.RMSNorm(4), [3, 4]),
        "GroupNorm": _after(lambda: nn.GroupNorm(2, 4), image),
        "SyncBatchNorm": _after(lambda: nn.SyncBatchNorm(4), image),
        "LocalResponseNorm": _after(lambda: nn.LocalResponseNorm(2), image),
        "CrossMapLRN2d": _after(lambda: nn.CrossMapLRN2d(2), image),
        "ChannelShuffle": _after(lambda: nn.ChannelShuffle(2), image),
        "PixelShuffle": _after(lambda: nn.PixelShuffle(2), image),
        "PixelUnshuffle": _after(lambda: nn.PixelUnshuffle(2), image),
        "Upsample": _after(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), image),
        "UpsamplingNearest2d": _after(lambda: nn.UpsamplingNearest2d(scale_factor=2), image),
        "UpsamplingBilinear2d": _after(lambda: nn.UpsamplingBilinear2d(scale_factor=2), image),
        "Unflatten": _after(lambda: nn.Unflatten(1, (2, 3)), [3, 6]),
        "Unfold": _after(lambda: nn.Unfold(2), image),
        "Fold": _after(lambda: nn.Fold((4, 5), (2, 2)), [2, 12, 12]),
        "CosineSimilarity": _after(nn.CosineSimilarity, [3, 6], [3, 6]),
        "PairwiseDistance": _after(nn.PairwiseDistance, [3, 6], [3, 6]),
        # Embeddings
        "Embedding": _of(lambda: nn.Embedding(5, 3), _integers(5, 4, 2)),
        "Embedding, padding_idx": _of(lambda: nn.Embedding(5, 3, padding_idx=1), _integers(5, 4, 2)),
        "Embedding, max_norm": _of(lambda: nn.Embedding(5, 3, max_norm=0.5), _integers(5, 4, 2)),
        "Embedding, sparse": _of(lambda: nn.Embedding(5, 3, sparse=True), _integers(5, 4, 2)),
        "EmbeddingBag": _of(lambda: nn.EmbeddingBag(5, 3), _integers(5, 4, 2)),
        "EmbeddingBag, sum, offsets": _of(
            lambda: nn.EmbeddingBag(5, 3, mode="sum"), _integers(5, 6), lambda: torch.tensor([0, 2, 3])
        ),
        "EmbeddingBag, max": _of(lambda: nn.EmbeddingBag(5, 3, mode="max"), _integers(5, 4, 2)),
        "EmbeddingBag, max_norm": _of(lambda: nn.EmbeddingBag(5, 3, max_norm=0.5, padding_idx=1), _integers(5, 4, 2)),
        "EmbeddingBag, sparse": _of(lambda: nn.EmbeddingBag(5, 3, mode="sum", sparse=True), _integers(5, 4, 2)),
        # Recurrent
        "RNNCell": _of(lambda: nn.RNNCell(4, 3), [2, 4]),
        "GRUCell": _of(lambda: nn.GRUCell(4, 3), [2, 4]),
        "LSTMCell": _of(lambda: nn.LSTMCell(4, 3), [2, 4]),
        "RNN": _of(lambda: nn.RNN(4, 3, batch_first=True), [2, 5, 4]),
        "RNN, relu, layers": _of(lambda: nn.RNN(4, 3, 2, nonlinearity="relu", dropout=0.5), [5, 2, 4]),
        "GRU": _of(lambda: nn.GRU(4, 3, 2, bidirectional=True, bias=False), [5, 2, 4]),
        "LSTM": _of(lambda: nn.LSTM(4, 3, batch_first=True), [2, 5, 4]),
        "LSTM, projection, layers, both ways": _of(
            lambda: nn.LSTM(4, 3, 2, proj_size=2, bidirectional=True, dropout=0.5), [5, 2, 4]
        ),
        "LSTM, without a batch": _of(lambda: nn.LSTM(4, 3), [5, 4]),
        "LSTM, packed": _of(
            lambda: nn.LSTM(4, 3, bidirectional=True),
            lambda: pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 2, 4]), enforce_sorted=False),
        ),
        "GRU, packed": _of(
            lambda: nn.GRU(4, 3), lambda: pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 2]))
        ),
        # Attention
        "MultiheadAttention": _of(lambda: nn.MultiheadAttention(4, 2, dropout=0.1), [5, 2, 4], [5, 2, 4], [5, 2, 4]),
        "MultiheadAttention, kdim, vdim, bias_kv": _of(
            lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True, batch_first=True),
            [2, 5, 4],
            [2, 6, 3],
            [2, 6, 5],
            need_weights=False,
        ),
        "TransformerEncoderLayer": _of(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), [2, 5, 4]),
        "TransformerEncoderLayer, masked": _of(
            lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
            [2, 5, 4],
            src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
        ),
        "TransformerDecoderLayer": _of(lambda: nn.TransformerDecoderLayer(4, 2, 8, 0.0), [5, 2, 4], [6, 2, 4]),
        "TransformerEncoder": _of(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2), [2, 5, 4]
        ),
        "TransformerDecoder": _of(
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, 0.0), 2), [5, 2, 4], [6, 2, 4]
        ),
        "Transformer": _of(lambda: nn.Transformer(4, 2, 1, 1, 8, 0.0, batch_first=True), [2, 5, 4], [2, 6, 4]),
        # Losses, as the last layer of a model
        "AdaptiveLogSoftmaxWithLoss": _of(
            lambda: nn.AdaptiveLogSoftmaxWithLoss(32, 10, [2, 5]), [4, 32], lambda: torch.tensor([0, 3, 7, 9])
        ),
        "CrossEntropyLoss": _after(nn.CrossEntropyLoss, [4, 3], _integers(3, 4)),
        "CTCLoss": _after(
            nn.CTCLoss,
            [6, 2, 5],
            lambda: torch.randint(1, 5, (2, 3)),
            lambda: torch.tensor([6, 6]),
            lambda: torch.tensor([3, 2]),
        ),
        "NLLLoss": _after(nn.NLLLoss, [4, 3], _integers(3, 4)),
        "MultiMarginLoss": _after(nn.MultiMarginLoss, [4, 3], _integers(3, 4)),
        "MultiLabelMarginLoss": _after(nn.MultiLabelMarginLoss, [2, 3], lambda: torch.tensor([[0, 2, -1], [1, -1, 0]])),
        "MultiLabelSoftMarginLoss": _after(nn.MultiLabelSoftMarginLoss, [2, 3], lambda: torch.ones(2, 3)),
        "BCELoss": _of(lambda: After(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), nn.BCELoss()), [4, 3], _half),
        "BCEWithLogitsLoss": _after(nn.BCEWithLogitsLoss, [4, 3], _half),
        "CosineEmbeddingLoss": _after(nn.CosineEmbeddingLoss, [4, 3], [4, 3], lambda: torch.tensor([1, -1, 1, 1])),
        "MarginRankingLoss": _after(nn.MarginRankingLoss, [4], [4], lambda: torch.tensor([1.0, -1, 1, 1])),
        "HingeEmbeddingLoss": _after(nn.HingeEmbeddingLoss, [4], lambda: torch.tensor([1, -1, 1, 1])),
        "SoftMarginLoss": _after(nn.SoftMarginLoss, [4], lambda: torch.tensor([1.0, -1, 1, 1])),
        "GaussianNLLLoss": _after(nn.GaussianNLLLoss, [4, 3], [4, 3], _half),
        "KLDivLoss": _after(partial(nn.KLDivLoss, reduction="batchmean"), [4, 3], _half),
        "PoissonNLLLoss": _after(nn.PoissonNLLLoss, [4, 3], _half),
        "TripletMarginLoss": _after(nn.TripletMarginLoss, [4, 3], [4, 3], [4, 3]),
        "TripletMarginWithDistanceLoss": _after(nn.TripletMarginWithDistanceLoss, [4, 3], [4, 3], [4, 3]),
        **{
            name: _after(getattr(nn, name), [4, 3], [4, 3])
            for name in ("HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss")
        },
    }
    if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
        found["LinearCrossEntropyLoss"] = _of(lambda: nn.LinearCrossEntropyLoss(6, 4), [5, 6], _integers(4, 5))
    return found


def _half() -> Tensor:
    return torch.full((4, 3), 0.5)


# --------------------------------------------------------------------------------------------------------------------
# Ways to write a model


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
    """Branches that are added and concatenated, and one layer used twice; several inputs, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = x + scale * self.norm(self.layer(x)).relu()
        branch = self.layer(hidden if other is None else other)
        return {"hidden": hidden, "logits": self.head(torch.cat([hidden, branch], -1))}


@dataclass
class Answer:
    """An output that no pytree library knows."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = "text"


class Dataclass(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Answer:
        hidden = self.first(x).tanh()
        return Answer(self.second(hidden), (hidden,))


class DirectAccess(nn.Module):
    """Reads the weights of its layers itself, as torchvision's Swin transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.linear(x, self.inner.weight, self.inner.bias).tanh())


class ControlFlow(nn.Module):
    """Takes a branch by the values that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        steps = 0
        while hidden.abs().mean() > 0.1 and steps < 4:
            hidden, steps = hidden / 2, steps + 1
        return self.second(hidden)


class Checkpointed(nn.Module):
    """Computes its layers again in the backward pass, to save memory."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)  # for reentrant checkpointing the input must have a gradient
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Cached(nn.Module):
    """Keeps a mask and its last output on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.mask: Tensor | None = None
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape != x.shape[1:]:
            self.mask = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
        y = self.layer(x) * self.mask
        self.last.append(y)
        return y


class Buffers(nn.Module):
    """A buffer that is saved and updated, one that is not persistent, and a frozen layer."""

    steps: Tensor
    mean: Tensor
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x + self.positions)
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.frozen(hidden - self.mean)


class Hooked(nn.Module):
    """Hooks that change what enters and what leaves a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.first.register_forward_pre_hook(_double_inputs)
        self.first.register_forward_hook(_tanh)
        self.second.register_full_backward_hook(_halve_gradients)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _double_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(2 * x for x in args)


def _tanh(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.tanh()


def _halve_gradients(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if g is None else g / 2 for g in inputs)


class Autocast(nn.Module):
    """Computes in bfloat16 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.second(self.first(x).relu()).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth as it is often written: random numbers written to a new tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.layer(x)
        keep = x.new_empty((x.shape[0], 1)).bernoulli_(0.8)
        return x + self.layer(x) * keep.div_(0.8)


class FilledIn(nn.Module):
    """Writes its result into a tensor that it has made before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        out[:, :2] = self.layer(x)
        out[:, 2] = x.sum(-1)
        return out


class Complex(nn.Module):
    """A complex weight, with the Fourier transform around it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) @ self.weight.T, n=x.shape[-1])


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def shared_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def _compiled() -> nn.Module:
    compiled: Any = torch.compile(_mlp(), backend="eager")
    return compiled


def _compiled_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), _compiled())


def _compiled_in_place() -> nn.Module:
    model = _mlp()
    model.compile(backend="eager")
    return model


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(nn.Linear(4, 3))


def _written() -> dict[str, Callable[[], Sample]]:
    """Models as people write them, by what is special about them."""
    x = [3, 4]
    return {
        "mlp": _of(_mlp, x),
        "bare parameters, ParameterList, ParameterDict": _of(Matrices, [5, 3]),
        "tied weights": _of(Tied, _integers(5, 2, 3)),
        "a layer in two places": _of(shared_layer, x),
        "several inputs, kwargs, a dict out": _of(Residual, x, x, scale=0.5),
        "a dataclass out": _of(Dataclass, x),
        "reads a layer's weight": _of(DirectAccess, [5, 3]),
        "data-dependent control flow": _of(ControlFlow, x),
        "checkpointing": _of(lambda: Checkpointed(False), x),
        "checkpointing, reentrant": _of(lambda: Checkpointed(True), x),
        "caches": _of(Cached, x),
        "buffers, frozen parts": _of(Buffers, x),
        "hooks": _of(Hooked, x),
        "autocast inside": _of(Autocast, [3, 8]),
        "drop path": _of(DropPath, x),
        "writes into a new tensor": _of(FilledIn, x),
        "complex weights": _of(Complex, x),
        "weight_norm": _of(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), x),
        "weight_norm, old": _of(_old_weight_norm, x),
        "spectral_norm": _of(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), x),
        "spectral_norm, old": _of(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), x),
        "orthogonal": _of(lambda: parametrizations.orthogonal(nn.Linear(4, 3)), x),
        "pruned": _of(_pruned, x),
        "torch.compile": _of(_compiled, x),
        "torch.compile, inside": _of(_compiled_inside, x),
        "torch.compile, in place": _of(_compiled_in_place, x),
    }


# --------------------------------------------------------------------------------------------------------------------
# torchvision


def torchvision_names(family: str) -> list[str]:
    """The names of torchvision's models of one kind."""
    from torchvision import models

    module = models if family == "classification" else getattr(models, family)
    return models.list_models(module=module)


# The square image that a model gets, where it takes none of 32 pixels, or batch norm would see single numbers there.
_SIZES = {"alexnet": 63, "inception": 75, "maxvit": 224, "raft": 128, "mvit": 64, "s3d": 224, "regnet": 64}
_BATCH = 4  # of fewer, batch norm makes numbers that rounding changes
_MVIT_FRAMES = 4


# Few boxes, and none dropped by a threshold, which rounding could pass in a network that has not been trained.
_FEW_BOXES: dict[str, Any] = {
    **{f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")},
    "rpn_nms_thresh": 1.0,
    "box_nms_thresh": 1.0,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
}


def _torchvision(family: str, name: str) -> Sample:
    """A model of torchvision with few classes, and tiny images, videos, or pairs of images for it."""
    from torchvision import models

    plain = name.removeprefix("quantized_")
    size = max([side for start, side in _SIZES.items() if plain.startswith(start)], default=32)
    options: dict[str, Any] = {"weights": None}
    if family != "optical_flow":
        options["num_classes"] = 5
    if family in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if family == "quantization":
        options["quantize"] = False
    if plain in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_"):
        options["image_size"] = 4 * int(name.rpartition("_")[2])
        size = options["image_size"]
    if family == "detection":
        options |= {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
        options |= _FEW_BOXES if "rcnn" in name else {}
    with warnings.catch_warnings(action="ignore"), _smaller_mvit(size):
        model = models.get_model(name, **options)
    if family == "detection":
        return Sample(model, (list(torch.rand(_BATCH, 3, 64, 64)), _targets(_BATCH)), {})
    if family == "video":
        frames = _MVIT_FRAMES if name.startswith("mvit") else 16 if name == "s3d" else 4
        return Sample(model, (torch.randn(_BATCH, 3, frames, size, size),), {})
    if family == "optical_flow":
        return Sample(model, tuple(torch.rand(2, 1, 3, size, size)), {"num_flow_updates": 2})
    return Sample(model, (torch.randn(_BATCH, 3, size, size),), {})


@contextmanager
def _smaller_mvit(size: int) -> Iterator[None]:
    """torchvision's builders of MViT for shorter videos of `size` by `size` pixels than their options allow."""
    from torchvision.models.video import mvit

    def smaller(**options: Any) -> nn.Module:
        return own(**{**options, "spatial_size": (size, size), "temporal_size": _MVIT_FRAMES})

    own, mvit._mvit = mvit._mvit, smaller
    try:
        yield
    finally:
        mvit._mvit = own


def _targets(images: int) -> list[dict[str, Tensor]]:
    """What a detector learns from: one object in each image of 64 by 64 pixels."""
    return [
        {
            "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
            "keypoints": torch.tensor([[[10.0, 10.0, 1.0]] * 17]),
        }
        for _ in range(images)
    ]
