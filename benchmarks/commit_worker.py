"""Times calls for compare_commits.py, which starts this file once for each commit, with its library on PYTHONPATH.

A line of JSON on standard input is a request, and a line on standard output its answer. Only the public contract of
the library is used, so that the library may be an older one.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Call, quiet, seconds_of
from networks import CASES
from torch.utils._pytree import tree_leaves

import functorch_ens as fe

CLASSIC, BATCH = "classic", "BatchEnsemble"


class Worker:
    """Answers requests. It holds the calls of one case and kind at a time."""

    def __init__(self) -> None:
        self.device, self.clock = torch.device("cpu"), "wall"
        self.calls: dict[str, Call] = {}

    def start(self, device: str, threads: int | None, clock: str, compiles: bool) -> str:
        """Note how to time. Compile something small, so that no later call imports the compiler.

        Returns: the folder of the library.
        """
        self.device, self.clock = torch.device(device), clock
        if threads:
            torch.set_num_threads(threads)
        if compiles:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=self.device))
        return str(Path(fe.__file__).parent.parent)

    def build(self, case: str, kind: str) -> None:
        """Build the calls of a case."""
        self.calls = {}
        gc.collect()
        torch.manual_seed(0)
        chosen = CASES[case]
        E, device = chosen.E, self.device
        model = chosen.make().to(device).train()
        x, y = torch.randn(chosen.B, *chosen.shape).to(device), torch.randint(10, (chosen.B,)).to(device)
        source = torch.Generator().manual_seed(0)
        if kind == CLASSIC:
            params = fe.ensemble_params(model, E, generator=source)
        else:
            params = fe.batchensemble_params(model, E, init="random_sign", generator=source)
        buffers, forward = fe.ensemble_buffers(model, E), fe.make_forward(model)
        compile = {"mode": "reduce-overhead"} if device.type == "cuda" else True
        optimizer = torch.optim.Adam(tree_leaves(params), lr=1e-3)
        step = fe.make_train_step(forward, F.cross_entropy, optimizer, compile=compile)

        def infer() -> None:
            with torch.no_grad():
                forward(params, x, buffers=buffers)

        self.calls = {
            "forward": infer,
            "gradients": lambda: step.gradients(params, x, y, buffers=buffers),
            "step": lambda: step(params, x, y, buffers=buffers),
        }

    def first(self) -> float:
        """The seconds of the first call, which compiles the gradients."""
        torch.compiler.reset()
        return self._seconds("gradients", 1)

    def time(self, phase: str, calls: int) -> float:
        """The mean seconds of so many calls, after one that fills the caches with their data."""
        self.calls[phase]()
        return self._seconds(phase, calls)

    def _seconds(self, phase: str, calls: int) -> float:
        call = self.calls[phase]
        if self.clock == "wall":
            return seconds_of(call, calls, self.device)
        begun = _processor_seconds()
        for _ in range(calls):
            call()
        return (_processor_seconds() - begun) / calls


def _processor_seconds() -> float:
    """Of all threads of this process, and of the C++ compilers that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    quiet()
    worker = Worker()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        method: Callable[..., Any] = getattr(worker, name)
        try:
            answer = {"answer": method(*arguments)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
