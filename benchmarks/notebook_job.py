"""Time the job of the BatchEnsemble notebooks, one epoch and one evaluation, done their way and with functorch_ens.

    python benchmarks/notebook_job.py                      CIFAR-10 if --data-dir has it, else generated images
    python benchmarks/notebook_job.py --images 5000        a tenth of the images

Each contender trains an MLP 3072-128-128-10 for one epoch, with batches of 32 and Adam at 1e-3, once as a BatchEnsemble
and once as a classic ensemble of E = 5. The notebook's way: PIL images through ToTensor and Normalize in a DataLoader
with two workers, ordinary modules, a Python loop over members. Its classic ensemble trains E networks either in "runs",
one network after another, or in "one pass", all of them on each batch, which loads the data once. This library's way:
all images in one uint8 tensor, and one compiled step. Networks, batch size and number of steps are the same.

Every run compiles again, unless the environment variable TORCHINDUCTOR_CACHE_DIR names a folder with torch's cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor-"))  # compilation is timed
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
import torch.nn.functional as F
from data import Split, as_split, normalise
from einops import rearrange
from measure import add_device, compile_options, machine, now, parsed, positive, write_json
from models import mlp
from PIL import Image
from rivals import NotebookEnsemble, adam, member_after_member
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned

SIZES = (3072, 128, 128, 10)
BATCH, CLASSIC = "BatchEnsemble", "classic ensemble"
RUNS, ONE_PASS = "notebook's way, runs", "notebook's way, one pass"
LIBRARY, EAGER = "functorch_ens", "functorch_ens, not compiled"


class AsPIL(Dataset[tuple[Tensor, int]]):
    """One PIL image per item, as in torchvision's data sets."""

    def __init__(self, data: Split) -> None:
        self._arrays = rearrange(data.images, "n c h w -> n h w c").cpu().numpy()
        self._labels = data.labels.tolist()
        self._transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._arrays[i])), self._labels[i]


class Outcome(NamedTuple):
    """The seconds of each part of the job, and the accuracy of the ensemble."""

    train: float
    compile: float
    evaluate: float
    accuracy: float

    @property
    def total(self) -> float:
        return self.train + self.compile + self.evaluate


def cifar10(folder: Path) -> tuple[Split, Split] | None:
    """Load CIFAR-10 from `folder`; None if it is not there."""
    try:
        parts = [datasets.CIFAR10(str(folder), train=train) for train in (True, False)]
    except RuntimeError:  # torchvision did not find the files
        return None
    train, test = map(as_split, parts)
    return train, test


def generated(count: int, source: torch.Generator) -> Iterator[Split]:
    """Generate `count` training images, and a fifth as many for testing: ten classes, each a noisy pattern."""
    patterns = torch.randint(256, (10, 3, 32, 32), generator=source).float()
    for size in (count, max(1, count // 5)):
        labels = torch.randint(10, (size,), generator=source)
        noise = torch.randint(256, (size, 3, 32, 32), generator=source).float()
        yield Split((0.04 * patterns[labels] + 0.96 * noise).byte(), labels)


def hits(logits: Tensor, y: Tensor) -> int:
    """The number of correct predictions of the ensemble, from `logits` `[E, B, C]`."""
    return int((logits.softmax(-1).mean(0).argmax(-1) == y).sum())


# --------------------------------------------------------------------------------------------------------------------
# The notebook's way


def by_loops(kind: str, train: Split, test: Split, args: argparse.Namespace, one_pass: bool = True) -> Outcome:
    """Train ordinary modules from a DataLoader; loop over members within each batch (`one_pass`) or over whole runs."""
    E, device = args.members, torch.device(args.device)
    if kind == BATCH:
        models: list[nn.Module] = [NotebookEnsemble(SIZES, E)]
        loss: Any = member_after_member
    else:
        models, loss = [mlp(SIZES[0], SIZES[-1]) for _ in range(E)], F.cross_entropy
    models = [model.to(device) for model in models]
    pairs = list(zip(models, adam(models), strict=True))
    load = partial(DataLoader[Any], batch_size=args.batch_size, num_workers=args.workers)

    start = now(device)
    for trained in [pairs] if one_pass else [[pair] for pair in pairs]:
        for x, y in tqdm(load(AsPIL(train), shuffle=True), desc=f"{kind}, loops", disable=None):
            x, y = x.to(device), y.to(device)
            for model, optimizer in trained:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
    seconds = now(device) - start
    right = 0
    with torch.no_grad():
        for x, y in load(AsPIL(test)):
            x, y = x.to(device), y.to(device)
            right += hits(models[0](x) if kind == BATCH else torch.stack([model(x) for model in models]), y)
    return Outcome(seconds, 0.0, now(device) - start - seconds, right / len(test.labels))


# --------------------------------------------------------------------------------------------------------------------
# With functorch_ens


def by_library(kind: str, train: Split, test: Split, args: argparse.Namespace, compile: bool = True) -> Outcome:
    """Train all members with one step, compiled or not, on images in one uint8 tensor."""
    device, E = torch.device(args.device), args.members
    model = mlp(SIZES[0], SIZES[-1]).to(device)
    params = fe.batchensemble_params(model, E) if kind == BATCH else fe.ensemble_params(model, E)
    reduction = "mean" if kind == BATCH else "sum"
    forward, optimizer = fe.make_forward(model), torch.optim.Adam(tree_leaves(params), lr=1e-3)
    make_step = partial(
        fe.make_train_step,
        forward,
        F.cross_entropy,
        optimizer,
        reduction=reduction,
        prepare=lambda index: (normalise(train.images[index]), train.labels[index]),
    )
    # The last batch is smaller. Run it eagerly: another shape would be another compilation.
    step, last_step = make_step(compile=compile and (compile_options(device) or True)), make_step(compile=False)
    batches = torch.randperm(len(train.labels), device=device).split(args.batch_size)

    start = now(device)
    if compile:
        step.gradients(params, batches[0])
    compiled = now(device)
    for index in tqdm(batches, desc=f"{kind}, {LIBRARY}", disable=None):
        (step if len(index) == args.batch_size else last_step)(params, index)
    trained = now(device)
    right = 0
    with torch.no_grad():
        for images, y in zip(test.images.split(500), test.labels.split(500), strict=True):
            right += hits(forward(params, normalise(images)), y)
    return Outcome(trained - compiled, compiled - start, now(device) - trained, right / len(test.labels))


# --------------------------------------------------------------------------------------------------------------------


JOBS: dict[tuple[str, str], Callable[..., Outcome]] = {
    (BATCH, ONE_PASS): by_loops,
    (BATCH, EAGER): partial(by_library, compile=False),
    (BATCH, LIBRARY): by_library,
    (CLASSIC, RUNS): partial(by_loops, one_pass=False),
    (CLASSIC, ONE_PASS): by_loops,
    (CLASSIC, EAGER): partial(by_library, compile=False),
    (CLASSIC, LIBRARY): by_library,
}


def table(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """Format the seconds of each contender, and the speed of this library relative to the notebook's way."""
    head = ["", "train s", "compile s", "evaluate s", "total s", "accuracy", "than one pass", "than runs"]
    sums = {key: [outcome] for key, outcome in outcomes.items()}
    for way in (RUNS, ONE_PASS, EAGER, LIBRARY):  # a BatchEnsemble is one run and one pass alike
        sums["both", way] = [outcomes.get((BATCH, way), outcomes[BATCH, ONE_PASS]), outcomes[CLASSIC, way]]
    rows = [head]
    for (kind, way), parts in sums.items():
        seconds = [sum(getattr(part, name) for part in parts) for name in ("train", "compile", "evaluate", "total")]
        accuracy = f"{parts[0].accuracy:.4f}" if len(parts) == 1 else "-"
        ratios = ["-", "-"]
        for i, slow in enumerate((ONE_PASS, RUNS)):
            if way in (EAGER, LIBRARY) and (kind, slow) in sums:
                whole = sum(part.total for part in sums[kind, slow])
                ratios[i] = f"{whole / (seconds[-1] - seconds[1]):.1f}"
                if way == LIBRARY:
                    ratios[i] += f" ({whole / seconds[-1]:.1f})"
        rows.append([f"{kind}, {way}", *(f"{value:.2f}" for value in seconds), accuracy, *ratios])
    return f"{aligned(rows)}\n\nLast two columns: how many times as fast, without the time of compilation (with it)."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of CIFAR-10 (default: data)")
    add("--images", type=positive, metavar="N", help="generate N images (default: CIFAR-10, or 50000)")
    add("--members", type=positive, default=5, metavar="E", help="members per ensemble (default: %(default)s)")
    add("--batch-size", type=positive, default=32, metavar="B", help="images per step (default: %(default)s)")
    add_device(parser)
    add("--workers", type=int, default=2, help="worker processes of the DataLoader (default: %(default)s)")
    add(
        "--json",
        type=Path,
        default=Path("notebook_job.json"),
        metavar="FILE",
        help="JSON results (default: %(default)s)",
    )
    args = parsed(parser, argv)
    torch.manual_seed(0)
    found = None if args.images else cifar10(args.data_dir)
    train, test = found or generated(args.images or 50_000, torch.Generator().manual_seed(0))
    device = torch.device(args.device)
    train, test = (Split(part.images.to(device), part.labels.to(device)) for part in (train, test))
    if len(train.labels) < args.batch_size:
        parser.error(f"--batch-size: {args.batch_size} is more than the {len(train.labels)} images")
    what = "CIFAR-10" if found else "generated images"
    where = machine(device)
    print(f"{what}: {len(train.labels)} and {len(test.labels)}, E = {args.members}, batch {args.batch_size}; {where}\n")
    outcomes = {(kind, way): run(kind, train, test, args) for (kind, way), run in JOBS.items()}
    print(table(outcomes))
    results = {f"{kind}, {way}": outcome._asdict() for (kind, way), outcome in outcomes.items()}
    write_json({"machine": where, "data": what, "images": len(train.labels), "results": results}, args.json)
    print(f"\nresults: {args.json}")


if __name__ == "__main__":
    main()
