"""Breaks things on purpose and counts what comes of it: threads, damaged files, kills, interrupts, two writers, memory.

    python benchmarks/endurance.py                     everything, some minutes
    python benchmarks/endurance.py --only threads flips --scale 0.2

Each row counts trials. `right`: the result is that of undisturbed work. `told`: a clear error, and nothing was changed.
`wrong`: neither. The seed decides what is damaged, and when something is killed as far as the machine allows.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import write_json
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from zoo_written import Checkpointed

import functorch_ens as fe
from functorch_ens.tables import aligned

Outcomes = Iterator[str]
"""Of each trial: "right", "told" or "wrong"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({name.split(",")[0] for name in TRIALS}), metavar="KIND")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of trials (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts there")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _worker(*options.worker)
        return
    if not options.scale > 0:
        parser.error(f"--scale: expected a number > 0, got {options.scale:g}")
    counts: dict[str, Counter[str]] = {}
    chosen = {name: trial for name, trial in TRIALS.items() if not options.only or name.split(",")[0] in options.only}
    bar = tqdm(chosen.items(), disable=None, unit="kind")
    for name, (trial, number) in bar:
        bar.set_postfix_str(name)
        torch.manual_seed(options.seed)
        counts[name] = Counter(trial(random.Random(options.seed), max(1, round(number * options.scale))))
    print(report(counts))
    if options.json:
        write_json({"torch": torch.__version__, "seed": options.seed, "counts": counts}, options.json)
    sys.exit(any(found["wrong"] for found in counts.values()))


def report(counts: dict[str, Counter[str]]) -> str:
    """The table of what came of the trials."""
    columns = ("right", "told", "wrong")
    rows = [[name, str(found.total()), *(str(found[column]) for column in columns)] for name, found in counts.items()]
    return aligned([["kind", "trials", *columns], *rows])


# --------------------------------------------------------------------------------------------------------------------
# Threads


def _together(*works: Callable[[], Any]) -> None:
    """Run all at the same time, the first to its end, the others again and again until then."""
    over = threading.Event()

    def again(work: Callable[[], Any]) -> None:
        while not over.is_set():
            work()

    others = [threading.Thread(target=again, args=(work,), daemon=True) for work in works[1:]]
    for thread in others:
        thread.start()
    try:
        works[0]()
    finally:
        over.set()
        for thread in others:
            thread.join()


def _outcome(got: Callable[[], Any], want: Any) -> str:
    try:
        return "right" if _same(got(), want) else "wrong"
    except Exception:
        return "wrong"


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _net(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))


def predict_while_another_thread_trains(_: random.Random, number: int) -> Outcomes:
    """Predictions are in eval mode, and training is not, whatever other threads do with the same model."""
    model, x = _net(dropout=0.9), torch.randn(20, 3)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)
    want = fe.predict(forward, params, x)
    outcomes: list[str] = []

    def predicting() -> None:
        outcomes.append(_outcome(lambda: fe.predict(forward, params, x, batch_size=7), want))

    def training() -> None:
        for _ in range(number):
            with torch.no_grad():
                outcomes.append("wrong" if _same(forward(params, x), want) else "right")
            time.sleep(1e-4)

    _together(training, predicting, predicting)
    yield from outcomes
    yield "right" if all(module.training for module in model.modules()) else "wrong"


def calls_while_another_thread_compiles(_: random.Random, number: int) -> Outcomes:
    """Calls of a forward while a step of it is compiled."""
    model, x, y = _net(), torch.randn(20, 3), torch.randn(20, 2)
    forward = fe.make_forward(model)
    params, others = fe.ensemble_params(model, 3), fe.ensemble_params(model, 3)
    want, outcomes = forward(params, x).detach(), []

    def compiling() -> None:
        for _ in range(number):
            torch.compiler.reset()
            step = fe.make_train_step(forward, nn.functional.mse_loss, torch.optim.SGD(tree_leaves(others), 0.1))
            step(others, x, y)

    def calling() -> None:
        outcomes.append(_outcome(lambda: forward(params, x), want))
        time.sleep(0.01)

    _together(compiling, calling, calling)
    yield from outcomes
    yield "right" if forward.strategy == "vmap" else "wrong"


def parameters_made_in_threads(_: random.Random, number: int) -> Outcomes:
    """Parameters that each thread draws from a generator of its own."""
    model = nn.Sequential(nn.Linear(20, 30), nn.LSTM(30, 8), nn.MultiheadAttention(8, 2))

    def make(seed: int) -> fe.EnsembleParams:
        return fe.ensemble_params(model, 3, generator=torch.Generator().manual_seed(seed))

    want, outcomes = [make(seed) for seed in range(4)], []

    def work(seed: int) -> Callable[[], None]:
        return lambda: outcomes.append(_outcome(lambda: make(seed), want[seed]))

    def first() -> None:
        for _ in range(number):
            work(0)()

    _together(first, work(1), work(2), work(3))
    yield from outcomes


def draws_of_another_thread(_: random.Random, number: int) -> Outcomes:
    """Random numbers that another thread draws do not come again, whatever models that draw none are computed."""

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model, x = nn.Sequential(nn.Linear(3, 4), Branching()), torch.ones(2, 3)
    drawn: list[tuple[float, ...]] = []

    def calls() -> None:
        for _ in range(number):
            params = fe.ensemble_params(model, 3, generator=torch.Generator().manual_seed(0))
            fe.make_forward(model, chunk_size=2)(params, x).sum().backward()
            fe.make_forward(model, strategy="loop", randomness="same")(params, x)

    _together(calls, lambda: drawn.append(tuple(torch.rand(8).tolist())))
    for numbers, count in Counter(drawn).items():
        assert numbers
        yield from ["right", *["wrong"] * (count - 1)]


def checkpoints_of_another_thread(_: random.Random, number: int) -> Outcomes:
    """torch.utils.checkpoint in another thread computes again, while an ensemble of a model with it is computed."""
    model, x = Checkpointed(False).eval(), torch.ones(2, 4)
    outcomes: list[str] = []
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model)

    def others() -> None:
        outcomes.extend("right" if _computes_again(bool(trial % 2)) else "wrong" for trial in range(number))

    _together(others, lambda: forward(params, x).sum().backward())
    yield from outcomes


def _computes_again(reentrant: bool) -> bool:
    """Whether torch.utils.checkpoint calls a function in the forward and in the backward pass."""
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    checkpoint(counted, torch.ones(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    return len(calls) == 2


# --------------------------------------------------------------------------------------------------------------------
# Files


def _state() -> dict[str, Any]:
    params = fe.batchensemble_params(_net(), 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(tree_leaves(params))
    for tensor in tree_leaves(params):
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return {"params": params, "optimizer": optimizer.state_dict(), "epoch": 3, "history": [{"loss": torch.ones(3)}]}


def _damaged(damage: Callable[[bytearray, random.Random], None], chance: random.Random, number: int) -> Outcomes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        state = _state()
        fe.save_checkpoint(state, path)
        whole = path.read_bytes()
        for _ in range(number):
            data = bytearray(whole)
            damage(data, chance)
            path.write_bytes(data)
            try:
                found = fe.load_checkpoint(path)
                yield "right" if _same(found, state) else "wrong"
            except ValueError as error:
                yield "told" if str(path) in str(error) else "wrong"
            except Exception:
                yield "wrong"


def flipped_bits(chance: random.Random, number: int) -> Outcomes:
    """One bit of a checkpoint flipped."""

    def flip(data: bytearray, chance: random.Random) -> None:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)

    return _damaged(flip, chance, number)


def damaged_blocks(chance: random.Random, number: int) -> Outcomes:
    """A checkpoint cut off, or with a block of zeros, or with bytes more."""

    def damage(data: bytearray, chance: random.Random) -> None:
        at, length = chance.randrange(len(data)), chance.randrange(1, 600)
        kind = chance.randrange(3)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = chance.randbytes(length)

    return _damaged(damage, chance, number)


def two_writers(_: random.Random, number: int) -> Outcomes:
    """Threads that write to one path; a third one reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        states = [{"which": i, "tensor": torch.full((20_000,), float(i))} for i in range(2)]
        fe.save_checkpoint(states[0], path)
        outcomes: list[str] = []

        def read() -> None:
            for _ in range(number):
                try:
                    found = fe.load_checkpoint(path)
                    outcomes.append("right" if _same(found, states[found["which"]]) else "wrong")
                except Exception:
                    outcomes.append("wrong")

        _together(read, *(lambda state=state: fe.save_checkpoint(state, path) for state in states))
        yield from outcomes
        yield "right" if [each.name for each in Path(folder).iterdir()] == ["run.pt"] else "wrong"


def _start(*work: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", *work]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _interrupted(worker: subprocess.Popen[str]) -> str:
    """What a worker says after Ctrl-C; again after a while, for Python swallows an interrupt in a destructor.

    Not after a second: on a busy machine a process with torch takes longer to end.
    """
    while True:
        worker.send_signal(signal.SIGINT)
        try:
            return worker.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            continue


def interrupted_saves(chance: random.Random, number: int) -> Outcomes:
    """Ctrl-C while a process saves again and again: it ends by that alone, and the file is whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        for _ in range(number):
            worker = _start("save", str(path))
            assert worker.stdout is not None
            worker.stdout.readline()  # it has begun
            time.sleep(chance.uniform(0.01, 0.2))
            errors = _interrupted(worker)
            as_asked = worker.returncode in (1, -signal.SIGINT) and "KeyboardInterrupt" in errors
            left = [each.name for each in Path(folder).iterdir()] == ["run.pt"]
            try:
                whole = fe.load_checkpoint(path)["epoch"] == 3
            except Exception:
                whole = False
            yield "right" if as_asked and left and whole else "wrong"


def interrupted_calls(chance: random.Random, number: int) -> Outcomes:
    """Ctrl-C in a call of an ensemble whose model checkpoints: the next call, and checkpointing, are as before."""
    model, x = Checkpointed(False).eval(), torch.ones(2, 4)
    params, forward = fe.ensemble_params(model, 3), fe.make_forward(model, chunk_size=2)
    want = forward(params, x).detach()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for trial in range(number):
            try:
                # Python swallows an interrupt in a destructor, so there is another one.
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 3e-3), 0.05)
                while True:
                    forward(params, x).sum().backward()
            except KeyboardInterrupt:
                pass
            except Exception:
                yield "wrong"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            hooks = [module for module in model.modules() if module._forward_hooks]
            yield "right" if _computes_again(bool(trial % 2)) and not hooks else "wrong"
            yield _outcome(lambda: forward(params, x), want)
    finally:
        signal.signal(signal.SIGALRM, before)


def killed_runs(chance: random.Random, number: int) -> Outcomes:
    """A run that is killed and resumed, again and again, ends as one that is not, to the last bit."""
    with tempfile.TemporaryDirectory() as folder:
        want = _start("fit", f"{folder}/whole.pt").communicate()[0]
        path = Path(folder) / "run.pt"
        for _ in range(number):
            path.unlink(missing_ok=True)
            for _ in range(3):
                worker = _start("fit", str(path))
                assert worker.stdout is not None
                worker.stdout.readline()
                time.sleep(chance.uniform(0.0, 0.3))
                worker.kill()
                worker.communicate()
            got = _start("fit", str(path)).communicate()[0]
            left = {each.name for each in Path(folder).iterdir()} <= {"run.pt", "whole.pt"}
            yield "right" if got == want and want and left else "wrong"


def _worker(kind: str, path: str) -> None:
    """What runs in a process of its own, and is interrupted or killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if kind == "save":
        state = _state() | {"large": torch.zeros(500_000)}
        fe.save_checkpoint(state, path)
        print("begun", flush=True)
        while True:
            fe.save_checkpoint(state, path)
    print("begun", flush=True)
    torch.manual_seed(0)
    model, x = _net(dropout=0.2), torch.randn(64, 3)
    params = fe.batchensemble_params(model, 3)
    optimizer = torch.optim.Adam(fe.param_groups(params, lr=0.01))
    step = fe.make_train_step(
        fe.make_forward(model), nn.functional.mse_loss, optimizer, prepare=lambda i: (x[i], x[i, :2]), compile=False
    )
    fitted = fe.fit(step, params, lambda g: fe.index_batches(64, 16, generator=g), epochs=40, checkpoint=path)
    print([tensor.double().sum().item().hex() for tensor in tree_leaves(fitted.params)])


# --------------------------------------------------------------------------------------------------------------------
# Memory


def memory_of_calls(_: random.Random, number: int) -> Outcomes:
    """Calls of one forward and one step leave no tensor, and no memory, behind."""
    model, x, y = _net(0.1), torch.randn(64, 3), torch.randn(64, 2)
    params = fe.ensemble_params(model, 3)
    forward = fe.make_forward(model, chunk_size=2)
    step = fe.make_train_step(forward, nn.functional.mse_loss, torch.optim.Adam(tree_leaves(params)), compile=False)

    def once() -> None:
        step(params, x, y)
        fe.predict(forward, params, x)

    yield from _kept(once, number, most_bytes=30e6)


def memory_of_models(_: random.Random, number: int) -> Outcomes:
    """Models with weight_norm, whose layers have classes of their own, go when they are not needed any more."""

    def once() -> None:
        model = nn.Sequential(weight_norm(nn.Linear(300, 300)), nn.Tanh(), weight_norm(nn.Linear(300, 10)))
        params = fe.batchensemble_params(model, 3)
        fe.make_forward(model)(params, torch.ones(2, 300)).sum().backward()

    yield from _kept(once, number, most_bytes=100e6)


def _kept(once: Callable[[], None], number: int, most_bytes: float) -> Outcomes:
    def found() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    for _ in range(20):
        once()
    tensors, size = found()
    for _ in range(number):
        once()
        yield "right"
    more, larger = found()
    yield "right" if more <= tensors + 5 and larger - size < most_bytes else "wrong"


TRIALS: dict[str, tuple[Callable[[random.Random, int], Outcomes], int]] = {
    "threads, predict and train": (predict_while_another_thread_trains, 300),
    "threads, calls while compiling": (calls_while_another_thread_compiles, 4),
    "threads, new parameters": (parameters_made_in_threads, 40),
    "threads, draws of another": (draws_of_another_thread, 60),
    "threads, checkpoint of another": (checkpoints_of_another_thread, 400),
    "flips, one bit": (flipped_bits, 1200),
    "flips, blocks": (damaged_blocks, 600),
    "writers, two": (two_writers, 200),
    "interrupts, saving": (interrupted_saves, 12),
    "interrupts, calls": (interrupted_calls, 1000),
    "kills, fit": (killed_runs, 6),
    "memory, calls": (memory_of_calls, 2000),
    "memory, models": (memory_of_models, 300),
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
