"""Checkpoints of a training run: written whole or not at all, and loaded without running code from the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from functorch_ens.checks import check_device, check_mapping, check_path, first_line
from functorch_ens.files import write_whole
from functorch_ens.params.pytree import EnsembleParams


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` in one rename: an interruption leaves the previous checkpoint.

    >>> import tempfile, torch, functorch_ens as fe
    >>> params = fe.batchensemble_params(torch.nn.Linear(3, 2), E=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fe.save_checkpoint({"params": params, "epoch": 3}, f"{folder}/run.pt")
    ...     again = fe.load_checkpoint(f"{folder}/run.pt")
    >>> again["params"].E, again["epoch"]
    (5, 3)

    Args:
        state: a dict of everything that the run needs to continue: `EnsembleParams`, buffers, the `state_dict()` of an
            optimiser, the `get_state()` of a generator. Its values are tensors, numbers and text, in dicts, lists and
            tuples.
        path: the file; its folder is created if it is missing.

    Raises:
        TypeError: `state` is not a dict, or has a value of another type. NumPy's scalars are such: give `float(x)`.
        OSError: the file cannot be written.
    """
    check_mapping(state, "state", "a dict")
    check_path(path, "path")
    with write_whole(path) as part:
        with part.open("wb") as file:
            torch.save(dict(state), file)
        try:
            # Read the file back before the rename: torch.save pickles anything, and load_checkpoint would refuse it.
            # mmap leaves the data of the tensors on the disk.
            _read(part, mmap=True)
        except Exception as error:
            raise TypeError(
                f"state: expected tensors, numbers and text in dicts and lists: {first_line(error)}"
            ) from error


def load_checkpoint(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> dict[str, Any]:
    """Load the state that `save_checkpoint` wrote to `path`.

    Args:
        path: the file. Code in it is not run.
        device: the device of the loaded tensors; None is the one that each was saved from.

    Returns: the dict that was saved. The leaves of its `EnsembleParams` are autograd leaves again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is incomplete, is no checkpoint, or has values other than tensors, numbers and text.
    """
    check_path(path, "path")
    check_device(device)
    try:
        state = _read(path, map_location=device)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds: for a broken zip, a truncated pickle, a forbidden class
        raise ValueError(f"path: {os.fspath(path)!r} is no checkpoint that can be read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"path: {os.fspath(path)!r} holds no dict, but {type(state).__name__}")
    return state


def _read(path: str | os.PathLike[str], **options: Any) -> Any:
    """Unpickle `path` with torch's allowlist of classes, and `EnsembleParams`."""
    with torch.serialization.safe_globals([EnsembleParams]):
        return torch.load(path, weights_only=True, **options)
