"""Image classification data as whole uint8 tensors: decoded once, kept on the device, and indexed in batches."""

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
    """The data cannot be loaded; the message says what failed and what to do instead."""


def load(name: str, folder: Path, image_size: int | None, device: torch.device) -> Data:
    """Load a data set onto `device`.

    Args:
        name: `"digits"` (scikit-learn's), `"cifar10"`, or `"folder"` (images in train/CLASS/ and test/CLASS/).
        folder: the folder with the images, or with CIFAR-10, which is downloaded to it if it is missing.
        image_size: resize every image to a square of this many pixels; None keeps the sizes.
        device: the device of all tensors.

    Raises:
        DataUnavailable: the files are missing and cannot be downloaded, or the images of a folder differ in size.
    """
    train, test, classes = {"digits": _digits, "cifar10": _cifar10, "folder": _folder}[name](folder, image_size)
    return Data(Split(*(x.to(device) for x in train)), Split(*(x.to(device) for x in test)), classes)


def normalise(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]; ToTensor and Normalize with mean .5 and std .5 do the same."""
    return images.float().div(127.5).sub(1)


def _digits(folder: Path, image_size: int | None) -> Data:
    """Load the 1,797 handwritten digits, 8 x 8, that ship with scikit-learn; every fifth one is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().mul(255 / 16).round().to(torch.uint8)
    images = _resized(rearrange(images, "n h w -> n 1 h w"), image_size)
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Data(Split(images[~test], labels[~test]), Split(images[test], labels[test]), [str(i) for i in range(10)])


def _cifar10(folder: Path, image_size: int | None) -> Data:
    """Load CIFAR-10 from `folder`; download it if it is missing."""
    from torchvision.datasets import CIFAR10

    try:
        splits = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision passes on the errors of its HTTP, tar and checksum steps
        raise DataUnavailable(
            f"CIFAR-10 is not in {folder}, and could not be downloaded: {error}\n"
            "Copy cifar-10-python.tar.gz into that folder (or name another with --data-dir) and run again, or use\n"
            "  --data folder --data-dir DIR   any images, as DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg\n"
            "  --data digits                  needs no download"
        ) from error
    train, test = (as_split(split, image_size) for split in splits)
    return Data(train, test, list(splits[0].classes))


def as_split(cifar10: Any, image_size: int | None = None) -> Split:
    """Convert a `torchvision.datasets.CIFAR10`, whose `data` is a NumPy array `[N, H, W, C]`."""
    images = rearrange(torch.from_numpy(cifar10.data), "n h w c -> n c h w").contiguous()
    return Split(_resized(images, image_size), torch.tensor(cifar10.targets))


def _folder(folder: Path, image_size: int | None) -> Data:
    """Load the images in train/ and test/ of `folder`, each with one folder per class."""
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
    """Decode every image of a `torchvision.datasets.ImageFolder`; `name` is shown by the progress bar."""
    from torchvision.transforms.functional import pil_to_tensor

    images, labels = [], []
    # ImageFolder converts every image to RGB, so that all have three channels.
    for image, label in tqdm(folder, desc=f"decoding {name}", disable=None, leave=False):
        images.append(_resized(pil_to_tensor(image)[None], image_size)[0])
        labels.append(label)
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise DataUnavailable(f"the images in {folder.root} differ in size: {sorted(sizes)[:5]}; give --image-size N")
    return Split(torch.stack(images), torch.tensor(labels))


def _resized(images: Tensor, size: int | None) -> Tensor:
    """Resize uint8 images `[N, C, H, W]` bilinearly to `size` x `size`; None leaves them."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms.functional import resize

    return resize(images, [size, size], antialias=True)


def with_noise(data: Data, sigma: float) -> Data:
    """Add normal noise to every image, the same at every call; `sigma` is a share of the range of the pixels."""
    if not sigma:
        return data
    source = torch.Generator().manual_seed(0)

    def noisy(split: Split) -> Split:
        noise = torch.randn(split.images.shape, generator=source).mul(255 * sigma).to(split.images.device)
        return Split((split.images.float() + noise).round().clamp(0, 255).to(torch.uint8), split.labels)

    return data._replace(train=noisy(data.train), test=noisy(data.test))


def with_channels(data: Data, channels: int) -> Data:
    """Repeat grey images along the channel axis, for models that expect colour; colour images stay as they are."""
    if data.train.images.shape[1] != 1:
        return data
    return data._replace(
        train=data.train._replace(images=repeat(data.train.images, "n 1 h w -> n c h w", c=channels)),
        test=data.test._replace(images=repeat(data.test.images, "n 1 h w -> n c h w", c=channels)),
    )
