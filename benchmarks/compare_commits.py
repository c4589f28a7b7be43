"""Whether a commit is slower than another: the same calls with the library of each, in turn.

    python benchmarks/compare_commits.py HEAD .              what the uncommitted changes come to; four minutes
    python benchmarks/compare_commits.py main HEAD --fail-above 1.1
    python benchmarks/compare_commits.py v0.1.0 HEAD --case resnet18 vit --kind BatchEnsemble
    python benchmarks/compare_commits.py HEAD HEAD           what this machine tells apart
    python benchmarks/compare_commits.py HEAD . --clock processor --threads 1        while others use the machine

OLD and NEW are commits, or folders that hold `functorch_ens/`, as `.` does with all its uncommitted changes. A commit's
library is unpacked into a temporary folder; the checkout stays as it is. Each library has a process of its own, and
both have the networks and the calls of this checkout. They are timed in turn, OLD NEW NEW OLD ..., one at a time. All
that is repeated with new processes, since two processes with the same code differ by a few per cent as well.

Ratios are NEW / OLD within a round. "slower": the median is above 1.05 and the lower quartile above 1, of three ratios
or more; "faster" likewise. The first call compiles. It is timed once in each process, with no kernels kept from before.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Spread, machine, parsed, positive, ratio, write_json
from networks import CASES
from tqdm import tqdm

from functorch_ens.tables import aligned

HERE = Path(__file__).parent
KINDS = ("classic", "BatchEnsemble")
FIRST, PHASES = "first call", ("forward", "gradients", "step")
NOTICED = 1.05
"""A smaller ratio is not called slower."""
SAMPLE = 0.05
"""Seconds of calls in a round."""
ENOUGH = 3
"""Fewer rounds tell nothing."""


class Failure(Exception):
    """There is nothing to compare; the message says why."""


class Tree(NamedTuple):
    """A library to time."""

    label: str
    folder: Path


def tree(given: str, unpacked: Path) -> Tree:
    """The folder `given`, or that commit of this repository, unpacked into `unpacked`."""
    if (Path(given) / "functorch_ens" / "__init__.py").is_file():
        return Tree(given, Path(given).resolve())
    name = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{given}^{{commit}}").decode().strip()
    if not name:
        raise Failure(f"expected a commit, or a folder that holds functorch_ens/, got {given}")
    archive = _git("archive", "--format=tar", name, "functorch_ens")
    if not archive:
        raise Failure(f"{given}: this commit has no folder functorch_ens")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(unpacked, filter="data")
    short = name[:9]
    return Tree(short if given.startswith(short[:7]) else f"{given} ({short})", unpacked)


def _git(*arguments: str) -> bytes:
    """What git says; nothing where it fails."""
    command = ["git", "-C", str(HERE.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True).stdout
    except FileNotFoundError:
        raise Failure("git: there is no such program") from None


class Worker:
    """A process with the library of one tree, and a cache of kernels of its own."""

    def __init__(self, tree: Tree, options: argparse.Namespace) -> None:
        self.tree = tree
        self._left = ExitStack()
        with ExitStack() as left:
            cache = left.enter_context(tempfile.TemporaryDirectory(prefix="kernels-", ignore_cleanup_errors=True))
            self._log = left.enter_context(tempfile.TemporaryFile("w+"))
            given = {"PYTHONPATH": str(tree.folder), "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": "1"}
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "commit_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **given, "TORCH_WARM_POOL": "0"},
                text=True,
            )
            left.callback(self._end)
            self._left = left.pop_all()
        try:
            found = Path(self.ask("start", options.device, options.threads, options.clock, compiles(options)))
            if not found.samefile(tree.folder):
                raise Failure(f"{tree.label}: its process has the library in {found}, not in {tree.folder}")
        except BaseException:
            self._left.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._left.close()

    def ask(self, *request: Any) -> Any:
        """The answer to a request.

        Raises: Failure with what the library raised, or with the last lines of a process that has ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        what = f"{self.tree.label}, {' '.join(map(str, request))}"
        if not line:
            self._log.seek(0)
            raise Failure(f"{what}: the process has ended\n{''.join(self._log.readlines()[-20:])}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(f"{what}: {answer['error']}")
        return answer["answer"]

    def _end(self) -> None:
        assert self._process.stdin and self._process.stdout
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


Key = tuple[str, str, str]
"""A case, a kind and a phase."""

Seconds = dict[Key, tuple[list[float], list[float]]]
"""The seconds of one call in each round, with OLD and with NEW."""


def compiles(options: argparse.Namespace) -> bool:
    """Whether anything that is compiled is timed."""
    return options.phase != ["forward"]


def timed(old: Tree, new: Tree, options: argparse.Namespace) -> Seconds:
    """The seconds of every chosen phase, with each library."""
    phases = [phase for phase in (FIRST, *PHASES) if phase in options.phase]
    pairs = list(product(options.case, options.kind))
    found: Seconds = {(case, kind, phase): ([], []) for case, kind in pairs for phase in phases}
    with tqdm(total=options.starts * len(pairs), desc="cases", disable=None) as bar:
        for start in range(options.starts):
            with Worker(old, options) as first, Worker(new, options) as second:
                workers = (first, second)
                for case, kind in pairs:
                    bar.set_postfix_str(f"{case}, {kind}")
                    for i in _order(start):
                        workers[i].ask("build", case, kind)
                        if compiles(options):
                            seconds = workers[i].ask("first")
                            found.get((case, kind, FIRST), ([], []))[i].append(seconds)
                    for phase in phases:
                        if phase != FIRST:
                            for into, times in zip(
                                found[case, kind, phase], _rounds(workers, phase, options), strict=True
                            ):
                                into += times
                    bar.update()
    return found


def _order(turn: int) -> Sequence[int]:
    """Who is first takes turns."""
    return (0, 1) if turn % 2 == 0 else (1, 0)


def _rounds(workers: tuple[Worker, Worker], phase: str, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The seconds of one call in each round, by worker. Each is the mean of as many calls as take long enough."""
    calls = max(1, round(SAMPLE / max(*(worker.ask("time", phase, 1) for worker in workers), 1e-9)))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(options.rounds):
        for i in _order(turn):
            times[i].append(workers[i].ask("time", phase, calls))
    return times


def verdict(new: list[float], old: list[float]) -> str:
    """`"slower"` or `"faster"`, where the ratios of the rounds say so; else `""`."""
    spread = ratio(new, old)
    if len(new) < ENOUGH:
        return ""
    if spread.median > NOTICED and spread.low > 1:
        return "slower"
    return "faster" if spread.median < 1 / NOTICED and spread.high < 1 else ""


def table(found: Seconds) -> str:
    """Format milliseconds, ratios with their quartiles, and what they say."""
    rows = [["case", "kind", "phase", "OLD ms", "NEW ms", "NEW / OLD", "quartiles", ""]]
    for key, (old, new) in found.items():
        spread = ratio(new, old)
        medians = (f"{1e3 * Spread.of(times).median:.3g}" for times in (old, new))
        quartiles = f"{spread.low:.3f} to {spread.high:.3f}"
        rows.append([*key, *medians, f"{spread.median:.3f}", quartiles, verdict(new, old)])
    return aligned(rows)


def slower(found: Seconds, above: float) -> list[str]:
    """What is slower by more than a ratio of `above`."""
    medians = {key: ratio(new, old).median for key, (old, new) in found.items() if verdict(new, old) == "slower"}
    return [f"{', '.join(key)}: {median:.3f}" for key, median in medians.items() if median > above]


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a ratio of 1 or more, such as 1.1, got {text}")
    return value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cases, phases = ["mlp-32", "mlp-256", "small-mlp", "cnn"], [FIRST.replace(" ", "-"), *PHASES]
    add("old", metavar="OLD", help="a commit, or a folder that holds functorch_ens/")
    add("new", metavar="NEW", help="the same; . is the working tree")
    add("--case", nargs="+", choices=list(CASES), default=cases, metavar="NAME", help=f"of {', '.join(CASES)}")
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    add("--phase", nargs="+", choices=phases, default=phases, metavar="PHASE", help=f"of {', '.join(phases)}")
    add("--starts", type=positive, default=3, metavar="N", help="pairs of processes, one after another (default: 3)")
    add("--rounds", type=positive, default=6, metavar="N", help="rounds in each pair of processes (default: 6)")
    add("--fail-above", type=_ratio, metavar="RATIO", help="exit with status 1 if something is slower, and by more")
    add("--threads", type=positive, metavar="N", help="threads of torch (default: torch's own)")
    add(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor: the seconds of all threads and compilers, which others on the machine hardly change",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device of all computation (default: cpu)")
    add("--json", type=Path, metavar="FILE", help="also write all times there")
    options = parsed(parser, argv)
    options.phase = [FIRST if phase == phases[0] else phase for phase in options.phase]
    if options.clock == "processor" and options.device == "cuda":
        parser.error("--clock: expected wall for a GPU, got processor")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("compare_commits.py: terminated"))  # and no folder is left behind
    try:
        with tempfile.TemporaryDirectory(prefix="commits-") as folder:
            old, new = (tree(getattr(options, name), Path(folder) / name) for name in ("old", "new"))
            found = timed(old, new, options)
    except Failure as error:
        sys.exit(f"compare_commits.py: {error}")
    where = machine(torch.device(options.device))
    rounds = f"{options.starts} x {options.rounds} rounds in turn (first call: {options.starts})"
    print(f"OLD {old.label}, NEW {new.label}; {where}; {rounds}; {options.clock} time, medians\n\n{table(found)}")
    if options.json:
        rows = [
            {"case": case, "kind": kind, "phase": phase, "old": times[0], "new": times[1]}
            for (case, kind, phase), times in found.items()
        ]
        write_json(
            {"machine": where, "clock": options.clock, "old": old.label, "new": new.label, "seconds": rows},
            options.json,
        )
    if options.fail_above and (bad := slower(found, options.fail_above)):
        print(f"\nslower by more than {options.fail_above:g}: {'; '.join(bad)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
