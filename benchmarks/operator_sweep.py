"""Which of torch's operators vmap computes wrongly: torch's own table of them, each as a model of one layer.

The floating tensors of an operator's sample inputs become the parameters of a module that calls it. Members have
parameters that differ: all of them, and each one alone while the others are shared. Outputs and gradients in float64,
by torch.func.vmap alone, by `make_forward(strategy="auto")` and by "loop", must equal those of a plain Python loop over
E modules. The variant of the operator that writes in place is tried too.

    python benchmarks/operator_sweep.py                      everything; some minutes
    python benchmarks/operator_sweep.py --only 'index_*' select_scatter

The exit code is 1 where `make_forward` gives a wrong answer. torch's table needs the package expecttest.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import parsed, positive, write_json
from plain import combined, plain_loop
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree
from tqdm import tqdm

import functorch_ens as fe
from functorch_ens.tables import aligned

Runs = Callable[[fe.EnsembleParams], Any]
Found = dict[str, Any]

# A sample with more numbers than this is passed over, and so is what comes after so many samples.
_LARGEST, _LOOKED_AT = 40_000, 200
_RELATIVE, _ABSOLUTE = 1e-7, 1e-9  # the second is a part of the largest value, or of 1e-3 where all are smaller
_KINDS = {
    "vmap is wrong": "torch.func.vmap is wrong",
    "auto is wrong": "make_forward is wrong",
    "auto raises": "make_forward, or its backward pass, raises",
    "loop is wrong": 'strategy="loop" is wrong',
    "loop raises": 'strategy="loop", or its backward pass, raises',
    "sent to the loop": "make_forward takes the loop",
}
_MEANINGLESS = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="operators whose name matches one")
    parser.add_argument("--members", type=positive, default=3, metavar="E", help="size of the ensembles (default: 3)")
    parser.add_argument("--samples", type=positive, default=6, metavar="N", help="of each operator (default: 6)")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds for an operator (default: 120)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found there")
    options = parsed(parser, None)
    try:
        table: Any = importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
    except ImportError as error:
        parser.error(f"torch's table of operators cannot be imported: {error}; pip install expecttest")
    chosen = [op for op in table if any(fnmatchcase(name_of(op), pattern) for pattern in options.only)]
    if not chosen:
        parser.error(f"--only: {options.only} matches no operator of torch {torch.__version__}")

    bar = tqdm(chosen, disable=None, unit="operator")
    results: dict[str, Found] = {}
    for op in bar:
        bar.set_postfix_str(name_of(op))
        results[name_of(op)] = _isolated(op, options.members, options.samples, options.timeout)
    if options.json:
        write_json({"torch": torch.__version__, "E": options.members, **summary(results)}, options.json)
    print(report(results))
    sys.exit(any(found.get(f"{strategy} is wrong") for found in results.values() for strategy in ("auto", "loop")))


def name_of(op: Any) -> str:
    """The operator's name, with that of its variant where torch's table has several."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


# --------------------------------------------------------------------------------------------------------------------
# One operator


class Operator(nn.Module):
    """Calls `function` with the tensors of one sample: floating ones are its parameters, all else is fixed."""

    def __init__(
        self, function: Callable[..., Any], sample: tuple[Any, ...], in_place: bool, first_alone: bool = False
    ) -> None:
        super().__init__()
        leaves, form = pytree.tree_flatten(sample)
        places = {f"p{i}": i for i, leaf in enumerate(leaves) if _is_parameter(leaf)}
        if first_alone:
            places = dict(list(places.items())[:1])
        for name, i in places.items():
            self.register_parameter(name, nn.Parameter(leaves[i].detach().clone()))

        self._names = list(places)

        def call(*own: Tensor) -> Any:  # a closure, so that no copy of the model holds copies of the rest
            own = tuple(tensor * 1 for tensor in own) if in_place else own
            given = dict(zip(places.values(), own, strict=True))
            rest = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            first, args, kwargs = pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(rest)], form)
            return function(first, *args, **kwargs)

        self._call = call

    def forward(self) -> Any:
        return self._call(*(getattr(self, name) for name in self._names))


def _is_parameter(leaf: Any) -> bool:
    return (
        isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.layout == torch.strided and leaf.numel() > 0
    )


def samples(op: Any, count: int) -> Iterator[tuple[Any, ...]]:
    """At most `count` of the operator's small samples that have a parameter, from all over the list of them."""
    torch.manual_seed(0)
    found = []
    for sample in islice(op.sample_inputs("cpu", torch.float64, requires_grad=False), _LOOKED_AT):
        whole = sample.input, tuple(sample.args), dict(sample.kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(whole) if isinstance(leaf, Tensor)]
        if any(map(_is_parameter, tensors)) and sum(tensor.numel() for tensor in tensors) <= _LARGEST:
            found.append(whole)
    taken = min(count, len(found))
    yield from (found[i * len(found) // taken] for i in range(taken))


def _isolated(op: Any, E: int, count: int, timeout: float) -> Found:
    """What `examine` finds, in a process of its own: some operators crash, or never return."""
    context = multiprocessing.get_context("fork")  # this process computes nothing, so it has no threads to lose
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_examine_alone, args=(op, E, count, send), daemon=True)
    process.start()
    send.close()
    try:
        if receive.poll(timeout):
            found: Found = receive.recv()
        else:
            found = {"left out": f"no answer in {timeout:g} s"}
            process.kill()
        process.join()
    except EOFError:
        process.join()
        found = {"left out": f"the process ended, exit code {process.exitcode}"}
    return found


def _examine_alone(op: Any, E: int, count: int, send: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable()  # what it would say is in the table
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch notes there what vmap computes member by member
    try:
        found = examine(op, E, count)
    except Exception as error:  # torch's own samples: some need a GPU, or another package
        found = {"left out": f"its samples: {_line(error)}"}
    send.send(found)


def examine(op: Any, E: int, count: int) -> Found:
    """Compare one operator, and its variant that writes in place, for some samples and every choice of stacks."""
    if torch.float64 not in op.dtypes:
        return {"left out": "not for float64"}
    if op.name in _MEANINGLESS:
        return {"left out": "its values mean nothing"}
    found: Found = {"runs": 0, "gradients": 0, "by": Counter(), **{kind: {} for kind in _KINDS}}
    refusal = "no sample has a floating tensor"
    variants = {"": op.op, " in place": op.inplace_variant} if op.inplace_variant else {"": op.op}
    for sample in samples(op, count):
        for variant, function in variants.items():
            try:
                model = _model(function, sample, bool(variant))
            except _Refused as error:
                refusal = str(error)
                continue
            names = [name for name, _ in model.named_parameters()]
            for stacked in [names, *([name] for name in names if len(names) > 1)]:
                label = (stacked[0] if len(stacked) < len(names) else "all") + variant
                try:
                    compare(model, stacked, E, label, found)
                except _Refused as error:
                    refusal = str(error)
    return found if found["runs"] else {"left out": refusal}


class _Refused(Exception):
    """The model itself cannot be called so, or its answers cannot be compared."""


def _model(function: Callable[..., Any], sample: tuple[Any, ...], in_place: bool) -> nn.Module:
    """The model of one sample, if its answers can be compared; `_Refused` otherwise."""
    for first_alone in (False, True):  # batch_norm refuses to differentiate in its running_mean
        model = Operator(function, sample, in_place, first_alone)
        versions, state = [parameter._version for parameter in model.parameters()], torch.get_rng_state()
        try:
            output = model()
        except Exception as error:
            failure = error
            continue
        if [parameter._version for parameter in model.parameters()] != versions:
            raise _Refused("it writes to its parameters")
        if not torch.equal(torch.get_rng_state(), state):
            raise _Refused("it draws random numbers")
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
            raise _Refused("it returns no tensor")
        return model
    raise _Refused(f"the model itself: {_line(failure)}") from failure


def compare(model: nn.Module, stacked: list[str], E: int, label: str, found: Found) -> None:
    """Compare one model, with the parameters `stacked`, with the plain loop; what is seen goes to `found`."""
    params, want, slopes = oracle(model, stacked, E)
    found["runs"] += 1
    found["gradients"] += slopes is not None

    def differs(run: Runs) -> str | None:
        got = run(params)
        if not same(got, want):
            return "outputs"
        return "gradients" if slopes is not None and not same(gradients(got, params), slopes) else None

    with suppress(Exception):  # where vmap raises, nobody is misled
        if wrong := differs(partial(_by_vmap, model)):
            found["vmap is wrong"].setdefault(label, wrong)
    for strategy in ("auto", "loop"):
        forward = fe.make_forward(model, strategy=strategy, randomness="same")  # some set a seed of their own
        try:
            if wrong := differs(forward):
                found[f"{strategy} is wrong"].setdefault(label, wrong)
        except Exception as error:
            found[f"{strategy} raises"].setdefault(label, _line(error))
        if strategy == "auto":
            found["by"][forward.strategy] += 1
        if forward.strategy == "loop":
            if strategy == "auto":
                found["sent to the loop"].setdefault(label, forward.reason)
            break  # so the loop has been compared


def oracle(model: nn.Module, stacked: list[str], E: int) -> tuple[fe.EnsembleParams, Any, list[Tensor] | None]:
    """Parameters that differ between members, with the plain loop's outputs and (None: it has none) gradients.

    Members are the samples' values in other places and multiplied by a number; the second alone where the first leaves
    the domain of the operator, as positive definite matrices do.
    """
    best: tuple[fe.EnsembleParams, Any] | None = None
    failure: Exception | None = None
    for roll in (True, False):
        params = fe.ensemble_params(model, E, reset=False, stacked=stacked)
        with torch.no_grad():
            for stack in params.stacked.values():
                for i, own in enumerate(stack):
                    moved = own.flatten().roll(i).reshape(own.shape) if roll else own
                    own.copy_(moved * (1 + 0.1 * i))
        try:
            want = _by_loop(model, params)
        except Exception as error:
            failure = failure or error
            continue
        if best is None or _finite(want):
            best = params, want
        if _finite(want):
            break
    if best is None:
        raise _Refused(f"the model itself: {_line(failure)}") from failure
    params, want = best
    try:
        return params, want, gradients(want, params)
    except Exception:  # no derivative
        return params, want, None


def _by_loop(model: nn.Module, params: fe.EnsembleParams) -> Any:
    weights = [fe.member_params(model, params, i) for i in range(params.E)]
    return plain_loop(model, weights, {}, (), {})[0]


def _by_vmap(model: nn.Module, params: fe.EnsembleParams) -> Any:
    def member(own: Mapping[str, Tensor]) -> Any:
        return functional_call(model, {**params.shared, **own}, ())

    return vmap(member, randomness="same")(dict(params.stacked))


def gradients(output: Any, params: fe.EnsembleParams) -> list[Tensor]:
    """The gradient, in all parameters, of a fixed random combination of the outputs."""
    trained = [tensor for group in params for tensor in group.values()]
    total = combined(output)
    found = torch.autograd.grad(total, trained, allow_unused=True) if total is not None else [None] * len(trained)
    return [torch.zeros_like(own) if g is None else g for g, own in zip(found, trained, strict=True)]


def same(got: Any, want: Any) -> bool:
    """Whether two pytrees have equal tensors, up to rounding; a nan equals a nan."""
    mine, theirs = ([leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (got, want))
    if [(leaf.shape, leaf.dtype) for leaf in mine] != [(leaf.shape, leaf.dtype) for leaf in theirs]:
        return False
    mine, theirs = list(map(_dense, mine)), list(map(_dense, theirs))
    sizes = [leaf[leaf.isfinite()].abs().double().max().item() for leaf in theirs if leaf.isfinite().any()]
    close = partial(torch.allclose, rtol=_RELATIVE, atol=_ABSOLUTE * max([1e-3, *sizes]), equal_nan=True)
    return all(map(close, mine, theirs))


def _dense(leaf: Tensor) -> Tensor:
    dense = leaf.detach() if leaf.layout == torch.strided else leaf.detach().to_dense()
    return dense if dense.is_floating_point() or dense.is_complex() else dense.to(torch.int64)


def _finite(output: Any) -> bool:
    return all(bool(_dense(leaf).isfinite().all()) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# --------------------------------------------------------------------------------------------------------------------
# What was found


def summary(results: Mapping[str, Found]) -> Found:
    """The counts, and of the operators only what is not as it should be, or is left out or computed by the loop."""
    compared = {name: found for name, found in results.items() if "left out" not in found}
    left: dict[str, list[str]] = {}
    for name in sorted(results.keys() - compared.keys()):
        left.setdefault(results[name]["left out"], []).append(name)
    return {
        "operators": len(results),
        "compared": len(compared),
        "runs": sum(found["runs"] for found in compared.values()),
        "runs with gradients": sum(found["gradients"] for found in compared.values()),
        "runs by": dict(sum((found["by"] for found in compared.values()), Counter())),
        **{kind: {name: _grouped(found[kind]) for name, found in compared.items() if found[kind]} for kind in _KINDS},
        "left out": left,
    }


def _grouped(seen: Mapping[str, str]) -> dict[str, list[str]]:
    """By what was seen, shortened, the choices of stacks with which it was."""
    groups: dict[str, list[str]] = {}
    for label, what in seen.items():
        what = what.removeprefix("vmap failed in Operator: ")
        groups.setdefault(what if len(what) <= 80 else f"{what[:77]}...", []).append(label)
    return groups


def report(results: Mapping[str, Found]) -> str:
    """What is wrong, what is computed by the loop and why, and the counts."""
    whole, parts = summary(results), []
    for kind, title in _KINDS.items():
        rows = [
            [name if i == 0 else "", what, ", ".join(labels)]
            for name, groups in whole[kind].items()
            for i, (what, labels) in enumerate(groups.items())
        ]
        if rows:
            table = aligned([["operator", title, "with these stacked"], *rows], left=3)
            parts.append("\n".join(line.rstrip() for line in table.splitlines()))
    wrong = {
        base(name) + "_" * label.endswith("in place")
        for name, groups in whole["vmap is wrong"].items()
        for labels in groups.values()
        for label in labels
    }
    if unlisted := sorted(wrong - listed()):
        parts.append(f"Wrong by vmap, and not in the package's list of what is: {', '.join(unlisted)}")
    counts = {
        "operators in torch's table": whole["operators"],
        **{f"... left out: {reason}"[:70]: len(names) for reason, names in whole["left out"].items()},
        "compared": whole["compared"],
        **{f"... {title}": len(whole[kind]) for kind, title in _KINDS.items()},
        "runs: samples, variants and choices of stacks": whole["runs"],
        "... with gradients": whole["runs with gradients"],
        **{f"... by {strategy}": count for strategy, count in sorted(whole["runs by"].items())},
    }
    parts.append(aligned([["totals", ""], *([name, str(count)] for name, count in counts.items())]))
    return "\n\n".join(parts)


def base(name: str) -> str:
    """The last part of an operator's name, as the package lists it."""
    return name.removeprefix("nn.functional.").removeprefix("linalg.").partition(".")[0]


def listed() -> frozenset[str]:
    """The functions that the package knows to be wrong by vmap."""
    try:
        return frozenset(importlib.import_module("functorch_ens.forward.watch").WRONG_UNDER_VMAP)
    except ImportError:
        return frozenset()


if __name__ == "__main__":
    main()
