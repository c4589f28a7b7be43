"""Which models become ensembles, and how: every layer of torch.nn, ways to write a model, all of torchvision.

If transformers is installed, its families can be tried too (`--family transformers`).

Each model is tried as a classic ensemble and as a BatchEnsemble, in eval and in training mode. Outputs, new buffers and
gradients must equal those of a plain Python loop over E ordinary networks with the members' weights: the gradients by
`.backward()` through the forward, and those of a train step, which is not compiled.

    python benchmarks/model_coverage.py                      everything; some hours on two cores
    python benchmarks/model_coverage.py --family nn written  a few minutes
    python benchmarks/model_coverage.py --family transformers
    python benchmarks/model_coverage.py --only 'resnet*' swin_t
    python benchmarks/model_coverage.py --factory package.module:build

A factory takes no arguments and returns a model and the positional arguments of one call of it, as a tuple.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import math
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, partial
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from measure import write_json
from plain import combined, member_loss, opened, plain_members, stacked
from sample import Sample
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm
from zoo import FAMILIES, OPTIONAL, Case, cases, exact
from zoo_transformers import is_installed

import functorch_ens as fe
from functorch_ens.tables import aligned

RUNS = [(kind, mode) for kind in ("classic", "BatchEnsemble") for mode in ("eval", "train")]
# Above this many parameters a model is compared in float32, by one strategy, with some of its gradients; above the
# second it does not fit into memory in float64.
_LARGE, _HUGE = 10_000_000, 300_000_000
# Deep networks amplify rounding. Where float64 cannot tell that from an error, the plain loop is run again with each
# input and weight moved at random by up to so many units of rounding: a difference may be as large as what that does.
_ROUNDINGS = 10
_SHAKES = range(4, 12)  # seeds: some of them make a detector choose other boxes, or a sampled point cross an edge
# Of the largest value.
_TOLERANCE = {torch.complex128: 1e-7, torch.float64: 1e-7, torch.float32: 1e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        *("--family", "--families"),
        nargs="+",
        choices=[*FAMILIES, *OPTIONAL],
        default=list(FAMILIES),
        help=f"default: all but {', '.join(OPTIONAL)}, which needs `pip install transformers`",
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="models whose name matches one")
    parser.add_argument("--factory", metavar="MODULE:FUNCTION", help="try a model of your own instead")
    parser.add_argument("--members", type=int, default=2, metavar="E", help="size of the ensembles (default: 2)")
    parser.add_argument("--no-times", action="store_true", help="leave out the times by vmap over the loop's")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds for one model (default: 900)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there, after each model")
    parser.add_argument("--resume", action="store_true", help="take what is in the --json FILE already as done")
    options = parser.parse_args()
    if options.members < 1:
        parser.error(f"--members: expected at least 1, got {options.members}")
    if "transformers" in options.family and not is_installed():
        parser.error("--family: transformers is not installed: pip install transformers")
    if options.factory:
        chosen = [_from_factory(options.factory, parser)]
    else:
        every = [case for family in options.family for case in cases(family)]
        chosen = [case for case in every if any(fnmatchcase(case.name, pattern) for pattern in options.only)]
        if not chosen:
            parser.error(f"--only: {options.only} matches no model of {options.family}")

    results: dict[str, dict[str, dict[str, Any]]] = {}
    if options.resume:
        if not options.json:
            parser.error("--resume: expected --json FILE too")
        if options.json.exists():
            results = json.loads(options.json.read_text())["models"]
    importlib.import_module("torch._dynamo")  # torch.optim needs it: here once, instead of in each process
    versions = {"torch": torch.__version__}
    if "transformers" in options.family and not options.factory:
        versions["transformers"] = importlib.import_module("transformers").__version__
    bar = tqdm(chosen, disable=None, unit="model")
    for case in bar:
        bar.set_postfix_str(case.name)
        if f"{case.family}/{case.name}" in results:
            continue
        results[f"{case.family}/{case.name}"] = _isolated(case, options.members, options.timeout, not options.no_times)
        if options.json:
            write_json({**versions, "E": options.members, "models": results}, options.json)
    print(report(results))
    sys.exit(any(run["by"] == "fails" for runs in results.values() for run in runs.values()))


def _from_factory(path: str, parser: argparse.ArgumentParser) -> Case:
    """The case of a user's own model; `parser.error` where `path` does not lead to a function."""
    module, _, function = path.partition(":")
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"--factory: expected package.module:function, got {path!r}: {error}")

    def make() -> Sample:
        model, *args = build()
        return Sample(model, tuple(args), {})

    return Case("factory", path, make)


# --------------------------------------------------------------------------------------------------------------------
# One model


def _isolated(case: Case, E: int, timeout: float, timed: bool) -> dict[str, dict[str, Any]]:
    """What `attempt` finds of each run, in a process of its own: its memory comes back, and a crash ends it alone."""
    context = multiprocessing.get_context("fork")  # this process computes nothing, so it has no threads to lose
    results: dict[str, dict[str, Any]] = {}
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_attempt_all, args=(case, E, timed, send), daemon=True)
    process.start()
    send.close()
    deadline = time.monotonic() + timeout
    try:
        while len(results) < len(RUNS) and receive.poll(max(0.0, deadline - time.monotonic())):
            name, result = receive.recv()
            results[name] = result
    except EOFError:
        pass
    late = process.is_alive() and len(results) < len(RUNS)
    if late:
        process.kill()
    process.join()
    why = f"no answer in {timeout:g} s" if late else f"the process ended, exit code {process.exitcode}"
    return {" ".join(run): results.get(" ".join(run), {"by": "fails", "reason": why}) for run in RUNS}


def _attempt_all(case: Case, E: int, timed: bool, send: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable()  # what it would say is in the table
    torch.manual_seed(0)
    single, double = case.make(), cache(partial(exact, case))
    for kind, mode in RUNS:
        try:
            result = attempt(kind, mode, E, single, double, timed)
        except Exception as error:
            result = {"by": "fails", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
        send.send((f"{kind} {mode}", result))
        gc.collect()


class Plain(NamedTuple):
    """What ordinary modules compute."""

    outputs: Any
    buffers: dict[str, Tensor]
    """New ones. Apart, for what is in them (positions, masks) may be far larger than any output."""
    backward: list[Tensor]
    """The gradients of `combined` outputs."""
    step: list[Tensor] | None
    """The gradients of the summed losses of the members; None where there is nothing to train, or no loss of it."""


class Trial:
    """One model as one `kind` of ensemble in one `mode`."""

    def __init__(self, sample: Sample, kind: str, mode: str, E: int) -> None:
        self.mode = mode
        self.model, self.args, self.kwargs = sample
        self.model.train(mode == "train")
        self.part = _parameters(self.model) > _LARGE
        self.params = ensemble(self.model, kind, E)
        self.buffers = fe.ensemble_buffers(self.model, E)

    def plain(self, shaken: int | None = None) -> Plain:
        """What a loop over ordinary modules finds; `shaken` is a seed that moves inputs and weights by roundings."""
        outputs, buffers = self._members(shaken)
        result, new = stacked(outputs, buffers)
        backward = self.gradients(combined(result), again=self.part)
        if not self.part:  # reentrant checkpointing goes back through a graph once
            outputs, _ = self._members(shaken)
        shapes = {tuple(leaf.shape for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)) for out in outputs}
        loss = torch.stack([member_loss(output) for output in outputs]).sum()
        # A loss takes tensors [E, ...], which the members' outputs are not where they differ in shape or are empty.
        has_loss = len(shapes) == 1 and any(prod(shape) for shape in next(iter(shapes)))
        step = self.gradients(loss) if loss.requires_grad and self.trained and has_loss else None
        # What a graph holds would not fit in twice.
        result, new = pytree.tree_map_only(Tensor, Tensor.detach, (result, new))
        return Plain(result, new, backward, step)

    def _members(self, shaken: int | None) -> Any:
        weights = [fe.member_params(self.model, self.params, i) for i in range(self.params.E)]
        everything = self.args, self.kwargs, weights
        if shaken is not None:
            everything = pytree.tree_map(partial(_shaken, shaken), everything)
        args, kwargs, weights = everything
        return plain_members(self.model, weights, self.buffers, args, kwargs, seed=1)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters in which there are gradients; of a large model, a part of them is compared."""
        every = {name: x for group in self.params for name, x in group.items() if x.requires_grad}
        return dict(list(every.items())[::8]) if self.part else every

    def run(self, forward: fe.Forward) -> Any:
        """The outputs and new buffers of `forward`."""
        torch.manual_seed(1)
        return forward(self.params, *self.args, buffers=self.buffers, **self.kwargs)

    def gradients(self, total: Tensor | None, again: bool = False) -> list[Tensor]:
        """The gradients of `total` in what is trained; `again`: others are asked for later."""
        trained = list(self.trained.values())
        if total is None:
            return []
        if self.part:
            found: Any = torch.autograd.grad(total, trained, allow_unused=True, retain_graph=again)
        else:  # reentrant checkpointing knows this way alone
            total.backward(retain_graph=again)
            found = [tensor.grad for tensor in trained]
            for tensor in trained:
                tensor.grad = None
        found = [torch.zeros_like(x) if g is None else g for x, g in zip(trained, found, strict=True)]
        return [g.to_dense() if g.is_sparse else g for g in found]

    def train_step(self, forward: fe.Forward) -> list[Tensor]:
        """The gradients of a train step of `forward`."""
        optimizer = torch.optim.SGD(self.trained.values())
        step = fe.make_train_step(forward, member_loss, optimizer, compile=False)
        torch.manual_seed(1)
        target = torch.zeros(())
        found = step.gradients(self.params, *self.args, target, buffers=self.buffers, **self.kwargs).gradients
        return [found[name] for name in self.trained]

    def step(self, forward: fe.Forward) -> None:
        """What is timed: a gradient in training mode, a forward alone in eval mode."""
        if self.mode == "train":
            self.gradients(combined(self.run(forward)[0]))
        else:
            with torch.no_grad():
                self.run(forward)


def attempt(
    kind: str, mode: str, E: int, single: Sample, double: Callable[[], Sample], timed: bool = True
) -> dict[str, Any]:
    """Try one model as one `kind` of ensemble: by which strategy, why, its error, and the time ratio vmap / loop.

    `single` is timed; `double`, the same in float64, is compared with the plain loop. A large model is compared in
    float32, and in float64 only where that leaves a doubt: what differs by rounding alone is equal there.
    """
    trial = Trial(single, kind, mode, E)
    try:
        plain = trial.plain()
    except Exception as error:
        return {"by": "refused", "reason": f"the model itself: {type(error).__name__}: {error}".partition("\n")[0]}
    auto, loop = fe.make_forward(trial.model), fe.make_forward(trial.model, strategy="loop")
    trial.step(auto)
    result: dict[str, Any] = {"by": auto.strategy, "reason": auto.reason}
    if kind == "BatchEnsemble":
        rules = Counter(row.rule for row in fe.describe(trial.model, trial.params).rows)
        result["fast"], result["rank-1"] = rules["fast"], rules["fast"] + rules["fallback"]
    if auto.strategy == "vmap" and timed:
        result["ratio"] = _ratio(lambda: trial.step(auto), lambda: trial.step(loop))

    wrong: str | None = "not compared yet"
    if trial.part:
        wrong = _compare(trial, plain, result)
    if wrong and _parameters(single.model) < _HUGE:
        precise = Trial(double(), kind, mode, E)
        try:
            want, noise = precise.plain(), False
        except Exception:  # some models compute in float32 inside, whatever they are given
            precise, want, noise = trial, plain, True
        wrong = _compare(precise, want, result, noise)
    elif wrong:
        wrong = _compare(trial, plain, result, noise=True)
    return {**result, "by": "fails", "reason": wrong} if wrong else result


def _compare(trial: Trial, want: Plain, result: dict[str, Any], noise: bool = False) -> str | None:
    """What differs from `want`, the plain loop's, beyond rounding, if anything; how much goes to `result`.

    With `noise`, the tolerance is no less than what roundings do to this model, as far as the plain loop itself tells.
    """
    tolerance = max(_TOLERANCE[t.dtype] for t in trial.params.stacked.values() if t.dtype in _TOLERANCE)
    if noise:
        moved = 0.0
        for seed in _SHAKES:
            other = trial.plain(shaken=seed)
            found = [difference(a, b) for a, b in zip(other, want, strict=True) if a is not None and b is not None]
            moved = max(moved, *found)
            del other
        result["moved by roundings"] = moved
        tolerance = max(tolerance, moved if math.isfinite(moved) else 0.0)
    wrong = []
    strategies = ("auto",) if trial.part else ("auto", "loop")
    for strategy in strategies:
        # "same": one noise for all members, so that dropout can be compared with the loop's.
        forward = fe.make_forward(trial.model, strategy=strategy, randomness="same")
        got = trial.run(forward)
        errors = (
            max(difference(got[0], want.outputs), difference(got[1], want.buffers)),
            difference(trial.gradients(combined(got[0])), want.backward),
        )
        del got
        if strategy == "auto" and forward.strategy == "loop" != result["by"]:
            result |= {"by": "loop", "reason": forward.reason}  # by vmap it computes no gradient
            result.pop("ratio", None)
        result[f"error, {forward.strategy}"] = max(errors)
        if not max(errors) <= tolerance:
            apart = f"{errors[0]:.1g} in outputs, {errors[1]:.1g} in gradients"
            wrong.append(f"{strategy}: differs from the loop by {apart}")
    result["step"] = "not compared"
    if want.step is None:
        return wrong[0] if wrong else None
    worst = 0.0
    for strategy in strategies:
        forward = fe.make_forward(trial.model, strategy=strategy, randomness="same")
        try:
            worst = max(worst, difference(trial.train_step(forward), want.step))
        except Exception as error:
            wrong.append(f"train step, {strategy}: {type(error).__name__}: {error}".partition("\n")[0])
            result["step"] = "fails"
            continue
        if not worst <= tolerance:
            wrong.append(f"train step, {strategy}: differs from the loop by {worst:.1g} in gradients")
            result["step"] = "fails"
        elif strategy == "auto":
            result["step"] = forward.strategy
    result["error, step"] = worst
    return wrong[0] if wrong else None


def _shaken(seed: int, value: Any) -> Any:
    """Floating numbers, each moved by up to `_ROUNDINGS` units of rounding, at random."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator().manual_seed(seed)
    units = torch.randint(-_ROUNDINGS, _ROUNDINGS + 1, value.shape, generator=generator).to(value)
    return value * (1 + units * torch.finfo(value.dtype).eps)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ensemble(model: nn.Module, kind: str, E: int) -> fe.EnsembleParams:
    """Members that differ, and are not far from the model, so that deep networks stay in range."""
    if kind == "BatchEnsemble":
        generator = torch.Generator().manual_seed(2)
        return fe.batchensemble_params(model, E, r_std=0.1, s_std=0.1, generator=generator)
    params = fe.ensemble_params(model, E, reset=False)
    with torch.no_grad():
        for stack in params.stacked.values():  # the same values in other places: cheaper than random numbers
            for i, own in enumerate(stack):
                own.copy_(own.flatten().roll(i).reshape(own.shape) * (1 + 0.1 * i))
    return params


def difference(got: Any, want: Any) -> float:
    """The largest difference between two pytrees, as a part of the largest value; infinite where the forms differ."""
    mine = [leaf for leaf in pytree.tree_leaves(pytree.tree_map(opened, got)) if isinstance(leaf, Tensor)]
    theirs = [leaf for leaf in pytree.tree_leaves(want) if isinstance(leaf, Tensor)]
    if [leaf.shape for leaf in mine] != [leaf.shape for leaf in theirs]:
        return float("inf")
    numbers = [leaf for leaf in theirs if leaf.numel() and leaf.dtype != torch.bool]
    scale = max([1e-30, *(leaf.abs().max().item() for leaf in numbers)])
    apart = [
        0.0,
        *((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True) if a.numel() and a.dtype != torch.bool),
    ]
    return max(apart) / scale


def _ratio(first: Callable[[], None], second: Callable[[], None], rounds: int = 3, seconds: float = 3) -> float:
    """The time of `first` over that of `second`: the median of interleaved rounds, fewer where they take long."""
    ratios: list[float] = []
    second()
    begun = time.perf_counter()
    while len(ratios) < rounds and (not ratios or time.perf_counter() - begun < seconds):
        times = []
        for function in (first, second):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return median(ratios)


# --------------------------------------------------------------------------------------------------------------------
# What was found


def report(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table by model, the reasons of those that are not by vmap, and the totals."""
    runs = [" ".join(run) for run in RUNS]
    rows = [["model", *runs, "fast rule"]]
    rows += [[name, *(_cell(found[run]) for run in runs), _share([found])] for name, found in results.items()]
    parts = [
        "vmap: all members at once, with its time over the loop's; loop: one after another; fast rule: so many of the "
        "rank-1 weights of a BatchEnsemble.\n\n" + aligned(rows)
    ]
    others = {
        f"{name} ({', '.join(run for run in runs if found[run]['by'] == by)})": f"{by}: {reason}"
        for name, found in results.items()
        for by, reason in dict.fromkeys((found[run]["by"], found[run]["reason"]) for run in runs)
        if by != "vmap"
    }
    if others:
        parts.append("Not by vmap\n" + "\n".join(f"  {name}\n    {reason}" for name, reason in others.items()))
    families = dict.fromkeys(name.partition("/")[0] for name in results)
    heads = "family,models,runs,vmap,loop,refused,fails,steps,steps fail,fast rule,median,slowest"
    totals = [heads.split(",")]
    for family in [*families, "all"] if len(families) > 1 else families:
        mine = [found for name, found in results.items() if family in ("all", name.partition("/")[0])]
        every = [run for found in mine for run in found.values()]
        count = Counter(run["by"] for run in every)
        ratios = [run["ratio"] for run in every if "ratio" in run]
        steps = Counter(run.get("step", "not compared") for run in every)
        numbers = [len(mine), len(every), *(count[by] for by in ("vmap", "loop", "refused", "fails"))]
        numbers += [steps.total() - steps["not compared"], steps["fails"]]
        fast = _share(mine)
        spread = [f"{median(ratios):.2f}", f"{max(ratios):.2f}"] if ratios else ["-", "-"]
        totals.append([family, *map(str, numbers), fast, *spread])
    parts.append(
        "Totals (refused: the model itself cannot do it, in any loop; steps: runs whose train step was compared too; "
        "fast rule: the rank-1 weights that have one, of all; median, slowest: the time by vmap over the loop's)\n\n"
        + aligned(totals)
    )
    return "\n\n".join(parts)


def _share(models: list[dict[str, dict[str, Any]]]) -> str:
    """How many of the rank-1 weights of the BatchEnsembles of `models` are on the fast rule."""
    counted = [found["BatchEnsemble eval"] for found in models if "fast" in found["BatchEnsemble eval"]]
    return f"{sum(run['fast'] for run in counted)} of {sum(run['rank-1'] for run in counted)}" if counted else "-"


def _cell(run: dict[str, Any]) -> str:
    return f"{run['by']} {run['ratio']:.2f}" if "ratio" in run else run["by"]


if __name__ == "__main__":
    main()
