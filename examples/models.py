"""The networks that compare.py can train, by name."""

from __future__ import annotations

import re
from math import prod

from torch import nn


class UnknownModel(Exception):
    """There is no model of this name; the message lists the names."""


def make_model(name: str, image_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build `"mlp"`, `"cnn"`, or a torchvision model, for images `[C, H, W]`.

    A number after `"mlp"` or `"cnn"` is the width: `"mlp256"` has hidden layers of 256, `"cnn16"` 16 channels first.

    Raises:
        UnknownModel: torchvision has no classification model of this name.
    """
    if own := re.fullmatch(r"(mlp|cnn)([1-9]\d*)?", name):
        width = {"width": int(own[2])} if own[2] else {}
        return mlp(prod(image_shape), classes, **width) if own[1] == "mlp" else cnn(image_shape[0], classes, **width)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UnknownModel(
            f"--model: expected mlp, cnn or a torchvision classification model such as resnet18, got {name}"
        )
    # In training these two return a tuple, with the outputs of auxiliary heads; switch the heads off.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return model


def mlp(inputs: int, classes: int, width: int = 128) -> nn.Module:
    """An MLP with two hidden layers. With 3072 inputs and 10 classes it is the MLP of the BatchEnsemble notebook."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cnn(channels: int, classes: int, width: int = 32) -> nn.Module:
    """Three convolutions with BatchNorm, two of them of stride 2, then mean pooling and a linear layer."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
