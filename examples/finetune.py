"""Fine-tune a pretrained network as one network, E networks, a BatchEnsemble and a LoRA ensemble, and compare them.

The network is trained on the digits 0 to 7 of scikit-learn. It then gets a new head for all ten digits, of which few
are labelled. Images from outside, which an ensemble should be uncertain of, are noise and turned digits.

python examples/finetune.py
python examples/finetune.py --labels 50 --seeds 10
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from data import load, normalise, with_noise
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned


class Network(nn.Module):
    """A trunk, and a head that is drawn anew for new classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.trunk(x))
        return out


Make = Callable[[nn.Module, int, torch.Generator], fe.EnsembleParams]


def batchensemble(model: nn.Module, E: int, source: torch.Generator) -> fe.EnsembleParams:
    """r and s near 1: random signs would undo what the network has learned. Every member has a head of its own."""
    params = fe.batchensemble_params(model, E, r_std=0.1, s_std=0.1, layers="trunk.*", generator=source)
    return with_own_heads(model, params, source)


def lora(model: nn.Module, E: int, source: torch.Generator) -> fe.EnsembleParams:
    """The trunk is shared and frozen; each member trains low-rank changes of it, and a head."""
    return with_own_heads(model, fe.lora_params(model, E, rank=4, layers="trunk.*", generator=source), source)


def with_own_heads(model: nn.Module, params: fe.EnsembleParams, source: torch.Generator) -> fe.EnsembleParams:
    """`params` with a fresh head for each member."""
    heads = fe.ensemble_params(model, params.E, stacked="head.*", reset="head.*", generator=source).stacked
    shared = {name: tensor for name, tensor in params.shared.items() if name not in heads}
    return fe.EnsembleParams(shared, {**params.stacked, **heads})


def kinds(E: int) -> dict[str, tuple[int, float, Make]]:
    """By name: the members, the learning rate, and how the parameters are made of the pretrained network."""

    def classic(model: nn.Module, members: int, source: torch.Generator) -> fe.EnsembleParams:
        return fe.ensemble_params(model, members, reset="head.*", generator=source)

    def heads(model: nn.Module, members: int, source: torch.Generator) -> fe.EnsembleParams:
        params = fe.ensemble_params(model, members, stacked="head.*", reset="head.*", generator=source)
        return fe.EnsembleParams({name: x.requires_grad_(False) for name, x in params.shared.items()}, params.stacked)

    return {
        "one network": (1, 1e-3, classic),
        "E networks": (E, 1e-3, classic),
        "E heads on a frozen trunk": (E, 1e-2, heads),
        "BatchEnsemble, r and s near 1": (E, 1e-3, batchensemble),
        "LoRA ensemble, rank 4": (E, 3e-3, lora),
    }


def train(model: nn.Module, params: fe.EnsembleParams, lr: float, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """Train `params` in place, each member in an order of its own."""
    step = fe.make_train_step(
        fe.make_forward(model, member_inputs=True),
        F.cross_entropy,
        torch.optim.Adam(fe.param_groups(params, lr=lr)),
        prepare=lambda i: (x[i], y[i]),
        compile=False,
    )
    batches = lambda source: fe.index_batches(len(x), 32, E=params.E, sees="own", generator=source)  # noqa: E731
    fe.fit(step, params, batches, epochs=epochs, generator=torch.Generator().manual_seed(seed), progress=False)


def run(seed: int, args: argparse.Namespace, bar: Any) -> dict[str, dict[str, float]]:
    """Pretrain a network, fine-tune it in every way, and return the scores by kind."""
    data = with_noise(load("digits", Path(), None, torch.device("cpu")), args.noise)
    x, y = normalise(data.train.images), data.train.labels
    test, labels = normalise(data.test.images), data.test.labels
    source = torch.Generator().manual_seed(seed)
    outside = torch.cat([2 * torch.rand(test.shape, generator=source) - 1, torch.rot90(test, 1, (-2, -1))])

    torch.manual_seed(seed)
    old = Network(8).train()
    known = y < 8
    pretrained = fe.stack_params([old])
    train(old, pretrained, 1e-3, x[known], y[known], 20, seed)
    model = Network(10).train()
    weights = fe.member_params(old, pretrained, 0)
    model.load_state_dict({name: w for name, w in weights.items() if name.startswith("trunk")}, strict=False)

    order = torch.randperm(len(y), generator=source)
    few = torch.cat([order[y[order] == label][: args.labels] for label in range(10)])
    scores = {}
    for name, (members, lr, make) in kinds(args.members).items():
        params = make(model, members, torch.Generator().manual_seed(seed))
        began = time.perf_counter()
        train(model, params, lr, x[few], y[few], args.epochs, seed)
        seconds = time.perf_counter() - began
        forward = fe.make_forward(model)
        logits, strange = (fe.predict(forward, params, images).double() for images in (test, outside))
        known_total, strange_total = (fe.classification_uncertainty(each).total for each in (logits, strange))
        scores[name] = {
            "accuracy": fe.metrics.accuracy(logits, labels).item(),
            "NLL": fe.metrics.nll(logits, labels).item(),
            "AUROC outside": fe.metrics.auroc(known_total, strange_total).item(),
            "disagree": fe.disagreement(logits).mean().item() if members > 1 else 0.0,
            "trained": sum(leaf.numel() for leaf in tree_leaves(params) if leaf.requires_grad),
            "MB": sum(leaf.nbytes for leaf in tree_leaves(params)) / 1e6,
            "s": seconds,
        }
        bar.update()
    return scores


def main(argv: list[str] | None = None) -> None:
    """Print a table of all kinds, means and standard deviations over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--members", type=int, default=5, metavar="E", help="members per ensemble (default: %(default)s)")
    add("--labels", type=int, default=20, metavar="N", help="labelled images of each class (default: %(default)s)")
    add("--epochs", type=int, default=30, metavar="N", help="epochs of fine-tuning (default: %(default)s)")
    add("--noise", type=float, default=0.2, metavar="SIGMA", help="noise of the pixels (default: %(default)s)")
    add("--seeds", type=int, default=5, metavar="N", help="runs of each, from N seeds (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("members", "labels", "epochs", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: expected a number > 0, got {getattr(args, name)}")
    with tqdm(total=args.seeds * len(kinds(args.members)), unit="run", disable=None) as bar:
        runs = [run(seed, args, bar) for seed in range(args.seeds)]
    columns = list(runs[0]["one network"])
    rows = [["", *columns]]
    for name in runs[0]:
        values = {column: [each[name][column] for each in runs] for column in columns}
        shown = [f"{mean(v):,.0f}" if c == "trained" else f"{mean(v):.3f}" for c, v in values.items()]
        rows.append([name, *shown])
        if args.seeds > 1:
            rows.append(["", *(f"±{stdev(v):.3f}" if c in columns[:4] else "" for c, v in values.items())])
    print(
        f"digits with noise {args.noise:g}: trained on 0 to 7, fine-tuned on {args.labels} images of each class; "
        f"E={args.members}, {args.epochs} epochs, {args.seeds} seeds\n\n{aligned(rows)}\n\n"
        "AUROC outside: noise and turned digits, detected by the total uncertainty. trained: numbers that are trained."
    )


if __name__ == "__main__":
    main()
