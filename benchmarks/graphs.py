"""How many graphs torch.compile makes while the sizes of the batches change: of one network, and of ensembles' steps.

    python benchmarks/graphs.py                         every network and ensemble; counted with the backend "eager"
    python benchmarks/graphs.py --backend inductor --network mlp

A batch that needs no new graph runs at once; any other waits for the compiler. The plain network is compiled the
ordinary way, with its loss, and `.backward()` follows. The sizes are those of the rows; for the transformer they are
lengths. The table has the graphs in all, and the sizes at which some were made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from measure import machine, parsed, quiet, write_json
from networks import mlp
from torch import Tensor, nn
from torch._dynamo.utils import counters
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned

SIZES = (32, 32, 17, 32, 5, 1, 64)
E = 3


class Sequences(nn.Module):
    """An LSTM, and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def small_cnn() -> nn.Module:
    """A convolution with BatchNorm, and a head."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers)


class Transformer(nn.Module):
    """One layer of a transformer, and a head on the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x).mean(1))
        return logits


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    """The shape of an input of some size."""


NETWORKS = {
    "mlp": Network(partial(mlp, (4, 8, 8, 3)), lambda B: (B, 4)),
    "cnn": Network(small_cnn, lambda B: (B, 2, 6, 6)),
    "lstm": Network(Sequences, lambda B: (B, 5, 4)),
    "transformer": Network(Transformer, lambda length: (6, length, 8)),
}
PLAIN = "one network, plain"


def plain(model: nn.Module, backend: Any) -> Callable[[Tensor, Tensor], None]:
    """The gradients of one network, compiled the ordinary way."""
    compiled = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=backend)

    def call(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        compiled(x, y).backward()

    return call


def step(kind: str, strategy: str, model: nn.Module, backend: Any) -> Callable[[Tensor, Tensor], Any]:
    """A compiled step of an ensemble."""
    params = {
        "classic": lambda: fe.ensemble_params(model, E),
        "BatchEnsemble": lambda: fe.batchensemble_params(model, E),
        "LoRA": lambda: fe.lora_params(model, E, rank=2, stacked="head.*" if hasattr(model, "head") else None),
    }[kind]()
    buffers = fe.ensemble_buffers(model, E)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.1))
    forward = fe.make_forward(model, strategy=strategy)
    call = fe.make_train_step(forward, F.cross_entropy, optimizer, compile={"backend": backend})
    return lambda x, y: call(params, x, y, buffers=buffers)


WAYS: dict[str, Callable[[nn.Module, Any], Callable[[Tensor, Tensor], Any]]] = {
    PLAIN: plain,
    **{
        f"{kind}, {strategy}": partial(step, kind, strategy)
        for kind, strategy in product(("classic", "BatchEnsemble", "LoRA"), ("vmap", "loop"))
    },
}


def made(network: str, way: str, sizes: Sequence[int] = SIZES, backend: Any = "eager") -> list[int]:
    """The number of graphs that each size makes, in turn."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    chosen = NETWORKS[network]
    call = WAYS[way](chosen.make().train(), backend)
    counts: list[int] = []
    for size in sizes:
        shape = chosen.shape(size)
        call(torch.randn(shape), torch.randint(3, shape[:1]))
        counts.append(counters["stats"]["unique_graphs"] - sum(counts))
    return counts


def pairs(networks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What can be counted: vmap has no rule for an LSTM."""
    return ((network, way) for network, way in product(networks, WAYS) if (network, "vmap") != ("lstm", way[-4:]))


def table(found: dict[tuple[str, str], list[int]], sizes: Sequence[int]) -> str:
    """Format the counts."""
    rows = [["", "", "graphs", "made at"]]
    for (network, way), counts in found.items():
        at = [
            f"{size} ({count})" if count > 1 else str(size) for size, count in zip(sizes, counts, strict=True) if count
        ]
        rows.append([network, way, str(sum(counts)), ", ".join(at)])
    return aligned(rows, left=2)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, list(NETWORKS)
    add("--network", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--backend", default="eager", choices=["eager", "aot_eager", "inductor"], help="(default: eager)")
    add("--json", type=Path, metavar="FILE", help="also write the counts there")
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    quiet()
    where = f"{machine(torch.device('cpu'))}, backend {options.backend}, sizes {', '.join(map(str, SIZES))}"
    todo = list(pairs(options.network))
    found = {
        (network, way): made(network, way, backend=options.backend)
        for network, way in tqdm(todo, desc="graphs", disable=None)
    }
    print(f"{where}\n\n{table(found, SIZES)}")
    if options.json:
        graphs = {f"{network}, {way}": counts for (network, way), counts in found.items()}
        write_json({"machine": where, "sizes": SIZES, "graphs": graphs}, options.json)


if __name__ == "__main__":
    main()
