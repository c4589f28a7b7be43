"""Train a single network, a classic ensemble and a BatchEnsemble on the same images, and compare them.

python examples/compare.py                                    scikit-learn's digits, no download
python examples/compare.py --data cifar10 --epochs 10         CIFAR-10, downloaded once to --data-dir
python examples/compare.py --data folder --data-dir DIR --model resnet18
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile

import torch
import torch.nn.functional as F
from data import Data, DataUnavailable, Split, load, normalise, with_channels
from models import UnknownModel, make_model
from report import draw, table, write_json
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import functorch_ens as fe


class Unusable(Exception):
    """The model cannot be trained on these images; the message says why and what to try."""


@dataclass
class Trained:
    """The result of training one ensemble."""

    params: fe.EnsembleParams
    buffers: dict[str, Tensor]
    compile_seconds: float
    epoch_seconds: float


def train(
    name: str, model: nn.Module, forward: fe.Forward, params: fe.EnsembleParams, split: Split, args: argparse.Namespace
) -> Trained:
    """Train every member on the same batches with Adam. `params` are updated in place, as by torch.optim."""
    model.train()
    buffers = fe.ensemble_buffers(model, params.E)
    optimizer = torch.optim.Adam(tree_leaves(params), lr=args.lr)
    step = fe.make_train_step(
        forward,
        F.cross_entropy,
        optimizer,
        prepare=lambda index: (normalise(split.images[index]), split.labels[index]),
        compile=args.compile,
    )
    shuffle = torch.Generator().manual_seed(args.seed)
    size = min(args.batch_size, len(split.labels))
    steps = len(split.labels) // size
    seconds = []

    with tqdm(total=args.epochs * steps, desc=f"{name}: first step", unit="step", disable=None) as bar:
        start = time.perf_counter()
        try:
            step.gradients(params, torch.arange(size, device=split.labels.device), buffers=buffers)
        except (RuntimeError, ValueError, AssertionError) as error:
            shape = list(split.images.shape[1:])
            raise Unusable(f"{args.model} cannot be trained on images of {shape}; try --image-size. {error}") from error
        compile_seconds = time.perf_counter() - start if args.compile else 0.0
        bar.set_description(name)
        for _ in range(args.epochs):
            start = time.perf_counter()
            total = torch.zeros(params.E, device=split.labels.device)
            order = torch.randperm(len(split.labels), generator=shuffle).to(split.labels.device)
            for batch in order[: steps * size].split(size):
                losses, buffers = step(params, batch, buffers=buffers)
                total += losses
                bar.update()
            # Once per epoch, not per step: formatting a loss waits for the device.
            bar.set_postfix(loss=f"{(total / steps).mean():.4f}")
            seconds.append(time.perf_counter() - start)
    return Trained(params, buffers, compile_seconds, median(seconds))


def evaluate(forward: fe.Forward, trained: Trained, split: Split, batch: int) -> dict[str, float | list[float]]:
    """Compute accuracy, negative log likelihood and disagreement on `split`, and time the forward passes."""

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = fe.predict(
            forward, trained.params, images, buffers=trained.buffers, batch_size=batch, prepare=normalise
        )
        return logits.double().cpu()  # [E, N, C]

    predict(split.images[:1])  # warm up, untimed
    start = time.perf_counter()
    logits = predict(split.images)
    seconds = time.perf_counter() - start
    labels = split.labels.cpu()
    if not logits.isfinite().all():  # training has diverged
        nan = math.nan
        scores = {"ensemble_accuracy": nan, "ensemble_nll": nan, "disagreement": nan, "evaluate_seconds": seconds}
        return {"member_accuracy": [nan] * len(logits), "member_nll": [nan] * len(logits), **scores}
    return {
        "member_accuracy": [fe.metrics.accuracy(member[None], labels).item() for member in logits],
        "ensemble_accuracy": fe.metrics.accuracy(logits, labels).item(),
        "member_nll": [fe.metrics.nll(member[None], labels).item() for member in logits],
        "ensemble_nll": fe.metrics.nll(logits, labels).item(),
        "disagreement": fe.disagreement(logits).mean().item(),
        "evaluate_seconds": seconds,
    }


def compare(data: Data, args: argparse.Namespace) -> dict[str, dict[str, float | list[float]]]:
    """Train and evaluate the three kinds of ensemble; return the results by kind."""
    shape, classes = tuple(data.train.images.shape[1:]), len(data.classes)

    def new_model() -> nn.Module:
        return make_model(args.model, shape, classes).to(args.device)

    E = args.members
    kinds: dict[str, Callable[[nn.Module, torch.Generator], fe.EnsembleParams]] = {
        "single network": lambda model, source: fe.ensemble_params(model, 1, reset=new_model, generator=source),
        "classic ensemble": lambda model, source: fe.ensemble_params(model, E, reset=new_model, generator=source),
        "BatchEnsemble": lambda model, source: fe.batchensemble_params(model, E, init=args.init, generator=source),
    }
    results = {}
    for name, make_params in kinds.items():
        torch.manual_seed(args.seed)
        model = new_model()
        params = make_params(model, torch.Generator().manual_seed(args.seed))
        forward = fe.make_forward(model)
        trained = train(name, model, forward, params, data.train, args)
        results[name] = {
            "members": params.E,
            **evaluate(forward, trained, data.test, batch=8 * args.batch_size),
            "parameters": sum(leaf.numel() for leaf in tree_leaves(params)),
            "bytes": sum(leaf.nbytes for leaf in tree_leaves((params, trained.buffers))),
            "epoch_seconds": trained.epoch_seconds,
            "compile_seconds": trained.compile_seconds,
        }
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options. A bad value exits with a usage error that names the option."""

    def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
        def read(text: str) -> float:
            value = kind(text)
            if not 0 < value < math.inf:
                raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
            return value

        read.__name__ = "number"  # argparse prints the name: "invalid number value"
        return read

    def device(text: str) -> torch.device:
        try:
            return torch.empty(0, device=text).device
        except (RuntimeError, AssertionError) as error:
            raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from error

    def writable(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file, {text} is a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text} cannot be written: {error}") from error
        return path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=["digits", "cifar10", "folder"], default="digits", help="the data set (default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the images (default: data)")
    add("--image-size", type=positive(int), metavar="N", help="resize every image to N x N (default: keep)")
    add("--model", default="mlp", help="mlp, cnn, or a torchvision classification model by name (default: mlp)")
    add("--members", type=positive(int), default=5, metavar="E", help="members per ensemble (default: %(default)s)")
    add("--epochs", type=positive(int), default=20, metavar="N", help="passes over the data (default: %(default)s)")
    add("--batch-size", type=positive(int), default=32, metavar="B", help="images per step (default: %(default)s)")
    add("--lr", type=positive(float), default=1e-3, help="Adam's learning rate (default: %(default)s)")
    add(
        "--init",
        choices=["normal", "random_sign", "ones"],
        default="random_sign",
        help="initial values of r and s (default: %(default)s)",
    )
    add("--device", type=device, help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")
    add("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    add("--seed", type=int, default=0, help="seed of parameters and batches (default: %(default)s)")
    add("--out", type=writable, metavar="FILE", help="also write the results to FILE as JSON")
    add("--png", type=writable, default="compare.png", metavar="FILE", help="file of the plot (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: expected 0 <= seed < 2**63, got {args.seed}")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        data = load(args.data, args.data_dir, args.image_size, args.device)
        if args.model not in ("mlp", "cnn"):
            data = with_channels(data, 3)
        results = compare(data, args)
    except (DataUnavailable, UnknownModel, Unusable) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    title = (
        f"{args.data}, {args.model}: {len(data.train.labels)} training and {len(data.test.labels)} test images of "
        f"{list(data.train.images.shape[1:])}, E={args.members}, {args.epochs} epochs, batch {args.batch_size}, "
        f"Adam {args.lr:g}, r and s {args.init}; torch {torch.__version__} on {args.device}"
    )
    print(f"{title}\n\n{table(results)}")
    if args.out is not None:
        plain = (int, float, bool, type(None))
        settings = {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
        write_json({"settings": settings, "torch": torch.__version__, "results": results}, args.out)
        print(f"\nresults: {args.out}")
    draw(results, title, args.png)
    print(f"\nplot: {args.png}")


if __name__ == "__main__":
    main()
