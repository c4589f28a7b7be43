"""Models to try an ensemble library on: torch.nn's layers, ways to write a model, torchvision's, transformers'."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from sample import Sample, integers, of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree
from zoo_transformers import transformers_models
from zoo_written import written


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

OPTIONAL: tuple[str, ...] = ("transformers",)
"""Families of packages that the tests do not need."""


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
        return [Case(family, name, make) for name, make in written().items()]
    if family == "transformers":
        return [Case(family, name, make) for name, make in transformers_models().items()]
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


def _after(layer: Callable[[], nn.Module], shape: list[int], *others: Any) -> Callable[[], Sample]:
    """A case of a layer without parameters, after a linear one over the last axis."""
    return of(lambda: After(nn.Linear(shape[-1], shape[-1]), layer()), shape, *others)


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
            found[f"{kind}{n}d"] = of(partial(getattr(nn, f"{kind}{n}d"), *arguments), shape)
        found[f"Conv{n}d, groups"] = of(partial(getattr(nn, f"Conv{n}d"), 4, 8, 3, 2, 1, groups=2), shape)
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
        found[f"MaxUnpool{n}d"] = of(partial(Unpool, n), shape)
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
        "Linear": of(lambda: nn.Linear(4, 3), [2, 4]),
        "LazyLinear": _lazy(lambda: nn.LazyLinear(3), [2, 4]),
        "Bilinear": of(lambda: nn.Bilinear(3, 4, 2), [5, 3], [5, 4]),
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
        "Embedding": of(lambda: nn.Embedding(5, 3), integers(5, 4, 2)),
        "Embedding, padding_idx": of(lambda: nn.Embedding(5, 3, padding_idx=1), integers(5, 4, 2)),
        "Embedding, max_norm": of(lambda: nn.Embedding(5, 3, max_norm=0.5), integers(5, 4, 2)),
        "Embedding, sparse": of(lambda: nn.Embedding(5, 3, sparse=True), integers(5, 4, 2)),
        "EmbeddingBag": of(lambda: nn.EmbeddingBag(5, 3), integers(5, 4, 2)),
        "EmbeddingBag, sum, offsets": of(
            lambda: nn.EmbeddingBag(5, 3, mode="sum"), integers(5, 6), lambda: torch.tensor([0, 2, 3])
        ),
        "EmbeddingBag, max": of(lambda: nn.EmbeddingBag(5, 3, mode="max"), integers(5, 4, 2)),
        "EmbeddingBag, max_norm": of(lambda: nn.EmbeddingBag(5, 3, max_norm=0.5, padding_idx=1), integers(5, 4, 2)),
        "EmbeddingBag, sparse": of(lambda: nn.EmbeddingBag(5, 3, mode="sum", sparse=True), integers(5, 4, 2)),
        # Recurrent
        "RNNCell": of(lambda: nn.RNNCell(4, 3), [2, 4]),
        "GRUCell": of(lambda: nn.GRUCell(4, 3), [2, 4]),
        "LSTMCell": of(lambda: nn.LSTMCell(4, 3), [2, 4]),
        "RNN": of(lambda: nn.RNN(4, 3, batch_first=True), [2, 5, 4]),
        "RNN, relu, layers": of(lambda: nn.RNN(4, 3, 2, nonlinearity="relu", dropout=0.5), [5, 2, 4]),
        "GRU": of(lambda: nn.GRU(4, 3, 2, bidirectional=True, bias=False), [5, 2, 4]),
        "LSTM": of(lambda: nn.LSTM(4, 3, batch_first=True), [2, 5, 4]),
        "LSTM, projection, layers, both ways": of(
            lambda: nn.LSTM(4, 3, 2, proj_size=2, bidirectional=True, dropout=0.5), [5, 2, 4]
        ),
        "LSTM, without a batch": of(lambda: nn.LSTM(4, 3), [5, 4]),
        "LSTM, packed": of(
            lambda: nn.LSTM(4, 3, bidirectional=True),
            lambda: pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 2, 4]), enforce_sorted=False),
        ),
        "GRU, packed": of(
            lambda: nn.GRU(4, 3), lambda: pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 2]))
        ),
        # Attention
        "MultiheadAttention": of(lambda: nn.MultiheadAttention(4, 2, dropout=0.1), [5, 2, 4], [5, 2, 4], [5, 2, 4]),
        "MultiheadAttention, kdim, vdim, bias_kv": of(
            lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True, batch_first=True),
            [2, 5, 4],
            [2, 6, 3],
            [2, 6, 5],
            need_weights=False,
        ),
        "TransformerEncoderLayer": of(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), [2, 5, 4]),
        "TransformerEncoderLayer, masked": of(
            lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
            [2, 5, 4],
            src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
        ),
        "TransformerDecoderLayer": of(lambda: nn.TransformerDecoderLayer(4, 2, 8, 0.0), [5, 2, 4], [6, 2, 4]),
        "TransformerEncoder": of(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2), [2, 5, 4]
        ),
        "TransformerDecoder": of(
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, 0.0), 2), [5, 2, 4], [6, 2, 4]
        ),
        "Transformer": of(lambda: nn.Transformer(4, 2, 1, 1, 8, 0.0, batch_first=True), [2, 5, 4], [2, 6, 4]),
        # Losses, as the last layer of a model
        "AdaptiveLogSoftmaxWithLoss": of(
            lambda: nn.AdaptiveLogSoftmaxWithLoss(32, 10, [2, 5]), [4, 32], lambda: torch.tensor([0, 3, 7, 9])
        ),
        "CrossEntropyLoss": _after(nn.CrossEntropyLoss, [4, 3], integers(3, 4)),
        "CTCLoss": _after(
            nn.CTCLoss,
            [6, 2, 5],
            lambda: torch.randint(1, 5, (2, 3)),
            lambda: torch.tensor([6, 6]),
            lambda: torch.tensor([3, 2]),
        ),
        "NLLLoss": _after(nn.NLLLoss, [4, 3], integers(3, 4)),
        "MultiMarginLoss": _after(nn.MultiMarginLoss, [4, 3], integers(3, 4)),
        "MultiLabelMarginLoss": _after(nn.MultiLabelMarginLoss, [2, 3], lambda: torch.tensor([[0, 2, -1], [1, -1, 0]])),
        "MultiLabelSoftMarginLoss": _after(nn.MultiLabelSoftMarginLoss, [2, 3], lambda: torch.ones(2, 3)),
        "BCELoss": of(lambda: After(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), nn.BCELoss()), [4, 3], _half),
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
        found["LinearCrossEntropyLoss"] = of(lambda: nn.LinearCrossEntropyLoss(6, 4), [5, 6], integers(4, 5))
    return found


def _half() -> Tensor:
    return torch.full((4, 3), 0.5)


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
