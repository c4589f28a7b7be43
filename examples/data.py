"""Image classification data as whole tensors: decoded once, held on the device, indexed in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm


class Split(NamedTuple):
    """Images as uint8 `[N, C, H, W]` and their labels as int64 `[N]`."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A training and a test split, and the names of the classes."""

    train: Split
    test: Split
    classes: list[str]


class DataUnavailable(Exception):
    """The data cannot be had; the message says what failed and what to do instead."""


def load(name: str, folder: Path, image_size: int | None, device: torch.device) -> Data:
    """The data called `name` on `device`: `"digits"`, `"cifar10"` or `"folder"` (ImageFolder, with train/ and test/).

    Raises:
        DataUnavailable: it is not there and cannot be downloaded, or the images of a folder differ in size.
    """
    train, test, classes = {"digits": _digits, "cifar10": _cifar10, "folder": _folder}[name](folder, image_size)
    return Data(Split(*(x.to(device) for x in train)), Split(*(x.to(device) for x in test)), classes)


def normalise(images: Tensor) -> Tensor:
    """uint8 images as float32 with mean .5 and std .5 taken out: 0 ... 255 becomes -1 ... 1."""
    return images.float().div(127.5).sub(1)


def _digits(folder: Path, image_size: int | None) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8, which come with it: every fifth one is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().mul(255 / 16).round().to(torch.uint8)
    images = _resized(rearrange(images, "n h w -> n 1 h w"), image_size)
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Data(Split(images[~test], labels[~test]), Split(images[test], labels[test]), [str(i) for i in range(10)])


def _cifar10(folder: Path, image_size: int | None) -> Data:
    """CIFAR-10 from `folder`, downloaded to it where it is not there."""
    from torchvision.datasets import CIFAR10

    try:
        splits = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever its HTTP, tar and checksum steps do
        raise DataUnavailable(
            f"CIFAR-10 is not in {folder}, and could not be downloaded: {error}\n"
            "Copy cifar-10-python.tar.gz into that folder (or name another with --data-dir) and run again, or use\n"
            "  --data folder --data-dir DIR   any images, as DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg\n"
            "  --data digits                  needs no download"
        ) from error
    train, test = (
        Split(
            _resized(rearrange(torch.from_numpy(split.data), "n h w c -> n c h w").contiguous(), image_size),
            torch.tensor(split.targets),
        )
        for split in splits
    )
    return Data(train, test, list(splits[0].classes))


def _folder(folder: Path, image_size: int | None) -> Data:
    """The images in train/ and test/ of `folder`, one folder per class in each."""
    from torchvision.datasets import ImageFolder

    try:
        train, test = (ImageFolder(folder / split) for split in ("train", "test"))
    except FileNotFoundError as error:
        raise DataUnavailable(
            f"{folder} is no image folder: {error}\nNeeded: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, "
            "named with --data-dir DIR"
        ) from error
    if train.classes != test.classes:
        raise DataUnavailable(f"train/ and test/ of {folder} differ in classes: {train.classes} and {test.classes}")
    return Data(_decoded(train, "train", image_size), _decoded(test, "test", image_size), train.classes)


def _decoded(folder: Any, name: str, image_size: int | None) -> Split:
    from torchvision.transforms.functional import pil_to_tensor

    images, labels = [], []
    # ImageFolder opens every image as RGB, grey ones too.
    for image, label in tqdm(folder, desc=f"decoding {name}", disable=None, leave=False):
        images.append(_resized(pil_to_tensor(image)[None], image_size)[0])
        labels.append(label)
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise DataUnavailable(f"the images in {folder.root} differ in size: {sorted(sizes)[:5]}; give --image-size N")
    return Split(torch.stack(images), torch.tensor(labels))


def _resized(images: Tensor, size: int | None) -> Tensor:
    """uint8 images `[N, C, H, W]`, bilinearly resized to `size` x `size` where it is given."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms.functional import resize

    return resize(images, [size, size], antialias=True)


def with_channels(data: Data, channels: int) -> Data:
    """Grey images repeated to `channels` channels, for models that want colour."""
    if data.train.images.shape[1] != 1:
        return data
    return data._replace(
        train=data.train._replace(images=repeat(data.train.images, "n 1 h w -> n c h w", c=channels)),
        test=data.test._replace(images=repeat(data.test.images, "n 1 h w -> n c h w", c=channels)),
    )
