"""Measuring in a way that can be trusted: interleaved rounds, ratios within a round, memory as torch counts it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would tell of every start and end

import torch

Call = Callable[[], Any]


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of one value or more."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median(values), low, high)


def interleaved(calls: Mapping[str, Call], rounds: int, device: torch.device, seconds: float = 0.03) -> dict[str, Any]:
    """The seconds that one call takes, `rounds` times for each of `calls`, in turn: A B C A B C ...

    A machine that slows down slows all of them down. Each time is the mean of as many calls as take `seconds`.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(seconds / max(seconds_of(call, 1, device), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # what the others left in the caches is theirs
            times[name].append(seconds_of(call, repeats[name], device))
    return times


def ratio(times: list[float], others: list[float]) -> Spread:
    """How many times as long, round by round."""
    return Spread.of([mine / theirs for mine, theirs in zip(times, others, strict=True)])


def seconds_of(call: Call, repeats: int, device: torch.device) -> float:
    """The seconds that one call takes, as the mean of `repeats` calls; on a GPU by its own clock."""
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
    """The most bytes that tensors hold at once during `call`, above what they held before, as torch counts them."""
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


def machine(device: torch.device) -> str:
    """The torch, the device and the threads that figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"torch {torch.__version__}, {name}{threads}"


def aligned(rows: list[list[str]]) -> str:
    """A table: the first column to the left, the others to the right, a line below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(value: Any, path: Path) -> None:
    """`value` in the file `path`: whole, or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`path`, written by `write` to another name first, and then moved: whole, or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text}")
    return int(text)


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """An error of `parser` where `device` is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no GPU here; use --device cpu")


def check_folders(parser: argparse.ArgumentParser, **files: Path) -> None:
    """An error of `parser`, before any work is done, where a file to be written has no folder."""
    for path in files.values():
        if not path.parent.is_dir():
            parser.error(f"{', '.join(f'--{name}' for name in files)}: there is no folder {path.parent}")


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a pytree."""
    return (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def megabytes(value: Any) -> float:
    """The size of the tensors in a pytree."""
    return sum(leaf.nbytes for leaf in leaves(value)) / 1e6
