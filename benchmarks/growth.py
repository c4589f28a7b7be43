"""Time and memory per member and per row, as the members, the rows and the widths of an ensemble grow.

    python benchmarks/growth.py                            all cases, 20 points; up to a minute each
    python benchmarks/growth.py --quick                    one small case, up to 16 members
    python benchmarks/growth.py --case members --max-members 1024
    python benchmarks/growth.py --resume                   go on with the points that are not yet in the JSON file

A step computes the gradients and applies Adam. All contenders of a point run in interleaved rounds; ratios are taken
within a round. `chunk_size="auto"` is measured where it computes fewer members at a time than all. A contender is left
out where its memory or its time would be too much; each one is named. The JSON file is written after every point.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor-"))
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # make_train_step sets it; set it for all contenders
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
import torch._dynamo
import torch.nn.functional as F
from measure import Spread, interleaved, machine, megabytes, parsed, peak_memory, positive, quiet, ratio, write_json
from models import cnn
from networks import mlp
from torch import Tensor, nn
from tqdm import tqdm
from vmap_vs_be import BATCH, CLASSIC, LOOP, ROWS, Contender, Setting, of_library, of_modules

import functorch_ens as fe
from functorch_ens.files import write_whole
from functorch_ens.tables import aligned

AUTO = {CLASSIC: 'classic, chunk_size="auto"', BATCH: 'BatchEnsemble, chunk_size="auto"'}
NAMES = (LOOP, ROWS, CLASSIC, AUTO[CLASSIC], BATCH, AUTO[BATCH])
RISE = 1.25
"""Costs above so many times the lowest are told."""


class Point(NamedTuple):
    """One size of an ensemble."""

    E: int
    B: int
    width: int


class Case(NamedTuple):
    title: str
    grows: str
    """The field of `Point` that grows."""
    points: list[Point]
    make: Callable[[int], nn.Module]
    """Makes one network of a width."""
    shape: tuple[int, ...]


def _mlp(inputs: int, width: int) -> nn.Module:
    return mlp((inputs, width, width, 10))


CASES = {
    "members": Case("MLP 20-64-64-10, 32 rows", "E", [Point(4**i, 32, 64) for i in range(7)], partial(_mlp, 20), (20,)),
    "cnn": Case(
        "CNN with BatchNorm, 32 x 32, 8 rows",
        "E",
        [Point(4**i, 8, 16) for i in range(4)],
        lambda width: cnn(3, 10),
        (3, 32, 32),
    ),
    "rows": Case("MLP 20-64-64-10, 16 members", "B", [Point(16, 8**i, 64) for i in range(5)], partial(_mlp, 20), (20,)),
    "widths": Case(
        "MLP 64-w-w-10, 4 members, 32 rows",
        "width",
        [Point(4, 32, 64 * 4**i) for i in range(4)],
        partial(_mlp, 64),
        (64,),
    ),
}


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def estimated(case: Case, point: Point) -> dict[str, float]:
    """The GB that each contender would take: parameters, gradients, Adam's two moments, a copy, and activations."""
    model = case.make(point.width)
    rows: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: rows.append(output.nbytes // 2))
        for layer in model.modules()
        if not any(layer.children())
    ]
    with torch.no_grad():
        model(torch.zeros(2, *case.shape))
    for hook in hooks:
        hook.remove()
    one, activations = 5e-9 * sum(x.nbytes for x in model.parameters()), 3e-9 * sum(rows) * point.B
    E = point.E
    classic, batch = E * (one + activations), one + E * activations
    return {
        LOOP: E * one + activations,
        ROWS: batch,
        CLASSIC: classic,
        AUTO[CLASSIC]: classic,
        BATCH: batch,
        AUTO[BATCH]: batch,
    }


def contenders(
    case: Case, point: Point, setting: Setting, names: Sequence[str]
) -> tuple[dict[str, Contender], dict[str, int | None]]:
    """The contenders `names`, and the sizes that `chunk_size="auto"` chooses. One that chooses all is not built."""
    torch.manual_seed(0)
    E, B, width = point
    device, compile = setting.device, setting.compile
    model = case.make(width).to(device).train()
    x, y = torch.randn(B, *case.shape, device=device), torch.randint(10, (B,), device=device)
    buffers = fe.ensemble_buffers(model, E)
    found: dict[str, Contender] = {}
    sizes: dict[str, int | None] = {}

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    if LOOP in names:
        modules = [case.make(width).to(device).train() for _ in range(E)]
        found[LOOP] = of_modules(modules, x, partial(loss, y), setting, fused=True)
    if ROWS in names:
        one = case.make(width).to(device).train()
        rows, labels = x.repeat(E, *[1] * len(case.shape)), y.repeat(E)
        found[ROWS] = of_modules([one], rows, partial(loss, labels), setting, compile, fused=True)
    makers: dict[str, Callable[[], fe.EnsembleParams]] = {
        CLASSIC: lambda: fe.ensemble_params(model, E),
        BATCH: lambda: fe.batchensemble_params(model, E, init="random_sign"),
    }
    for name, make in makers.items():
        if name not in names:
            continue
        params = make()
        found[name] = of_library(model, params, buffers, x, y, setting, compile)
        forward = fe.make_forward(model, chunk_size="auto")
        forward.choose_size(params, (x,), {}, buffers, forward.modes())
        sizes[name] = forward.chunk_size
        # On a CPU a classic ensemble's convolutions are computed one after another anyway.
        if forward.chunk_size is not None and not (name == CLASSIC and len(case.shape) > 1 and device.type == "cpu"):
            found[AUTO[name]] = of_library(model, params, buffers, x, y, setting, compile, chunk_size="auto")
    return found, sizes


def measured(
    case: Case, point: Point, setting: Setting, args: argparse.Namespace, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The seconds of a step in each round, and the MB of each contender; what is left out, and why."""
    torch._dynamo.reset()
    left_out: dict[str, str] = {}
    room = estimated(case, point)
    for name in (LOOP, ROWS, CLASSIC, BATCH):
        if room[name] > args.memory:
            left_out[name] = f"it would take about {room[name]:.1f} GB"
        elif before is not None and name in before["left_out"] and before["left_out"][name].startswith("a step"):
            left_out[name] = before["left_out"][name]
        elif before is not None and name in before["seconds"]:
            work = point.E * point.B * point.width / (before["E"] * before["B"] * before["width"])
            took = Spread.of(before["seconds"][name]).median
            # Small steps cost what their calls cost, which does not grow with rows and widths.
            expected = took * work if name == LOOP and case.grows == "E" else took * work / 4
            if expected > args.seconds:
                left_out[name] = f"a step would take about {expected:.0f} s"
    names = [name for name in (LOOP, ROWS, CLASSIC, BATCH) if name not in left_out]
    found, sizes = contenders(case, point, setting, names)
    calls = {name: found[name].calls["step"] for name in NAMES if name in found}
    seconds = interleaved(calls, args.rounds, setting.device)
    memory = {
        name: {
            "state_mb": megabytes(found[name].parameters)
            + sum(megabytes(dict(optimizer.state)) for optimizer in found[name].optimizers),
            "step_mb": peak_memory(call, setting.device) / 1e6,
        }
        for name, call in calls.items()
        # Counting takes several times as long as a step, and most for the loop, whose members take the same each.
        if Spread.of(seconds[name]).median < args.seconds / 2 and (name != LOOP or point.E <= 64)
    }
    return {
        **point._asdict(),
        "seconds": seconds,
        "memory": memory,
        "chunk_size": sizes,
        "left_out": left_out,
        "rounds": args.rounds,
    }


def cost(point: Mapping[str, Any], name: str) -> float:
    """The microseconds per member, of the fastest round: what else the machine does can only add time."""
    return 1e6 * min(point["seconds"][name]) / int(point["E"])


def per_row(point: Mapping[str, Any], value: float) -> float:
    """`value` per member as one per member and row."""
    return value / int(point["B"])


# --------------------------------------------------------------------------------------------------------------------
# Tables and the plot


def table(point: Mapping[str, Any]) -> str:
    """Format one point."""
    rows = [["", "step ms", "us / member", "us / member, row", "/ loop", "/ E·B rows", "KB / member: state", "step"]]
    E, found = point["E"], point["seconds"]
    for name, times in found.items():
        spread = Spread.of(times)
        against = [f"{ratio(times, found[o]).median:.2f}" if o in found else "-" for o in (LOOP, ROWS)]
        memory = point["memory"].get(name)
        kilobytes = ["-", "-"] if memory is None else [f"{1e3 * mb / E:.1f}" for mb in memory.values()]
        micro = cost(point, name)
        milliseconds = f"{1e3 * spread.median:.2f} ±{1e3 * (spread.high - spread.low) / 2:.2f}"
        rows.append([name, milliseconds, f"{micro:.1f}", f"{per_row(point, micro):.3f}", *against, *kilobytes])
    lines = [aligned(rows)]
    lines += [
        f"{AUTO[name]}: {'all' if size is None else size} members at a time"
        for name, size in point["chunk_size"].items()
    ]
    lines += [f"left out: {name}: {why}" for name, why in point["left_out"].items()]
    return "\n".join(lines)


def rises(case: str, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where more members cost more each than a quarter above the lowest cost, and what "auto" makes of it."""
    lines = []
    for name in (CLASSIC, BATCH):
        costs = [(point, cost(point, name)) for point in points if name in point["seconds"]]
        autos = [cost(point, AUTO[name]) for point, _ in costs if AUTO[name] in point["seconds"]]
        lowest = min([value for _, value in costs] + autos, default=0.0)
        least = next((i for i, (_, value) in enumerate(costs) if value == min(v for _, v in costs)), 0)
        for point, value in costs[least:]:
            auto, plain = AUTO[name] in point["seconds"], value > RISE * lowest
            if not (plain or auto):
                continue
            line = f"{case}: {name}: E = {point['E']}: {value:.1f} us a member, {value / lowest:.2f} of the lowest"
            if auto:
                again = cost(point, AUTO[name])
                within = ratio(point["seconds"][AUTO[name]], point["seconds"][name]).median
                size = point["chunk_size"][name]
                line += (
                    f'; "auto", {size} at a time: {again:.1f} us, {again / lowest:.2f} ({within:.2f} round by round)'
                )
            lines.append(line)
    return lines


STYLES = {
    LOOP: ("0.55", "o-"),
    ROWS: ("black", "o--"),
    CLASSIC: ("tab:blue", "o-"),
    AUTO[CLASSIC]: ("tab:blue", "x:"),
    BATCH: ("tab:orange", "o-"),
    AUTO[BATCH]: ("tab:orange", "x:"),
}


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], title: str, path: Path) -> None:
    """Draw time and memory per member (for rows: per member and row), a row of the picture for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(
        len(found), 2, figsize=(10, 3.1 * len(found) + 1.1), layout="constrained", squeeze=False
    )
    for (name, points), (time, memory) in zip(found.items(), axes, strict=True):
        case = CASES[name]
        for contender, (colour, style) in STYLES.items():

            def curve(axis: Any, value: Callable[[Mapping[str, Any]], float], of: str) -> None:
                mine = [point for point in points if contender in point[of]]  # noqa: B023
                values = [per_row(p, value(p)) if case.grows == "B" else value(p) for p in mine]  # noqa: B023
                axis.plot([p[case.grows] for p in mine], values, style, color=colour, label=contender, ms=5)  # noqa: B023

            curve(time, lambda point: cost(point, contender), "seconds")  # noqa: B023
            curve(memory, lambda point: 1e3 * sum(point["memory"][contender].values()) / point["E"], "memory")  # noqa: B023
        unit = "member and row" if case.grows == "B" else "member"
        ticks = [point[case.grows] for point in points]
        for axis, label in ((time, "µs"), (memory, "KB")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter("")
            axis.set_xlabel({"E": "members E", "B": "rows B", "width": "width w"}[case.grows])
            axis.set_ylabel(f"{label} per {unit}")
            axis.set_title(f"{case.title}: {'time' if axis is time else 'memory'}", fontsize=11)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11)
    figure.suptitle(f"A step (gradients and Adam). {title}", fontsize=11)
    with write_whole(path) as part:
        figure.savefig(part, dpi=80, format="png")
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", nargs="+", choices=list(CASES), metavar="NAME", help=f"cases: {', '.join(CASES)} (default: all)")
    add("--quick", action="store_true", help="the case members, up to 16 of them, in 2 rounds")
    add("--max-members", type=positive, metavar="E", help="leave out more members than so many (default: 4096)")
    add("--rounds", type=positive, metavar="N", help="rounds of measurement (default: 5, with --quick 2)")
    add("--memory", type=positive, default=6, metavar="GB", help="most of it for one contender (default: %(default)s)")
    add("--seconds", type=positive, default=4, metavar="S", help="longest step that is measured (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device of all computation (default: cpu)")
    add("--resume", action="store_true", help="keep the points that the JSON file has already")
    add("--json", type=Path, default=Path("growth.json"), metavar="FILE", help="JSON results (default: %(default)s)")
    add("--png", type=Path, default=Path("growth.png"), metavar="FILE", help="PNG plot (default: %(default)s)")
    args = parsed(parser, argv)
    args.case = args.case or (["members"] if args.quick else list(CASES))
    args.max_members = args.max_members or (16 if args.quick else 4096)
    args.rounds = args.rounds or (2 if args.quick else 5)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    quiet()
    device = torch.device(args.device)
    torch._dynamo.config.automatic_dynamic_shapes = False  # each contender has one size, and a graph for that alone
    setting = Setting(device, "float32", {"mode": "reduce-overhead"} if args.device == "cuda" else {})
    where = machine(device)
    kept = json.loads(args.json.read_text())["points"] if args.resume and args.json.exists() else {}
    found: dict[str, list[dict[str, Any]]] = {name: list(points) for name, points in kept.items()}
    todo = [(name, point) for name in args.case for point in CASES[name].points if point.E <= args.max_members]
    for name, point in (bar := tqdm(todo, desc="points", disable=None)):
        case, points = CASES[name], found.setdefault(name, [])
        if any(Point(p["E"], p["B"], p["width"]) == point for p in points):
            continue
        size = getattr(point, case.grows)
        bar.set_postfix_str(f"{name}, {case.grows} = {size:,}")
        smaller = [p for p in points if p[case.grows] < size]
        new = measured(case, point, setting, args, smaller[-1] if smaller else None)
        points.append(new)
        points.sort(key=lambda p: Point(p["E"], p["B"], p["width"]))
        options = {key: value for key, value in vars(args).items() if key not in ("json", "png")}
        write_json({"machine": where, "settings": options, "points": found}, args.json)
        with tqdm.external_write_mode():
            print(f"{name}: {case.title}, {case.grows} = {size:,}\n\n{table(new)}\n", flush=True)
    told = [line for name in found if CASES[name].grows == "E" for line in rises(name, found[name])]
    print(
        "\n".join(["Cost per member above 1.25 of its lowest, and where chunks were measured", "", *(told or ["none"])])
    )
    draw(found, where, args.png)
    print(f"\nresults: {args.json}\nplot: {args.png}")


if __name__ == "__main__":
    main()
