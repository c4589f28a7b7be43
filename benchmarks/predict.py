"""Latency and throughput of predictions in eval mode: a BatchEnsemble against one network and E networks in turn.

    python benchmarks/predict.py                            an MLP, a CNN and a vision transformer; 1, 32 and 256 rows
    python benchmarks/predict.py --case mlp-32 --rows 1
    python benchmarks/predict.py --precision bfloat16       by autocast, for a CPU that has it

Times are medians of interleaved rounds; ratios are of one round.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    PRECISIONS,
    Call,
    Spread,
    add_device,
    autocast,
    interleaved,
    machine,
    parsed,
    positive,
    quiet,
    shown_ratio,
    use,
    write_json,
)
from networks import CASES, Case
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned

ONE, ROWS, TURN = "one network", "one network, E x rows", "E networks in turn"


def calls(case: Case, rows: int, device: torch.device, precision: str) -> dict[str, Call]:
    """What predicts `rows` rows once, by name."""
    torch.manual_seed(0)
    model, E = case.make().to(device).eval(), case.E
    x = torch.randn(rows, *case.shape, device=device)
    params, buffers = fe.batchensemble_params(model, E), fe.ensemble_buffers(model, E)
    forward, members = fe.make_forward(model), [case.make().to(device).eval() for _ in range(E)]
    compiled, tiled = torch.compile(model), x.repeat(E, *[1] * len(case.shape))
    predict = partial(fe.predict, forward, params, x, buffers=buffers, batch_size=rows, progress=False)
    every: dict[str, Call] = {
        ONE: lambda: model(x),
        f"{ONE}, compiled": lambda: compiled(x),
        f"{ROWS}, compiled": lambda: compiled(tiled),
        TURN: lambda: [member(x) for member in members],
        "BatchEnsemble, predict": predict,
        "BatchEnsemble, predict(compile=True)": partial(predict, compile=True),
    }

    def without_gradients(call: Call) -> Call:
        def computed() -> None:
            with torch.no_grad(), autocast(device, precision):
                call()

        return computed

    return {name: without_gradients(call) for name, call in every.items()}


def table(times: dict[str, list[float]]) -> str:
    """Format microseconds, and the ratios to the faster way of one network, to E x as many rows, and to E networks."""
    one = min((ONE, f"{ONE}, compiled"), key=lambda name: Spread.of(times[name]).median)
    rivals = {f"/ {one}": one, "/ E x rows": f"{ROWS}, compiled", "/ in turn": TURN}
    rows = [["", "us", *rivals]]
    for name, seconds in times.items():
        shown = [shown_ratio(seconds, times[rival]) for rival in rivals.values()]
        rows.append([name, f"{1e6 * Spread.of(seconds).median:,.0f}", *shown])
    return aligned(rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cases = ["mlp-32", "cnn", "vit"]
    add("--case", nargs="+", choices=list(CASES), metavar="NAME", default=cases, help=f"of {', '.join(CASES)}")
    add("--rows", nargs="+", type=positive, metavar="B", default=[1, 32, 256], help="rows of a call (1, 32, 256)")
    add("--rounds", type=positive, metavar="N", default=9, help="rounds of measurement (default: 9)")
    add("--precision", choices=PRECISIONS, default="float32", help="of matrix products (default: float32)")
    add_device(parser)
    add("--json", type=Path, default=Path("predict.json"), metavar="FILE", help="JSON results (default: %(default)s)")
    return parsed(parser, argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    quiet()
    device = torch.device(options.device)
    use(options.precision)
    where = f"{machine(device)}, {options.precision}"
    print(f"{where}; {options.rounds} interleaved rounds, medians; in brackets the quartiles of the ratios\n")
    results: dict[str, Any] = {}
    points = [(name, rows) for name in options.case for rows in options.rows]
    for name, rows in tqdm(points, desc="cases", disable=None):
        torch.compiler.reset()
        case, key = CASES[name], f"{name}, {rows} rows"
        results[key] = interleaved(calls(case, rows, device, options.precision), options.rounds, device)
        with tqdm.external_write_mode():
            print(f"{key}: {case.title}, E = {case.E}\n\n{table(results[key])}\n", flush=True)
        write_json({"machine": where, "rounds": options.rounds, "seconds": results}, options.json)
    print(f"results: {options.json}")


if __name__ == "__main__":
    main()
