"""Time and memory of classic ensembles and BatchEnsembles, by this library and by others, on a CPU or a GPU.

    python benchmarks/vmap_vs_be.py                        all cases; eight minutes on two cores
    python benchmarks/vmap_vs_be.py --quick                two small MLPs, three rounds; a minute
    python benchmarks/vmap_vs_be.py --case mlp-32 --members 16
    python benchmarks/vmap_vs_be.py --device cuda          CUDA graphs, in float32, TF32 and bfloat16 (autocast)

Every time is the median of interleaved rounds (A B C A B C ...); every ratio is taken within a round. A step computes
the gradients and applies Adam; models are in training mode. "E·B rows" is one network whose batch has as many rows as
the whole ensemble computes: the cost of a BatchEnsemble if r and s were free.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="inductor-"))  # compilation is timed
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # make_train_step sets it; set it for all contenders

import torch
import torch._dynamo
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
    seconds_of,
    use,
    write_json,
)
from networks import CASES, NOTEBOOK_MLP, Case, mlp_case
from rivals import NotebookEnsemble, adam, member_after_member, member_as_rows, tabm_ensemble
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.files import write_whole
from functorch_ens.tables import aligned
from functorch_ens.training.step import gradients_in_place

PHASES = ("forward", "gradient", "step")
LOOP, ROWS = "loop over modules", "one network, E·B rows, compiled"
CLASSIC, BATCH = "classic, compiled", "BatchEnsemble, compiled"
NOTEBOOK, TABM = "notebook's BatchEnsemble", "tabm, compiled"


QUICK = ("mlp-32", "small-mlp")
BY_DEFAULT = {"cpu": [name for name in CASES if name != "large-mlp"], "cuda": list(CASES)}
MATMUL = {"cpu": 2048, "cuda": 8192}
"""The size of the square matrices whose product gives the attainable rate of arithmetic."""
SHARES = "The arithmetic of one network on E·B rows, divided by the time of a step: GFLOP/s (share of a large matmul's)"
AIMED_AT = {"cpu": "two CPU cores", "cuda": "a GPU"}


# --------------------------------------------------------------------------------------------------------------------
# The contenders: for each phase a function without arguments, ready to be timed


class Setting(NamedTuple):
    """The device, the precision and the options of torch.compile."""

    device: torch.device
    name: str
    """One of PRECISIONS. `use` has set it."""
    compile: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.name == "bfloat16" else torch.float32

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context for a forward and its loss."""
        return autocast(self.device, self.name)


class Contender(NamedTuple):
    calls: dict[str, Call]
    """The function of each phase."""
    parameters: Any
    optimizers: Sequence[torch.optim.Optimizer]
    compile_seconds: float | None = None
    """The seconds of the first call of the gradient phase; None if nothing is compiled."""


def of_modules(
    modules: Sequence[nn.Module],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    setting: Setting,
    compile: Mapping[str, Any] | None = None,
    **options: Any,
) -> Contender:
    """Train ordinary modules one after another; `options` are Adam's."""
    optimizers = adam(modules, **options)
    called: list[Callable[[Tensor], Tensor]] = [
        module if compile is None else torch.compile(module, **compile) for module in modules
    ]

    def forward() -> None:
        with torch.no_grad(), setting.precision():
            for call in called:
                call(x)

    def gradient() -> None:
        for module, call in zip(modules, called, strict=True):
            module.zero_grad()
            with setting.precision():
                value = loss(call(x))
            value.backward()

    def step() -> None:
        gradient()
        for optimizer in optimizers:
            optimizer.step()

    seconds = None if compile is None else _first_call(gradient)
    parameters = [list(module.parameters()) for module in modules]
    return Contender({"forward": forward, "gradient": gradient, "step": step}, parameters, optimizers, seconds)


def of_library(
    model: nn.Module,
    params: fe.EnsembleParams,
    buffers: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    setting: Setting,
    compile: Mapping[str, Any] | None = None,
    chunk_size: int | str | None = None,
) -> Contender:
    """Train an ensemble by this library, on a copy of `params`."""
    params = fe.EnsembleParams(*({k: v.detach().clone().requires_grad_() for k, v in part.items()} for part in params))
    forward = fe.make_forward(model, chunk_size=chunk_size)
    optimizer = torch.optim.Adam(tree_leaves(params), lr=1e-3)
    options = False if compile is None else compile
    dtype = None if setting.dtype == torch.float32 else setting.dtype
    train = fe.make_train_step(forward, F.cross_entropy, optimizer, autocast=dtype, compile=options)
    called = forward if compile is None else torch.compile(forward, **compile)

    def predict() -> None:
        with torch.no_grad(), setting.precision():
            called(params, x, buffers=buffers)

    calls = {
        "forward": predict,
        "gradient": lambda: gradients_in_place(train, params, x, y, buffers=buffers),
        "step": lambda: train(params, x, y, buffers=buffers),
    }
    seconds = None if compile is None else _first_call(calls["gradient"])
    return Contender(calls, params, [optimizer], seconds)


def _first_call(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def contenders(case: Case, E: int, B: int, setting: Setting, only: Sequence[str] = ()) -> dict[str, Contender]:
    """Build every contender of `case`, or those in `only`; check this library's members against ordinary networks."""
    device, compile = setting.device, setting.compile
    torch.manual_seed(0)
    modules = [case.make().to(device).train() for _ in range(E)]
    x = torch.randn(B, *case.shape, device=device)
    y = torch.randint(10, (B,), device=device)
    rows, labels = x.repeat(E, *[1] * len(case.shape)), y.repeat(E)
    model = modules[0]
    classic, buffers = fe.stack_params(modules), fe.stack_buffers(modules)
    batch = fe.batchensemble_params(model, E, init="random_sign")
    for params in (classic, batch):
        _check(model, params, x)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def one(rows: Tensor, labels: Tensor) -> Contender:
        model = case.make().to(device)
        return of_modules([model], rows, lambda z: F.cross_entropy(z, labels), setting, compile, fused=True)

    def rival(module: nn.Module, loss: Any, **options: Any) -> Contender:
        return of_modules([module.to(device)], x, partial(loss, y=y), setting, **options)

    makers: dict[str, Callable[[], Contender]] = {
        "one network, compiled": lambda: one(x, y),
        ROWS: lambda: one(rows, labels),
        LOOP: lambda: of_modules(modules, x, loss, setting, fused=True),
        "classic": lambda: of_library(model, classic, buffers, x, y, setting),
        CLASSIC: lambda: of_library(model, classic, buffers, x, y, setting, compile),
        "BatchEnsemble": lambda: of_library(model, batch, buffers, x, y, setting),
        BATCH: lambda: of_library(model, batch, buffers, x, y, setting, compile),
    }
    if case.sizes:
        makers[NOTEBOOK] = lambda: rival(NotebookEnsemble(case.sizes, E), member_after_member)
        tabm = tabm_ensemble(case.sizes, E)
        if tabm is not None:
            makers[TABM] = lambda: rival(tabm, member_as_rows, compile=compile, fused=True)
    return {name: make() for name, make in makers.items() if not only or name in only}


@torch.no_grad()
def _check(model: nn.Module, params: fe.EnsembleParams, x: Tensor) -> None:
    """AssertionError if a member's output differs from that of an ordinary network with its weights."""
    model.eval()
    for i, mine in enumerate(fe.make_forward(model)(params, x)):
        theirs = torch.func.functional_call(model, fe.member_params(model, params, i), (x,))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())
    model.train()


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(found: Mapping[str, Contender], rounds: int, setting: Setting) -> tuple[dict[str, Any], list[float]]:
    """Measure each contender, and a large matrix product in the rounds of the steps.

    Returns: by contender, the seconds of each phase and round, the seconds of compilation, and the MB of its
    parameters, its optimiser and the peak of a step; then the floating point operations a second of the
    matrix product in each round.
    """
    device = setting.device
    calls: dict[str, dict[str, Call]] = {phase: {n: c.calls[phase] for n, c in found.items()} for phase in PHASES}
    calls["step"]["matmul"], work = matmul(setting)
    times = {phase: interleaved(calls[phase], rounds, device) for phase in PHASES}
    results = {
        name: {
            "seconds": {phase: times[phase][name] for phase in PHASES},
            "compile_seconds": contender.compile_seconds,
            "parameters_mb": megabytes(contender.parameters),
            "optimizer_mb": sum(megabytes(dict(optimizer.state)) for optimizer in contender.optimizers),
            "step_mb": peak_memory(contender.calls["step"], device) / 1e6,
        }
        for name, contender in found.items()
    }
    return results, [work / seconds for seconds in times["step"]["matmul"]]


def arithmetic(case: Case, E: int, B: int) -> int:
    """The floating point operations of one network's gradients on E·B rows, counted by torch."""
    x, y = torch.randn(2, *case.shape), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(case.make()(x), y).backward()
    return counter.get_total_flops() * E * B // 2


def matmul(setting: Setting) -> tuple[Call, int]:
    """The product of two large square matrices, and its arithmetic in floating point operations.

    The matrices are smaller where this processor is slow in the precision: without kernels for bfloat16, a product of
    the largest ones takes minutes.
    """
    largest = MATMUL[setting.device.type]
    size = largest // 8
    while True:
        a, b = torch.randn(2, size, size, device=setting.device, dtype=setting.dtype)
        call = partial(torch.matmul, a, b)
        if size == largest or seconds_of(call, 1, setting.device) > 0.02:
            return call, 2 * size**3
        size *= 2


def _key(case: str, precision: str) -> str:
    """The key of a case in the results."""
    return case if precision == "float32" else f"{case}, {precision}"


def growth(precision: str, setting: Setting, rounds: int, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measure a step of the notebook's MLP for several E and B.

    Points that are among the `results` of the cases are taken from there.

    Returns: a list of E, B and the seconds of each contender, sorted for printing.
    """
    names = (ROWS, LOOP, CLASSIC, BATCH)
    use(precision)
    grown = []
    for name, case in CASES.items():
        if case.sizes == NOTEBOOK_MLP and (measured := results.get(_key(name, precision))):
            seconds = {contender: measured[contender]["seconds"]["step"] for contender in names}
            grown.append({"E": case.E, "B": case.B, "seconds": seconds})
    for E, B in tqdm([(1, 32), (16, 32), (64, 32)], desc="growth", disable=None):
        torch._dynamo.reset()
        found = contenders(mlp_case(E, B, *NOTEBOOK_MLP), E, B, setting, names)
        calls = {name: contender.calls["step"] for name, contender in found.items()}
        grown.append({"E": E, "B": B, "seconds": interleaved(calls, rounds, setting.device)})
    return sorted(grown, key=lambda point: (point["B"] != 32, point["B"], point["E"]))


# --------------------------------------------------------------------------------------------------------------------
# Tables and plots


def table(results: Mapping[str, Any]) -> str:
    """Format one case: milliseconds ± half the interquartile range, and memory, by contender."""
    head = ["", "forward ms", "gradient ms", "step ms", "step / loop", "compile s", "params MB", "Adam MB", "step MB"]
    rows = [head]
    for name, found in results.items():
        seconds = found["seconds"]
        against = ratio(seconds["step"], results[LOOP]["seconds"]["step"])
        compile_seconds = found["compile_seconds"]
        rows.append(
            [
                name,
                *(_milliseconds(seconds[phase]) for phase in PHASES),
                f"{against.median:.2f} ±{(against.high - against.low) / 2:.2f}",
                "-" if compile_seconds is None else f"{compile_seconds:.1f}",
                *(f"{found[part]:.2f}" for part in ("parameters_mb", "optimizer_mb", "step_mb")),
            ]
        )
    return aligned(rows)


def _milliseconds(times: list[float]) -> str:
    spread = Spread.of(times)
    return f"{1e3 * spread.median:.2f} ±{1e3 * (spread.high - spread.low) / 2:.2f}"


class Aim(NamedTuple):
    """An upper bound for a ratio of two times in a case."""

    what: str
    case: str
    over: tuple[str, str, str]
    """The phase, and the two contenders whose times are divided."""
    most: float


def aims(device: str) -> list[Aim]:
    """The aims of this library for two CPU cores, or for a GPU."""
    if device == "cuda":
        return [Aim("classic / loop over modules", "small-mlp", ("step", CLASSIC, LOOP), 1 / 15)]
    found = []
    for B, most in ((32, 1.6), (256, 1.25), (1024, 1.25)):
        case = f"mlp-{B}"
        found.append(Aim("BatchEnsemble / one network on E·B rows", case, ("gradient", BATCH, ROWS), most))
        found.append(Aim("BatchEnsemble / notebook's", case, ("gradient", BATCH, NOTEBOOK), 0.5))
        found.append(Aim("BatchEnsemble / tabm", case, ("gradient", BATCH, TABM), 1.0))
    for case in BY_DEFAULT["cpu"]:
        most = 0.1 if case == "small-mlp" else 1.0
        found.append(Aim("classic / loop over modules", case, ("step", CLASSIC, LOOP), most))
    return found


def judged(results: Mapping[str, Mapping[str, Any]], device: str) -> str:
    """Format the aims and the measured ratios."""
    rows = [["", "case", "phase", "aim", "measured", "quartiles", "met"]]
    for what, case, (phase, mine, theirs), most in aims(device):
        found = results.get(case, {})
        if mine in found and theirs in found:
            spread = ratio(found[mine]["seconds"][phase], found[theirs]["seconds"][phase])
            quartiles = f"{spread.low:.2f} to {spread.high:.2f}"
            met = "yes" if spread.median <= most else "no"
            rows.append([what, case, phase, f"<= {most:.3g}", f"{spread.median:.2f}", quartiles, met])
    return aligned(rows)


def shares(results: Mapping[str, Any], work: Mapping[str, int], rate: Mapping[str, float]) -> str:
    """Format the rate of arithmetic in the compiled steps, and its share of the rate of a large matrix product."""
    names = (ROWS, CLASSIC, BATCH)
    rows = [["", "GFLOP", *names, "matmul"]]
    for case, found in results.items():
        rates = [work[case] / Spread.of(found[name]["seconds"]["step"]).median for name in names]
        shown = [f"{each / 1e9:.0f} ({each / rate[case]:.0%})" for each in rates]
        rows.append([case, f"{work[case] / 1e9:.2f}", *shown, f"{rate[case] / 1e9:.0f}"])
    return aligned(rows)


def grown(points: Sequence[Mapping[str, Any]]) -> str:
    """Format the steps of the notebook's MLP by E and B."""
    rows = [["E", "B", *(f"{name}, ms" for name in points[0]["seconds"])]]
    for point in points:
        rows.append([str(point["E"]), str(point["B"]), *(_milliseconds(times) for times in point["seconds"].values())])
    return aligned(rows)


def draw(results: Mapping[str, Any], points: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the steps relative to the loop for each case, and their growth with E and B."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    names, colours = (LOOP, ROWS, CLASSIC, BATCH), ("0.6", "tab:gray", "tab:blue", "tab:orange")
    figure, axes = plt.subplots(1, 3 if points else 1, figsize=(15 if points else 8, 4.6), layout="constrained")
    first = axes[0] if points else axes
    for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
        spreads = [ratio(found[name]["seconds"]["step"], found[LOOP]["seconds"]["step"]) for found in results.values()]
        heights = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        places = [i + 0.2 * (k - 1.5) for i in range(len(results))]
        first.bar(places, heights, 0.2, yerr=errors, label=name, color=colour, hatch="//" if name == ROWS else None)
    first.axhline(1, color="black", linewidth=0.8)
    first.set_xticks(range(len(results)), list(results), rotation=30, ha="right")
    first.set_ylabel("time of a step, loop over modules = 1")
    first.set_title("gradients and Adam, by case")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4 if points else 2)
    for axis, label, fixed, value in [] if not points else [(axes[1], "E", "B", 32), (axes[2], "B", "E", 5)]:
        mine = sorted((point for point in points if point[fixed] == value), key=lambda point: point[label])
        for name, colour in zip(names, colours, strict=True):
            milliseconds = [1e3 * Spread.of(point["seconds"][name]).median for point in mine]
            sizes = [point[label] for point in mine]
            axis.plot(sizes, milliseconds, "o--" if name == ROWS else "o-", label=name, color=colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = [point[label] for point in mine]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter("")
        axis.set_xlabel({"E": "members E", "B": "batch size B"}[label])
        axis.set_ylabel("milliseconds a step")
        axis.set_title(f"MLP {'-'.join(map(str, NOTEBOOK_MLP))}, {fixed} = {value}")
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(title, fontsize="medium")
    with write_whole(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


_PRECISION = "of matrix products: some of float32, tf32, bfloat16 (autocast) (default: float32; on a GPU all)"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--case",
        nargs="+",
        choices=list(CASES),
        metavar="NAME",
        help=f"cases to run: {', '.join(CASES)} (default: all, large-mlp only on a GPU)",
    )
    add("--quick", action="store_true", help="run two small MLPs with 3 rounds, without growth in E and B")
    add("--members", type=positive, metavar="E", help="members per ensemble (default: that of the case)")
    add("--batch-size", type=positive, metavar="B", help="rows per batch (default: that of the case)")
    add("--rounds", type=positive, metavar="N", help="rounds of measurement (default: 5, with --quick 3)")
    add_device(parser)
    add("--precision", nargs="+", choices=PRECISIONS, metavar="DTYPE", help=_PRECISION)
    add(
        "--json", type=Path, default=Path("vmap_vs_be.json"), metavar="FILE", help="JSON results (default: %(default)s)"
    )
    add("--png", type=Path, default=Path("vmap_vs_be.png"), metavar="FILE", help="PNG plot (default: %(default)s)")
    args = parsed(parser, argv)
    args.case = args.case or list(QUICK if args.quick else BY_DEFAULT[args.device])
    args.precision = args.precision or (list(PRECISIONS) if args.device == "cuda" else ["float32"])
    args.rounds = args.rounds or (3 if args.quick else 5)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    quiet()
    device = torch.device(args.device)
    where = machine(device)
    print(f"{where}; {args.rounds} interleaved rounds, medians ± half the interquartile range\n")
    results: dict[str, Any] = {}
    work: dict[str, int] = {}
    rates: dict[str, float] = {}
    settings = {name: Setting(device, name, compile_options(device)) for name in args.precision}
    for precision, name in (bar := tqdm(list(product(args.precision, args.case)), desc="cases", disable=None)):
        key = _key(name, precision)
        bar.set_postfix_str(key)
        torch._dynamo.reset()
        use(precision)
        case = CASES[name]
        E, B = args.members or case.E, args.batch_size or case.B
        results[key], rate = measure(contenders(case, E, B, settings[precision]), args.rounds, settings[precision])
        work[key], rates[key] = arithmetic(case, E, B), Spread.of(rate).median
        with tqdm.external_write_mode():
            print(f"{key}: {case.title}, E = {E}, B = {B}\n\n{table(results[key])}\n", flush=True)
    print(f"{SHARES}\n\n{shares(results, work, rates)}\n")
    own = args.members is None and args.batch_size is None
    every = args.case == BY_DEFAULT[args.device] and own
    points = growth(args.precision[0], settings[args.precision[0]], args.rounds, results) if every else []
    if points:
        print(f"A step of the notebook's MLP, by members and batch size, {args.precision[0]}\n\n{grown(points)}\n")
    if own and "float32" in args.precision:
        print(f"Aims (times divided, float32; for {AIMED_AT[args.device]})\n\n{judged(results, args.device)}\n")
    options = {key: value for key, value in vars(args).items() if key not in ("json", "png")}
    found = {"cases": results, "flop": work, "matmul_flop_per_s": rates, "growth": points}
    write_json({"machine": where, "settings": options, **found}, args.json)
    draw(results, points, where, args.png)
    print(f"results: {args.json}\nplot: {args.png}")


if __name__ == "__main__":
    main()
