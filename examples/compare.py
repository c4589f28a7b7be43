"""Train one network, a classic ensemble and a BatchEnsemble on the same images from several seeds, and compare them.

One network is also trained at the cost of an ensemble: on E times as many rows, for as many steps.

python examples/compare.py                                    scikit-learn's digits with noise, no download
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
from tempfile import TemporaryFile
from typing import Any

import torch
import torch.nn.functional as F
from data import Data, DataUnavailable, Split, load, normalise, with_channels, with_noise
from models import UnknownModel, make_model
from report import draw, in_words, table, write_json
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import functorch_ens as fe


class Unusable(Exception):
    """The model cannot be trained on these images; the message says why and what to try."""


@dataclass(frozen=True)
class Kind:
    """What is trained: how its parameters are made, and on how many rows."""

    members: int
    params: Callable[[nn.Module, torch.Generator], fe.EnsembleParams]
    rows: int = 1
    """Rows of a step, and epochs, as a multiple of the options."""


def kinds(new_model: Callable[[], nn.Module], args: argparse.Namespace) -> dict[str, Kind]:
    """What is compared, by name. `new_model` keeps the initialisation that a model does in its constructor."""
    E, flip = args.members, args.flip

    def classic(members: int) -> Callable[[nn.Module, torch.Generator], fe.EnsembleParams]:
        return lambda model, source: fe.ensemble_params(model, members, reset=new_model, generator=source)

    return {
        "one network": Kind(1, classic(1)),
        "one network, E x rows": Kind(1, classic(1), rows=E),
        "classic ensemble": Kind(E, classic(E)),
        "BatchEnsemble": Kind(E, lambda model, source: fe.batchensemble_params(model, E, flip=flip, generator=source)),
    }


def train_and_evaluate(
    name: str, kind: Kind, new_model: Callable[[], nn.Module], data: Data, args: argparse.Namespace, bar: Any
) -> dict[str, Any]:
    """Train `kind` from every seed, each member on batches of its own; return the scores of each run and the costs."""
    train = data.train

    def start(seed: int) -> tuple[nn.Module, fe.EnsembleParams]:
        torch.manual_seed(seed)
        model = new_model()
        return model, kind.params(model, torch.Generator().manual_seed(seed))

    rows = min(args.batch_size * kind.rows, len(train.labels))

    def batches(source: torch.Generator) -> list[Tensor]:
        return fe.index_batches(
            len(train.labels), rows, E=kind.members, sees="own", generator=source, device=args.device
        )

    model, params = start(args.seed)
    model.train()
    buffers = fe.ensemble_buffers(model, kind.members)
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=args.lr))
    step = fe.make_train_step(
        fe.make_forward(model, member_inputs=True),  # each member has batches of its own
        F.cross_entropy,
        optimizer,
        prepare=lambda i: (normalise(train.images[i]), train.labels[i]),
        compile=args.compile,
    )
    bar.set_description(f"{name}: first step")
    began = time.perf_counter()
    try:
        step.gradients(params, batches(torch.Generator())[0], buffers=buffers)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise Unusable(
            f"{args.model} cannot be trained on images of {list(train.images.shape[1:])}; try --image-size. {error}"
        ) from error
    compile_seconds = time.perf_counter() - began if args.compile else 0.0

    forward, runs, seconds = fe.make_forward(model), [], []
    for seed in range(args.seed, args.seed + args.seeds):
        bar.set_description(f"{name}, seed {seed}")
        with torch.no_grad():  # into the same tensors, so that the step is compiled once
            for mine, new in zip(tree_leaves(params), tree_leaves(start(seed)[1]), strict=True):
                mine.copy_(new)
        optimizer.state.clear()
        began = time.perf_counter()
        try:
            fitted = fe.fit(
                step,
                params,
                batches,
                epochs=args.epochs * kind.rows,
                buffers=buffers,
                generator=torch.Generator().manual_seed(seed),
                progress=False,
            )
        except FloatingPointError as error:
            raise Unusable(f"{name} diverges, give a smaller --lr than {args.lr:g}: {error}") from error
        seconds.append((time.perf_counter() - began) / args.epochs)
        runs.append(evaluate(forward, fitted, data.test, 8 * args.batch_size))
        bar.update()
    return {
        "members": kind.members,
        "runs": runs,
        "parameters": sum(leaf.numel() for leaf in tree_leaves(params)),
        "bytes": sum(leaf.nbytes for leaf in tree_leaves((params, buffers))),
        "epoch_seconds": min(seconds),
        "compile_seconds": compile_seconds,
    }


def evaluate(forward: fe.Forward, fitted: fe.Fitted, split: Split, batch: int) -> dict[str, Any]:
    """The scores of one run on `split`, and the time of its predictions."""
    began = time.perf_counter()
    logits: Tensor = fe.predict(
        forward, fitted.params, split.images, buffers=fitted.buffers, batch_size=batch, prepare=normalise
    )
    seconds = time.perf_counter() - began
    logits, labels = logits.double().cpu(), split.labels.cpu()  # [E, N, C]
    return {
        "member_accuracy": [fe.metrics.accuracy(member[None], labels).item() for member in logits],
        "member_nll": [fe.metrics.nll(member[None], labels).item() for member in logits],
        "accuracy": fe.metrics.accuracy(logits, labels).item(),
        "nll": fe.metrics.nll(logits, labels).item(),
        "nll_at_temperature": at_temperature(logits, labels),
        "disagreement": fe.disagreement(logits).mean().item() if len(logits) > 1 else 0.0,
        "seconds": seconds,
    }


def at_temperature(logits: Tensor, labels: Tensor) -> float:
    """The NLL of each half of the test images at the temperature that is fitted to the other half."""
    halves = torch.arange(len(labels)) % 2 == 0
    if not 0 < halves.sum() < len(labels):
        return fe.metrics.nll(logits, labels).item()
    found = [
        fe.metrics.nll(logits[:, ~held] / fe.fit_temperature(logits[:, held], labels[held]), labels[~held]).item()
        for held in (halves, ~halves)
    ]
    return sum(found) / 2


def compare(data: Data, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train and evaluate every kind; return the results by its name."""

    def new_model() -> nn.Module:
        return make_model(args.model, tuple(data.train.images.shape[1:]), len(data.classes)).to(args.device)

    compared = kinds(new_model, args)
    with tqdm(total=len(compared) * args.seeds, unit="run", disable=None) as bar:
        return {name: train_and_evaluate(name, kind, new_model, data, args, bar) for name, kind in compared.items()}


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

    def share(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
        return value

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
    add("--model", default="mlp", help="mlp, cnn (cnn16: narrower), or a torchvision classifier by name (default: mlp)")
    add("--members", type=positive(int), default=5, metavar="E", help="members per ensemble (default: %(default)s)")
    add("--epochs", type=positive(int), default=20, metavar="N", help="passes over the data (default: %(default)s)")
    add("--batch-size", type=positive(int), default=32, metavar="B", help="images per step (default: %(default)s)")
    add("--lr", type=positive(float), default=1e-3, help="Adam's learning rate (default: %(default)s)")
    add("--flip", type=share, metavar="P", help="share of -1 in r and s of the BatchEnsemble (default: by the model)")
    add("--noise", type=share, metavar="SIGMA", help="noise of the pixels (default: 0.35 for digits, 0 for others)")
    add("--seeds", type=positive(int), default=5, metavar="N", help="runs of each, from N seeds (default: 5)")
    add("--device", type=device, help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")
    add("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    add("--seed", type=int, default=0, help="the first seed of parameters and batches (default: 0)")
    add("--out", type=writable, metavar="FILE", help="also write the results to FILE as JSON")
    add("--png", type=writable, default="compare.png", metavar="FILE", help="file of the plot (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: expected 0 <= seed < 2**63, got {args.seed}")
    args.noise = (0.35 if args.data == "digits" else 0.0) if args.noise is None else args.noise
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        data = load(args.data, args.data_dir, args.image_size, args.device)
        data = with_noise(data, args.noise)
        if args.model != "mlp" and not args.model.startswith("cnn"):
            data = with_channels(data, 3)
        results = compare(data, args)
    except (DataUnavailable, UnknownModel, Unusable) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    noise = f" with noise {args.noise:g}" if args.noise else ""
    title = (
        f"{args.data}{noise}, {args.model}: {len(data.train.labels)} training and {len(data.test.labels)} test images "
        f"of {list(data.train.images.shape[1:])}, E={args.members}, {args.epochs} epochs, batch {args.batch_size}, "
        f"Adam {args.lr:g}, {args.seeds} seeds; torch {torch.__version__} on {args.device}"
    )
    print(f"{title}\n\n{table(results)}\n\n{in_words(results)}")
    if args.out is not None:
        plain = (int, float, bool, type(None))
        settings = {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
        write_json({"settings": settings, "torch": torch.__version__, "results": results}, args.out)
        print(f"\nresults: {args.out}")
    draw(results, title, args.png)
    print(f"\nplot: {args.png}")


if __name__ == "__main__":
    main()
