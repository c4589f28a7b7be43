"""A process that trains without a private name of torch, for one name after another, each in a fork of its own.

    echo '[["torch._inductor.config", "cpp.vec_isa_ok"]]' | python deletion.py

prints a line of JSON for each pair: the losses of eager and of compiled steps, the rung in use, whether plain
torch.compile works, and what was logged.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from typing import Any

import torch
import torch._inductor.config

LAST = "(module)"

AHEAD = tuple(f"torch.{name}" for name in ("_inductor.config", "_inductor.cp", "_inductor.exc", "utils._filelock"))
"""The modules whose names are used before a compilation, in trials of the C++ compiler."""


def delete(module: str, name: str) -> None:
    """Remove a name of torch, or a whole module, as if this torch did not have it."""
    *path, leaf = module.split(".") if name == LAST else name.split(".")
    if name == LAST:
        sys.modules[module] = None  # type: ignore[assignment]  # an import of it then fails
        owner: Any = sys.modules[".".join(path)]
    else:
        owner = importlib.import_module(module)
        for step in path:
            owner = getattr(owner, step)
    places = [owner, *(type(owner).__mro__ if not isinstance(owner, type) else owner.__mro__)]
    for place in places:
        if leaf in vars(place) or (place is owner and hasattr(owner, leaf)):
            try:
                delattr(place, leaf)
            except (AttributeError, KeyError):  # it is inherited
                continue


def train(conv: bool) -> dict[str, Any]:
    """A few steps of a small model, eager and compiled. Convolutions of their own are computed one after another."""
    import functorch_ens as fe

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]  # a plain list
    logging.getLogger("functorch_ens").addHandler(handler)
    logging.getLogger("functorch_ens").setLevel(logging.INFO)
    results: dict[str, Any] = {"log": records}
    for way, compile in (("eager", False), ("compiled", True)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv1d(1, 3, 3) if conv else torch.nn.Linear(3, 3), torch.nn.Flatten())
        params = fe.ensemble_params(model, 2)
        optimizer = torch.optim.Adam(fe.param_groups(params, lr=0.1))
        step = fe.make_train_step(fe.make_forward(model), fe.cross_entropy, optimizer, compile=compile)
        x, y = torch.randn(5, *([1] if conv else []), 3), torch.randint(3, (5,))
        results[way] = [step(params, x, y).tolist() for _ in range(3)]
    results["by"] = step.compiled_by
    return results


def plain_works() -> bool:
    """Whether torch.compile itself does, for gradients like those of a step."""
    import functorch_ens as fe

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Flatten())
    forward, params = fe.make_forward(model), fe.ensemble_params(model, 2)
    x, y = torch.randn(5, 3), torch.randint(3, (5,))

    def loss(params: fe.EnsembleParams) -> torch.Tensor:
        return fe.member_losses(fe.cross_entropy, forward(params, x), y).sum()

    try:
        torch.compile(torch.func.grad_and_value(loss))(params)
    except Exception:
        return False
    return True


def torch_trains() -> bool:
    """Whether torch alone still trains: its own optimisers read some private names."""
    weight = torch.zeros(2, 2, requires_grad=True)
    try:
        weight.grad = torch.func.grad(lambda w: torch.func.vmap(torch.sum)(w).sum())(weight.detach())
        torch.optim.Adam([weight]).step()
    except Exception:
        return False
    return True


def answer(module: str, name: str) -> dict[str, Any]:
    """Delete the name, train in a fork, and try torch.compile here, where no failure has been before."""
    if module:
        delete(module, name)
    if not module.startswith(AHEAD):  # without these trials a process takes a third of the time
        torch._inductor.config.cpp.vec_isa_ok = True
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            found = train(conv=name == "layout_optimization")
        except Exception as error:
            found = {"error": repr(error)}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        results: dict[str, Any] = json.load(file)
    if results.get("by") == "eager":
        results["plain"] = plain_works()
    if "error" in results:
        results["torch"] = torch_trains()
    return results


def main() -> None:
    """Fork a process for each pair, as many at a time as there are cores."""
    # Once for all forks: the modules that torch imports, and the patterns that it traces, at a first compilation.
    config = torch._inductor.config
    config.compile_threads, config.cpp.vec_isa_ok = 1, True  # no process or thread that a fork would lose
    torch.compile(lambda x: (x.sin() @ x).log_softmax(1))(torch.ones(4, 4))  # autograd could not be forked
    torch.compiler.reset()
    config.compile_threads, config.cpp.vec_isa_ok = 2, None
    importlib.import_module("torch._inductor.cpu_vec_isa").valid_vec_isa_list.cache_clear()
    pairs = json.load(sys.stdin)
    waiting: dict[int, int] = {}
    for number, (module, name) in enumerate(pairs):
        if len(waiting) == (os.cpu_count() or 1) or number == 1:  # the first one fills the cache for the others
            waiting.pop(os.wait()[0])
        child = os.fork()
        if child == 0:
            line = json.dumps({"name": [module, name], **answer(module, name)})
            os.write(1, (line + "\n").encode())
            os._exit(0)
        waiting[child] = number
    while waiting:
        waiting.pop(os.wait()[0])


if __name__ == "__main__":
    main()
