"""What a checkpoint of `fit` must have in common with the run that resumes from it.

Everything is checked before anything is applied: a damaged or foreign state makes fused kernels write out of bounds,
and `torch.optim` and `copy_` take most of it without a word.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from functorch_ens.checks import first_line, shown
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.rng import RandomState
from functorch_ens.training.optim import Trained

# How an optimiser computes, not what. These are of the present run, which may be on another device.
_KERNELS = ("foreach", "fused", "capturable", "differentiable")

# What a scheduler makes of `initial_lr` and the like.
_SCHEDULED = ("lr", "momentum", "betas")

# What a scheduler counts. Resuming with the same objects, these may be ahead of what the file says.
_COUNTERS = ("last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i")


def form_of(
    params: EnsembleParams, buffers: Mapping[str, Tensor] | None, optimizer: Optimizer, trained: Trained, **parts: Any
) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it, to compare with another one.

    Returns: `"kinds"`: the types of objects, and the dtypes and shapes of tensors, by name. `"trained"`: the names of
    the optimiser's tensors by group, in order: `name`, or `name[i]` for the slice of member i. `"forms"`: the dtypes,
    shapes and strides in its state.
    """
    tensors = {**params.shared, **params.stacked, **(buffers or {})}
    shapes = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    parts = {"optimizer": optimizer, **parts}
    names = {id(tensor): name for name, tensor in trained.whole.items()}
    names |= {id(tensor): f"{name}[{i}]" for name, i, tensor in trained.slices}
    return {
        "kinds": {**{name: type(part).__name__ for name, part in parts.items()}, **shapes},
        "trained": [[names[id(tensor)] for tensor in group["params"]] for group in optimizer.param_groups],
        "forms": _forms(optimizer.state_dict()["state"]),
    }


def settings_of(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """A copy of the hyperparameters of an optimiser and of the state of a scheduler, by name."""
    state = scheduler.state_dict() if hasattr(scheduler, "state_dict") else None
    return deepcopy(_settings(optimizer.param_groups, state))


def check_state(there: dict[str, Any], here: dict[str, Any], optimizer: Optimizer, generator: torch.Generator) -> None:
    """ValueError, naming the first difference, where the state `there` of a file is not of the run `here`.

    Args:
        there: the state in the file.
        here: the state of the run that is to resume, before it has taken a step.
        optimizer: that of the run.
        generator: that of the run.
    """
    missing = here.keys() - there.keys()
    if missing:
        raise ValueError(f"is not one that fit wrote: it has no {sorted(missing)}")
    try:
        _check_kinds(there, here)
        _check_progress(there, here)
        for field, theirs, mine in zip(EnsembleParams._fields, there["params"], here["params"], strict=True):
            _same_tensors(f"params.{field}", theirs, mine, strides=True)
        _same_tensors("buffers", there["buffers"], here["buffers"])
        _check_patience(there["patience"], here)
        _check_trained(there, here)
        _check_settings(there, here)
        _check_optimizer_state(there, here, optimizer)
        _check_generators(there, generator)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # something else than what fit writes
        raise ValueError(f"is damaged: {first_line(error)}") from error


@contextmanager
def put_back_on_error(optimizer: Optimizer, scheduler: Any) -> Iterator[None]:
    """A `with` block after which, if it fails, both have the state that they had before."""
    held = optimizer.state, optimizer.param_groups
    before = None if scheduler is None else deepcopy(scheduler.state_dict())
    try:
        yield
    except BaseException:
        optimizer.state, optimizer.param_groups = held
        if scheduler is not None:
            scheduler.load_state_dict(before)
        raise


def with_own_kernels(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimiser in a file, for the kernels that `optimizer` was told to use."""
    groups = [
        {**group, **{key: own[key] for key in _KERNELS if key in own}}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def _differs(what: str, there: Any, here: Any, advice: str = "give another file, or remove this one") -> ValueError:
    return ValueError(f"is of another run: {what} is {there} there, and {here} here; {advice}")


def _damaged(what: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"is damaged: {what}: expected {expected}, got {_form(found)}")


def _check_kinds(there: dict[str, Any], here: dict[str, Any]) -> None:
    """The kinds of objects, and the names, dtypes and shapes of parameters and buffers."""
    mine, theirs = here["kinds"], there["kinds"]
    if not isinstance(theirs, dict):
        raise _damaged("kinds", "a dict", theirs)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise _differs(name, theirs.get(name, "absent"), mine.get(name, "absent"))
    for name in ("params", "buffers", "optimizer", "scheduler", "patience", "began", "trained", "forms"):
        if type(there[name]) is not type(here[name]):
            raise _damaged(name, type(here[name]).__name__, there[name])


def _check_progress(there: dict[str, Any], here: dict[str, Any]) -> None:
    """What fit counts: epochs, the history, and the members that have stopped."""
    epoch, history, E = there["epoch"], there["history"], here["params"].E
    if type(epoch) is not int or epoch < 1:
        raise _damaged("epoch", "an int >= 1", epoch)
    if not isinstance(history, list) or len(history) != epoch:
        raise _damaged("history", f"a list of {epoch} epochs", history)
    for row in history:
        if not isinstance(row, dict) or not _all_of(Tensor, row.values()):
            raise _damaged("history", "tensors by name", row)
        loss = row.get("loss")
        if loss is None or loss.shape != (E,):
            raise _damaged("history: loss", f"a tensor [{E}]", loss)
        if {name: value.shape for name, value in row.items()} != {n: value.shape for n, value in history[0].items()}:
            raise _damaged("history", "the same names and shapes in all epochs", row)
    stopped, failed, members = there["stopped"], there["failed"], range(E)
    if not (isinstance(stopped, dict) and all(i in members for i in stopped) and _all_of(str, stopped.values())):
        raise _damaged("stopped", f"reasons by members, from 0 to {E - 1}", stopped)
    if not (isinstance(failed, list) and all(i in stopped for i in failed)):
        raise _damaged("failed", "a list of members that have stopped", failed)


def _check_patience(there: Any, here: dict[str, Any]) -> None:
    if there is None:
        return
    if there.get("mode") != here["patience"]["mode"]:
        raise _differs("monitor_mode", shown(there.get("mode")), shown(here["patience"]["mode"]))
    for name in ("best", "waited"):
        _like(f"patience: {name}", there.get(name), here["patience"][name])
    if not isinstance(there.get("kept"), EnsembleParams):
        raise _damaged("patience: kept", "EnsembleParams", there.get("kept"))
    for name, kept, own in zip(EnsembleParams._fields, there["kept"], here["params"], strict=True):
        _same_tensors(f"patience: kept.{name}", kept, own)
    _same_tensors("patience: buffers", there.get("buffers"), here["buffers"] or {})


def _check_settings(there: dict[str, Any], here: dict[str, Any]) -> None:
    """The settings that the two runs began with are equal, but for what the saved run itself has changed since.

    A run that resumes with the same objects begins with what its scheduler has made of them.
    """
    began, now = there["began"], _settings(there["optimizer"]["param_groups"], there["scheduler"])
    used = any(
        name.startswith("scheduler") and not _equal(mine, began.get(name)) for name, mine in here["began"].items()
    )
    for name, mine in here["began"].items():
        if name not in began:  # an option of another version of torch
            continue
        if name not in now:
            raise _damaged(name, "what it began with", None)
        then, last = began[name], now[name]
        if isinstance(mine, Tensor) and isinstance(then, Tensor):
            _like(name, last, then)
        elif isinstance(mine, int | float) and not isinstance(last, int | float):
            raise _damaged(name, "a number", last)
        group, _, key = name.rpartition(".")
        moved = not _equal(then, last)
        if _equal(mine, then) or (moved and _equal(mine, last)):
            continue
        if name.startswith("scheduler"):
            if moved or key in _COUNTERS:
                continue
        elif used and (moved or key in _SCHEDULED) and f"{group}.initial_lr" in began:
            continue
        advice = (
            "give what it began with, or another file for a new run; load_checkpoint(...)['params'] has its parameters"
        )
        raise _differs(name, shown(then), shown(mine), advice)


def _check_trained(there: dict[str, Any], here: dict[str, Any]) -> None:
    """The optimiser's tensors, by name and in order."""
    theirs, mine = _placed(there["trained"]), _placed(here["trained"])
    for place in sorted(theirs.keys() | mine.keys()):
        if theirs.get(place) != mine.get(place):
            what = f"tensor {place[1]} of group {place[0]} of the optimizer"
            raise _differs(what, theirs.get(place, "absent"), mine.get(place, "absent"))
    groups = there["optimizer"].get("param_groups")
    own = [group["params"] for group in here["optimizer"]["param_groups"]]
    if not isinstance(groups, list) or [group["params"] for group in groups] != own:
        raise _damaged("optimizer: param_groups", "the groups of the optimizer", groups)


def _check_optimizer_state(there: dict[str, Any], here: dict[str, Any], optimizer: Optimizer) -> None:
    """The forms in the state of each tensor: those that the file says, and those that a step makes."""
    state, mine = there["optimizer"].get("state"), _placed(here["trained"])
    if not isinstance(state, dict) or not all(i in range(len(mine)) for i in state):
        raise _damaged("optimizer: state", f"a dict by numbers of tensors, from 0 to {len(mine) - 1}", state)
    forms = _forms(state)
    for name in sorted(forms.keys() | there["forms"].keys()):
        if forms.get(name) != there["forms"].get(name):
            told, is_now = there["forms"].get(name, "nothing"), forms.get(name, "nothing")
            raise ValueError(f"is damaged: optimizer: {name}: expected {told}, got {is_now}")
    known_state = _state_after_a_step(optimizer)
    if known_state is None:
        return
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    stopped = tuple(f"[{i}]" for i in there["stopped"])
    for i, (name, tensor, known) in enumerate(zip(mine.values(), tensors, known_state, strict=True)):
        found = {key: value for key, value in state.get(i, {}).items() if value is not None}
        if not found and (not tensor.requires_grad or name.endswith(stopped)):  # it may not have been updated at all
            continue
        for key in sorted(known.keys() | found.keys()):
            what = f"optimizer: {key} of {name}"
            if key not in known:
                raise _damaged(what, "nothing", found[key])
            if isinstance(known[key], Tensor):
                _like(what, found.get(key), known[key], strides=True)
            elif type(found.get(key)) is not type(known[key]):
                raise _damaged(what, type(known[key]).__name__, found.get(key))


def _state_after_a_step(optimizer: Optimizer) -> list[dict[str, Any]] | None:
    """The state of each tensor after a step of a copy of the optimiser on zeros; None for one that cannot be copied.

    Only optimisers of torch.optim are known to keep all that a step changes in their state and groups.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    for device in ("meta", "cpu"):  # meta takes no memory, but some optimisers read a number from their tensors
        try:
            return _stepped(optimizer, device)
        except Exception:  # such as SparseAdam, which takes sparse gradients only
            continue
    return None


def _stepped(optimizer: Optimizer, device: str) -> list[dict[str, Any]]:
    copy: Any = object.__new__(type(optimizer))
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    groups = []
    for group in optimizer.param_groups:
        zeros = [torch.zeros_like(tensor, device=device).requires_grad_() for tensor in group["params"]]
        for zero, tensor in zip(zeros, group["params"], strict=True):
            zero.grad = torch.zeros_like(zero)
            for key, value in optimizer.state.get(tensor, {}).items():
                count = not isinstance(value, Tensor) or value.numel() == 1
                state[zero][key] = deepcopy(value) if count else torch.zeros_like(value, device=device)
        plain = {key: False for key in _KERNELS if key in group}
        groups.append({**group, **plain, "params": zeros})
    copy.__dict__.update({**vars(optimizer), "state": state, "param_groups": groups})
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(copy)  # without hooks, and not the step that a scheduler has wrapped
    return [state[zero] for group in groups for zero in group["params"]]


def _check_generators(there: dict[str, Any], generator: torch.Generator) -> None:
    """States that generators of the same kinds take, tried on new ones."""
    random = there["random"]
    if not isinstance(random, tuple) or len(random) != len(RandomState._fields) or not isinstance(random[1], dict):
        raise _damaged("random", "states of torch's generators", random)
    states = [("generator", there["generator"], generator.device), ("random", random[0], torch.device("cpu"))]
    states += [
        ("random", state, torch.device("cuda", i)) for i, state in random[1].items() if torch.cuda.is_available()
    ]
    for name, state, device in states:
        try:
            torch.Generator(device).set_state(state)
        except (RuntimeError, TypeError) as error:
            raise _damaged(name, f"the state of a generator of {device.type}", state) from error


def _same_tensors(what: str, there: Any, here: Any, *, strides: bool = False) -> None:
    if here is None:
        return
    if not isinstance(there, Mapping) or there.keys() != here.keys():
        raise _damaged(what, f"tensors by the names {sorted(here)}", there)
    for name, expected in here.items():
        _like(f"{what}: {name}", there[name], expected, strides=strides)


def _like(what: str, found: Any, expected: Tensor, *, strides: bool = False) -> None:
    """ValueError where `found` is no tensor of the shape and dtype, and the strides, of `expected`."""
    fits = (
        isinstance(found, Tensor)
        and found.layout == torch.strided
        and found.shape == expected.shape
        # torch.optim casts counts of steps by its kernels and by the dtype of the parameter
        and (found.dtype == expected.dtype or (expected.ndim == 0 and found.is_floating_point()))
        and (not strides or _strides(found) == _strides(expected))
    )
    if not fits:
        raise _damaged(what, _form(expected), found)


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _form(value: Any) -> str:
    """A tensor by its dtype, shape and strides; another value as it is, or by its type where it is a container."""
    if isinstance(value, Tensor):
        strides = (
            "" if value.layout != torch.strided or value.is_contiguous() else f" of strides {list(value.stride())}"
        )
        return f"{value.dtype} {list(value.shape)}{strides}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _forms(state: Mapping[Any, Any]) -> dict[str, str]:
    """The values in the state of an optimiser, by name: a tensor by its form, another one by its type."""
    return {
        name: _form(value) if isinstance(value, Tensor) else type(value).__name__
        for name, value in _flat("state", state)
    }


def _placed(names: list[list[str]]) -> dict[tuple[int, int], str]:
    return {(group, i): name for group, of_group in enumerate(names) for i, name in enumerate(of_group)}


def _settings(groups: list[dict[str, Any]], scheduler: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values in the groups of an optimiser and in the state of a scheduler, by name."""
    own = [{key: value for key, value in group.items() if key not in ("params", *_KERNELS)} for group in groups]
    return dict([*_flat("optimizer.param_groups", own), *_flat("scheduler", scheduler or {})])


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in a nest of dicts and of lists of dicts, each with its name."""
    if isinstance(value, Mapping) and not isinstance(value, Counter):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}" if isinstance(key, str) else f"{name}[{key}]", item)
    elif isinstance(value, list) and value and _all_of(Mapping, value):
        for i, item in enumerate(value):
            yield from _flat(f"{name}[{i}]", item)
    else:
        yield name, value


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings are the same; nan is nan."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a.cpu() == b.cpu()).all())
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b or (a != a and b != b))


def _all_of(kind: type, values: Iterable[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)
