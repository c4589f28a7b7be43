"""Measure times in interleaved rounds, ratios within a round, and memory as torch's allocators count it."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the lines that torch's profiler logs per run

import torch

Call = Callable[[], Any]


class Spread(NamedTuple):
    """A median and the two quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of one value or more."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median(values), low, high)


def interleaved(calls: Mapping[str, Call], rounds: int, device: torch.device, seconds: float = 0.03) -> dict[str, Any]:
    """Time every one of `calls` once per round, in turn: A B C A B C ...

    If the machine slows down, all of them slow down alike. Each time is the mean of as many calls as take `seconds`.

    Returns: by name, the seconds of one call in each round.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(seconds / max(seconds_of(call, 1, device), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # warm up: the caches have the data of the previous contender
            times[name].append(seconds_of(call, repeats[name], device))
    return times


def ratio(times: list[float], others: list[float]) -> Spread:
    """The spread of `times` / `others`, divided round by round."""
    return Spread.of([mine / theirs for mine, theirs in zip(times, others, strict=True)])


def shown_ratio(times: list[float], others: list[float]) -> str:
    """`ratio`, as text: the median, and in brackets the quartiles."""
    spread = ratio(times, others)
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def seconds_of(call: Call, repeats: int, device: torch.device) -> float:
    """The mean seconds of `repeats` calls; on a GPU between two CUDA events, as kernels run asynchronously."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def peak_memory(call: Call, device: torch.device) -> int:
    """The peak of bytes allocated for tensors during `call`, minus the bytes that were allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held, default=0)


PRECISIONS = ("float32", "tf32", "bfloat16")
"""The precisions of matrix products; tf32 is a GPU's, and bfloat16 is by autocast."""


def use(precision: str) -> None:
    """Let matrix products and convolutions of float32 round their factors to TF32, or not."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of a forward and its loss."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def compile_options(device: torch.device) -> dict[str, Any]:
    """For torch.compile: CUDA graphs on a GPU, where else the start of each kernel takes longer than the kernel."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {}


def now(device: torch.device) -> float:
    """The time in seconds, once the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="device of all computation (default: cpu)"
    )


def quiet() -> None:
    """Leave out what would be printed between the rows of a table: of attention under vmap, and of strategies."""
    warnings.filterwarnings("ignore", message="There is a performance drop")
    logging.getLogger("functorch_ens").setLevel(logging.ERROR)


def machine(device: torch.device) -> str:
    """Describe the version of torch, the device and the number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"torch {torch.__version__}, {name}{threads}"


def write_json(value: Any, path: Path) -> None:
    """Write `value` to `path` as JSON."""
    from functorch_ens.files import write_whole  # not at the top: compare_worker.py has the library of another commit

    text = json.dumps(value, indent=1) + "\n"
    with write_whole(path) as part:
        part.write_text(text)


def positive(text: str) -> int:
    """Parse an integer above 0, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text}")
    return int(text)


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse `argv`; exit with a usage error, before any work, if the GPU or the folder of an output file is missing."""
    options = parser.parse_args(argv)
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no GPU here; use --device cpu")
    if "tf32" in (getattr(options, "precision", None) or []) and options.device != "cuda":
        parser.error("--precision: got tf32, which a GPU has; use --device cuda")
    for name in ("json", "png"):
        path: Path | None = getattr(options, name, None)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: there is no folder {path.parent}")
    return options


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors in a pytree."""
    return (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def megabytes(value: Any) -> float:
    """The size of all tensors in a pytree, in 10^6 bytes."""
    return sum(leaf.nbytes for leaf in leaves(value)) / 1e6
