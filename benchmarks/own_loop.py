"""The gradients of a BatchEnsemble in a training loop of the user's own, by each way to compile them.

    python benchmarks/own_loop.py                      the MLP of the notebooks, batches of 32, 256 and 1024
    python benchmarks/own_loop.py --case cnn small-mlp
    python benchmarks/own_loop.py --threads 1
    python benchmarks/own_loop.py --device cuda --precision float32 tf32 bfloat16     with CUDA graphs

The loop calls `torch.func.grad` of a loss that calls the forward. The rivals are one plain network on as many rows, and
the module that notebooks write, both compiled. Times are medians of interleaved rounds; ratios are of one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

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
    parsed,
    peak_memory,
    positive,
    quiet,
    shown_ratio,
    use,
    write_json,
)
from networks import CASES, Case
from rivals import NotebookEnsemble, member_after_member
from torch import Tensor
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned
from functorch_ens.training.step import gradients_in_place

ROWS, NOTEBOOK = "one network, E x B rows", "notebook's module"
MINE: dict[str, Callable[..., Any]] = {
    "torch.compile": torch.compile,
    'backend="functorch_ens"': partial(torch.compile, backend="functorch_ens"),
    "fe.compile": fe.compile,
}


def calls(case: Case, device: torch.device, precision: str) -> dict[str, Call]:
    """What computes the gradients once, by name."""
    torch.manual_seed(0)
    model, E = case.make().to(device).train(), case.E
    x, y = torch.randn(case.B, *case.shape, device=device), torch.randint(10, (case.B,), device=device)
    options = compile_options(device)
    rows, labels = x.repeat(E, *[1] * len(case.shape)), y.repeat(E)
    given, buffers = fe.batchensemble_params(model, E), fe.ensemble_buffers(model, E)
    params = fe.EnsembleParams(*({name: value.detach() for name, value in part.items()} for part in given))
    forward = fe.make_forward(model)

    def loss(params: fe.EnsembleParams) -> Tensor:
        with autocast(device, precision):
            logits, _ = forward(params, x, buffers=buffers)
            return torch.stack([F.cross_entropy(member, y) for member in logits]).sum()

    plain = case.make().to(device).train()

    def backward(module: torch.nn.Module, compute: Callable[[], Tensor]) -> Call:
        compiled = torch.compile(compute, **options)

        def call() -> None:
            module.zero_grad()
            with autocast(device, precision):
                value = compiled()
            value.backward()

        return call

    found = {ROWS: backward(plain, lambda: F.cross_entropy(plain(rows), labels))}
    if case.sizes:
        written = NotebookEnsemble(case.sizes, E).to(device)
        found[NOTEBOOK] = backward(written, lambda: member_after_member(written(x), y))
    for name, compile in MINE.items():
        # A function of its own for each: torch.compile keeps what it compiles by the code of the function.
        found[name] = partial(compile(lambda params: torch.func.grad(loss)(params), **options), params)
    optimizer, dtype = torch.optim.SGD(fe.param_groups(given, lr=0.1)), torch.bfloat16
    given_dtype = dtype if precision == "bfloat16" else None
    step = fe.make_train_step(forward, F.cross_entropy, optimizer, autocast=given_dtype, compile=options or True)
    found["make_train_step"] = lambda: gradients_in_place(step, given, x, y, buffers=buffers)
    return found


def table(times: dict[str, list[float]], memory: dict[str, float]) -> str:
    """Format milliseconds, the ratios to the two rivals, and the peak of memory."""
    rivals = [name for name in (ROWS, NOTEBOOK) if name in times]
    rows = [["", "ms", *(f"/ {name}" for name in rivals), "peak MB"]]
    for name, seconds in times.items():
        shown = [shown_ratio(seconds, times[rival]) for rival in rivals]
        rows.append([name, f"{1e3 * Spread.of(seconds).median:.2f}", *shown, f"{memory[name]:.2f}"])
    return aligned(rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cases = ["mlp-32", "mlp-256", "mlp-1024"]
    add("--case", nargs="+", choices=list(CASES), metavar="NAME", default=cases, help=f"of {', '.join(CASES)}")
    add("--rounds", type=positive, metavar="N", default=15, help="rounds of measurement (default: 15)")
    add("--threads", type=positive, metavar="N", help="threads of torch (default: torch's own)")
    add("--precision", nargs="+", choices=PRECISIONS, default=["float32"], help="of matrix products (default: float32)")
    add_device(parser)
    add("--json", type=Path, default=Path("own_loop.json"), metavar="FILE", help="JSON results (default: %(default)s)")
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = machine(device)
    print(f"{where}; {options.rounds} interleaved rounds, medians; in brackets the quartiles of the ratios\n")
    results, memory = {}, {}
    for precision, name in tqdm(list(product(options.precision, options.case)), desc="cases", disable=None):
        torch.compiler.reset()
        use(precision)
        case, key = CASES[name], name if precision == "float32" else f"{name}, {precision}"
        found = calls(case, device, precision)
        results[key] = interleaved(found, options.rounds, device)
        memory[key] = {way: peak_memory(call, device) / 1e6 for way, call in found.items()}
        with tqdm.external_write_mode():
            shown = table(results[key], memory[key])
            print(f"{key}: {case.title}, E = {case.E}, B = {case.B}\n\n{shown}\n", flush=True)
        found_all = {"seconds": results, "peak_mb": memory}
        write_json({"machine": where, "rounds": options.rounds, **found_all}, options.json)
    print(f"results: {options.json}")


if __name__ == "__main__":
    main()
