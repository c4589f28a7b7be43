"""Time and memory of LoRA ensembles of a vision transformer, against merged copies and against one network.

    python benchmarks/lora.py                          2 layers of ViT-B's width, E = 4; two minutes on two cores
    python benchmarks/lora.py --members 16 --layers 1
    python benchmarks/lora.py --width 64 --heads 4 --tokens 10 --rounds 3      a few seconds

The network is a stack of transformer layers (pre-norm, GELU, an MLP of four times the width) on tokens [B, L, width],
and a head. Every member sees the same B inputs, as in training on one batch. The contenders are

- LoRA ensembles of the attention's weights ("attention") and of all weights ("all"), by vmap and by a loop;
- the same parameters with every weight merged for every member in each call ("merged in each call");
- E merged copies: a classic ensemble, by vmap and as a loop over modules, all of whose weights are trained;
- one network on E·B rows: LoRA of rank 8 with E = 1, and the network alone, all of whose weights are trained.

Every time is the median of interleaved rounds (A B C A B C ...), and every ratio is taken within a round. The gradients
are those of the cross-entropy of all members in what each contender trains; nothing is compiled without --compile.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import (
    PRECISIONS,
    Call,
    Spread,
    add_device,
    autocast,
    compile_options,
    interleaved,
    machine,
    megabytes,
    parsed,
    peak_memory,
    positive,
    quiet,
    ratio,
    use,
    write_json,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned

CLASSES = 100
PHASES = ("forward", "gradient")
ROWS = "one network with LoRA, E·B rows"


class Vit(nn.Module):
    """The layers of a vision transformer, without the patches: tokens `[B, L, width]` to logits `[B, classes]`."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        block = partial(nn.TransformerEncoderLayer, width, heads, 4 * width, dropout=0.0, activation=F.gelu)
        self.layers = nn.Sequential(*(block(batch_first=True, norm_first=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


class Contender(NamedTuple):
    calls: dict[str, Call]
    """The function of each phase."""
    trained: list[Tensor]
    parameters: list[Tensor]


def of_params(
    model: nn.Module,
    params: fe.EnsembleParams,
    batch: tuple[Tensor, Tensor],
    precision: str,
    compile: bool,
    **options: Any,
) -> Contender:
    """An ensemble by this library."""
    device = batch[0].device
    given: Any = (compile_options(device) or True) if compile else False
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    forward = fe.make_forward(model, **options)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.1))
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, autocast=dtype, compile=given)
    leaves = tree_leaves(params)
    compute = torch.compile(forward, **compile_options(device)) if compile else forward

    def infer() -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            outputs: Tensor = compute(params, batch[0])
        return outputs

    calls: dict[str, Call] = {"forward": infer, "gradient": lambda: step.gradients(params, *batch)}
    return Contender(calls, [leaf for leaf in leaves if leaf.requires_grad], leaves)


def of_modules(modules: list[nn.Module], batch: tuple[Tensor, Tensor], precision: str) -> Contender:
    """A loop over ordinary networks."""
    x, y = batch
    parameters: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]

    def infer() -> list[Tensor]:
        with torch.no_grad(), autocast(x.device, precision):
            return [module(x) for module in modules]

    def gradients() -> list[tuple[Tensor, ...]]:
        found = []
        for module in modules:
            with autocast(x.device, precision):
                value = F.cross_entropy(module(x), y)
            found.append(torch.autograd.grad(value, list(module.parameters())))
        return found

    return Contender({"forward": infer, "gradient": gradients}, parameters, parameters)


def contenders(args: argparse.Namespace, device: torch.device) -> dict[str, Contender]:
    """All contenders, on one random network and batch."""
    torch.manual_seed(0)
    E, B, compile = args.members, args.batch_size, args.compile
    model: nn.Module = Vit(args.layers, args.width, args.heads).to(device)
    x, y = torch.randn(B, args.tokens, args.width, device=device), torch.randint(CLASSES, (B,), device=device)
    make = partial(fe.lora_params, model, rank=args.rank)
    attention, whole = make(E, layers="*self_attn*", stacked="head.*"), make(E)
    for params in (attention, whole):
        with torch.no_grad():
            for tensor in params.stacked.values():
                tensor.normal_(std=0.02)
    copies: list[nn.Module] = []
    for i in range(E):
        copies.append(Vit(args.layers, args.width, args.heads).to(device))
        copies[i].load_state_dict(fe.member_params(model, whole, i))
    rows = x.repeat(E, 1, 1), y.repeat(E)
    of, batch = partial(of_params, model, precision=args.precision, compile=compile), (x, y)
    modules = partial(of_modules, precision=args.precision)
    return {
        "LoRA ensemble, attention": of(attention, batch),
        "LoRA ensemble, all": of(whole, batch),
        "LoRA ensemble, all, loop": of(whole, batch, strategy="loop"),
        "LoRA ensemble, all, merged in each call": of(whole, batch, rank1_side="weight"),
        "E merged copies, vmap": of(fe.stack_params(copies), batch),
        "E merged copies, loop over modules": modules(copies, batch),
        ROWS: of(make(1), rows),
        "one network, E·B rows": modules([model], rows),
    }


def measured(found: dict[str, Contender], rounds: int, device: torch.device) -> dict[str, Any]:
    """The seconds of each phase in each round, and the sizes, by contender."""
    results: dict[str, Any] = {
        name: {
            "trained_mb": megabytes(each.trained),
            "parameters_mb": megabytes(each.parameters),
            "peak_mb": peak_memory(each.calls["gradient"], device) / 1e6,
            "seconds": {},
        }
        for name, each in tqdm(found.items(), desc="memory", disable=None)
    }
    for phase in tqdm(PHASES, desc="time", disable=None):
        times = interleaved({name: each.calls[phase] for name, each in found.items()}, rounds, device)
        for name, seconds in times.items():
            results[name]["seconds"][phase] = seconds
    return results


def table(results: dict[str, Any]) -> str:
    """Format milliseconds, the ratio to one network with LoRA on E·B rows, and memory, by contender."""
    head = ["", "forward ms", "ratio", "gradient ms", "ratio", "trained MB", "parameters MB", "gradient's peak MB"]
    rows = [head]
    for name, found in results.items():
        cells = []
        for phase in PHASES:
            seconds = found["seconds"][phase]
            against = ratio(seconds, results[ROWS]["seconds"][phase])
            cells += [f"{1e3 * Spread.of(seconds).median:.1f}", f"{against.median:.2f}"]
        sizes = (f"{found[size]:.1f}" for size in ("trained_mb", "parameters_mb", "peak_mb"))
        rows.append([name, *cells, *sizes])
    return aligned(rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes: dict[str, tuple[int, str]] = {
        "members": (4, "members of each ensemble, E"),
        "batch-size": (2, "inputs, B"),
        "tokens": (50, "tokens of an input"),
        "layers": (2, "transformer layers"),
        "width": (768, "numbers of a token"),
        "heads": (12, "heads of attention"),
        "rank": (8, "rank of the factors"),
        "rounds": (5, "rounds of measurement"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument("--compile", action="store_true", help="compile what this library computes")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of matrix products (default: float32)"
    )
    add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parsed(parser, argv)
    if args.width % args.heads:
        parser.error(f"--heads: expected a divisor of the width {args.width}, got {args.heads}")
    if args.rank > args.width:
        parser.error(f"--rank: expected at most the width {args.width}, got {args.rank}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    quiet()
    use(args.precision)
    device = torch.device(args.device)
    options = {name: value for name, value in vars(args).items() if name != "json"}
    where = f"{machine(device)}, E = {args.members}, B = {args.batch_size}"
    results = measured(contenders(args, device), args.rounds, device)
    sizes = f"{args.layers} layers of width {args.width}, {args.tokens} tokens, rank {args.rank}"
    print(f"{where}; {sizes}, {args.precision}\n")
    print(table(results))
    if args.json:
        write_json({"machine": where, "options": options, "results": results}, args.json)


if __name__ == "__main__":
    main()
