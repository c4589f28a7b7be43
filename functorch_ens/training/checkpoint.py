"""A training run on disk: written whole or not at all, and read without running any code in the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from functorch_ens.params.pytree import EnsembleParams


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` in one move: an interruption leaves the file that was there before.

    >>> import tempfile, torch, functorch_ens as fe
    >>> params = fe.batchensemble_params(torch.nn.Linear(3, 2), E=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fe.save_checkpoint({"params": params, "epoch": 3}, f"{folder}/run.pt")
    ...     again = fe.load_checkpoint(f"{folder}/run.pt")
    >>> again["params"].E, again["epoch"]
    (5, 3)

    Args:
        state: a dict of what a run is to go on with: `EnsembleParams`, buffers, the `state_dict()` of an optimiser, the
            `get_state()` of a generator; tensors, numbers and text in dicts, lists and tuples.
        path: the file; its folder is made where it is not there.

    Raises: TypeError where `state` is no dict, or holds what cannot be read without running code (numpy's numbers are
        such: give `float(x)`); OSError where the file cannot be written.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict, got {type(state).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())  # the move must not be on the disk before what it moves is
        try:
            _read(part, mmap=True)  # what could not be read again is of no use; the tensors are not read for that
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise TypeError(f"state: expected tensors, numbers and text in dicts and lists: {reason}") from error
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> dict[str, Any]:
    """What `save_checkpoint` wrote to `path`; on `device`, where None is where it was.

    Raises: FileNotFoundError; ValueError where the file is no whole checkpoint, or holds anything but tensors, numbers
        and text.
    """
    try:
        state = _read(path, map_location=device)
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken zip, a pickle that is not whole or not allowed: torch raises many kinds
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"path: {os.fspath(path)!r} is no checkpoint that can be read: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"path: {os.fspath(path)!r} holds no dict, but {type(state).__name__}")
    return state


def _read(path: str | os.PathLike[str], **options: Any) -> Any:
    with torch.serialization.safe_globals([EnsembleParams]):
        return torch.load(path, weights_only=True, **options)
